from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.convert import main
from sparse_rcnn.weights import export_checkpoint, load_pretrained, read_checkpoint, save_pretrained
from sparse_rcnn.weights.mmdet import KEYS as MMDET
from sparse_rcnn.weights.mmdet import with_counters
from sparse_rcnn.weights.official import KEYS as OFFICIAL


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_state):
    """The tiny detector as the official code and as mmdetection would have written it."""
    folder = tmp_path_factory.mktemp("foreign")
    official = {OFFICIAL.from_ours(name): tensor for name, tensor in tiny_state.items()}
    torch.save({"model": official, "optimizer": {"lr": 0.1}, "iteration": 3}, folder / "official.pth")
    mmdet = {MMDET.from_ours(name): tensor for name, tensor in with_counters(tiny_state).items()}
    for index, name in enumerate(mmdet):
        if name.endswith("num_batches_tracked"):
            mmdet[name] = torch.tensor(1000 + index)
    torch.save({"state_dict": mmdet, "meta": {"CLASSES": ("a", "b", "c")}}, folder / "mmdet.pth")
    return {"official": (folder / "official.pth", official), "mmdet": (folder / "mmdet.pth", mmdet)}


def state_in(path):
    content = torch.load(path, weights_only=True)
    return content.get("model") or content["state_dict"]


@pytest.mark.parametrize("family", ["official", "mmdet"])
def test_foreign_to_ours_and_back_is_lossless(family, files, tmp_path, assert_same, capsys):
    source, state = files[family]
    assert main([str(source), str(tmp_path / "own")]) == 0
    assert main([str(tmp_path / "own"), str(tmp_path / "back.pth"), "--to", family]) == 0
    assert_same(state_in(tmp_path / "back.pth"), state)
    assert read_checkpoint(tmp_path / "back.pth").config == read_checkpoint(source).config
    lines = capsys.readouterr().out.splitlines()
    shown = {"official": "official: ", "mmdet": "mmdetection: "}[family]
    assert lines[0] == f"{shown}resnet18, 5 proposals, 3 classes, 2 stages, {len(state)} tensors"
    assert lines[1] == f"wrote {tmp_path / 'own'} (safetensors)"
    assert lines[3] == f"wrote {tmp_path / 'back.pth'} ({family})"


def test_official_to_mmdet_and_back_is_lossless(files, tmp_path, assert_same, capsys):
    source, state = files["official"]
    assert main([str(source), str(tmp_path / "mmdet.pth"), "--to", "mmdet"]) == 0
    mmdet = state_in(tmp_path / "mmdet.pth")
    assert mmdet.keys() == files["mmdet"][1].keys()
    counters = {name for name in mmdet if name.endswith("num_batches_tracked")}
    assert len(counters) == 20
    assert all(mmdet[name].dtype == torch.int64 and mmdet[name].item() == 0 for name in counters)
    assert main([str(tmp_path / "mmdet.pth"), str(tmp_path / "official.pth"), "--to", "official"]) == 0
    assert_same(state_in(tmp_path / "official.pth"), state)
    assert read_checkpoint(tmp_path / "official.pth").config == read_checkpoint(source).config
    assert "note: the weights are for the detectron2 level rule, mmdet always uses its own" in capsys.readouterr().out


def test_mmdet_to_official_keeps_the_level_rule_for_us(files, tmp_path):
    source, state = files["mmdet"]
    assert main([str(source), str(tmp_path / "official.pth"), "--to", "official"]) == 0
    assert state_in(tmp_path / "official.pth").keys() == files["official"][1].keys()
    config, _ = load_pretrained(tmp_path / "official.pth")
    assert config.level_rule == "mmdet" and config.class_names == ("a", "b", "c")


def test_what_shapes_do_not_tell_survives(tmp_path):
    config = SparseRCNNConfig(
        backbone="resnet18", num_stages=1, hidden_dim=12, num_heads=3, dim_dynamic=2, dim_feedforward=8, min_size=320
    )
    model = SparseRCNN(config)
    for family in ("official", "mmdet"):
        path = export_checkpoint(config, model.state_dict(), tmp_path / f"{family}.pth", family)
        assert load_pretrained(path)[0] == config


def test_half_precision(files, tmp_path, assert_same):
    source, state = files["mmdet"]
    assert main([str(source), str(tmp_path / "own"), "--dtype", "float16"]) == 0
    assert main([str(tmp_path / "own"), str(tmp_path / "half.pth"), "--to", "mmdet"]) == 0
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert_same(state_in(tmp_path / "half.pth"), half)
    wanted = {MMDET.to_ours(name): tensor.float() for name, tensor in half.items() if tensor.is_floating_point()}
    assert_same(load_pretrained(tmp_path / "half.pth")[1], wanted)


def test_the_same_input_gives_the_same_bytes(files, tmp_path):
    for name in ("one.pth", "two.pth"):
        assert main([str(files["mmdet"][0]), str(tmp_path / name), "--to", "mmdet"]) == 0
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone": "efficientnet_lite0", "frozen_stages": 0}, "backbone: expected one of resnet18, resnet34"),
        ({"interaction": "concat"}, "interaction: expected 'dynamic' for official, got 'concat'"),
        ({"self_attention": False}, "self_attention: expected True for official, got False"),
        ({"classification": "softmax"}, "classification: expected 'focal' for official, got 'softmax'"),
    ],
)
def test_detectors_without_a_counterpart(change, message, tiny_config, tmp_path, capsys):
    config = tiny_config.replace(**change)
    save_pretrained(config, SparseRCNN(config).state_dict(), tmp_path / "own")
    assert main([str(tmp_path / "own"), str(tmp_path / "out.pth"), "--to", "official"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sparse_rcnn.convert: error: {message}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: IN, OUT"),
        (["IN", "out.pth", "--to", "onnx"], "argument --to: invalid choice: 'onnx'"),
        (["IN", "out", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["IN", "out", "--to", "official"], "OUT: expected a .pth file for --to official, got "),
        (["IN", "IN"], "OUT: expected a directory, "),
        (["missing.pth", "out"], "IN: expected a checkpoint, there is no "),
    ],
)
def test_bad_arguments(arguments, message, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(files["official"][0]) if argument == "IN" else argument for argument in arguments]
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sparse_rcnn.convert: error: {message}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failing_leaves_the_old_output(files, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.pth"
    output.write_text("mine")
    (tmp_path / "bad.pth").write_text("text")
    assert main([str(tmp_path / "bad.pth"), str(output), "--to", "official"]) == 1
    assert "bad.pth: expected a checkpoint" in capsys.readouterr().err

    save = torch.save

    def damaged(content, file):
        content["model"] = {**content["model"], "init_proposal_boxes.weight": torch.zeros(5, 4)}
        save(content, file)

    monkeypatch.setattr(torch, "save", damaged)
    assert main([str(files["official"][0]), str(output), "--to", "official"]) == 1
    assert "what was written does not read back: init_proposal_boxes.weight" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "out.pth"]
    assert output.read_text() == "mine"


def test_a_full_disk_is_one_line(files, tmp_path):
    """A limit on the size of files stands for the full disk."""
    for output, family in (("own", "safetensors"), ("out.pth", "mmdet")):
        program = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000));"
            "from sparse_rcnn.convert import main; sys.exit(main(sys.argv[1:]))"
        )
        arguments = [str(files["mmdet"][0]), str(tmp_path / output), "--to", family]
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 1, run.stderr
        assert run.stderr.startswith("sparse_rcnn.convert: error: ") and run.stderr.count("\n") == 1
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
