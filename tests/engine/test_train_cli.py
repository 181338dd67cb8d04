from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest

from sparse_rcnn import evaluate, train
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.step import TrainStep

QUICK = ["--backbone", "resnet18", "--backbone-weights", "none", "--steps", "2", "--batch-size", "1", "--device", "cpu"]
SET = ["--set", "num_stages=2", "num_proposals=10", "hidden_dim=32", "num_heads=4", "min_size=64", "max-size=96"]


@pytest.fixture
def run(scenes, tmp_path):
    """Calls ``train`` on the scenes; gives (exit code, output folder)."""

    def call(*more) -> int:
        return train.main(["--data", str(scenes), "--output", str(tmp_path / "run"), *QUICK, *SET, *more])

    return call


def one_line_error(capsys, command) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"sparse_rcnn.{command}: error: ") and "\n" not in error
    return error


def test_every_field_is_a_flag_with_the_default_of_the_dataclass():
    flags = {action.dest for action in train.build_parser()._actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(TrainConfig)}
    config = train.config_from_flags(vars(train.build_parser().parse_args(["--data", "d", "--output", "o"])))
    assert config == TrainConfig(data="d", output="o")


def test_flags_are_typed():
    arguments = "--data d --output o --steps 7 --lr 3e-4 --decay-steps 4 6 --min-sizes 64 80 --max-size 96 --crop"
    arguments += " --set a=1 b=x --set c=[1,2] --time-limit 1.5 --val v --no-resume"
    config = train.config_from_flags(vars(train.build_parser().parse_args(arguments.split())))
    assert config == TrainConfig(
        **{"data": "d", "output": "o", "steps": 7, "lr": 3e-4, "decay_steps": (4, 6), "min_sizes": (64, 80)},
        **{"max_size": 96, "crop": True, "set": {"a": "1", "b": "x", "c": "[1,2]"}, "time_limit": 1.5, "val": "v"},
    )


def test_train_resume_and_evaluate(run, scenes, tmp_path, capsys):
    assert run() == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["model_config"]["max_size"] == 96
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert load_checkpoint(tmp_path / "run" / "last.pt")["train_config"]["batch_size"] == 1
    capsys.readouterr()

    files = [tmp_path / name for name in ("metrics.json", "detections.json")]
    arguments = ["--data", str(scenes), "--weights", str(tmp_path / "run" / "model"), "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(files[0]), "--detections", str(files[1])]) == 0
    printed = capsys.readouterr().out
    metrics, detections = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert list(metrics["metrics"]) == names
    table = dict(line.split() for line in printed.split("\n\n")[0].splitlines())
    assert {name: float(value) for name, value in table.items()} == {
        name: pytest.approx(metrics["metrics"][name], abs=5e-5) for name in names
    }
    assert len(detections) == metrics["num_detections"] > 0
    assert detections[0].keys() == {"image_id", "category_id", "bbox", "score"}
    for name in metrics["per_class"]:
        assert f"\n{name} " in printed


def test_what_a_run_is_made_of_cannot_change_on_resume(run, tmp_path, capsys):
    assert run() == 0
    capsys.readouterr()
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--batch-size", "4"]) == 2
    assert "--batch-size: the run was started with 1, got 4" in one_line_error(capsys, "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "o"], "--data: expected a folder or file"),
        (["--data", "d"], "--output: expected a folder"),
        (["--data", "absent", "--output", "o"], "absent"),
        (["--data", "d", "--output", "o", "--lr", "0"], "lr: expected a positive number, got 0.0"),
        (["--data", "empty.json", "--output", "o"], "data: expected at least one image, got none in empty.json"),
        (["--output", "absent", "--resume"], "absent/last.pt: expected a training checkpoint, found no such file"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "empty.json").write_text(json.dumps(empty), encoding="utf-8")
    assert train.main(arguments) == 2
    assert message in one_line_error(capsys, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.json"]  # nothing is left behind


@pytest.mark.parametrize(
    ("main", "name", "arguments"),
    [
        (train.main, "train", ["--steps", "many"]),
        (train.main, "train", ["--stepz", "3"]),
        (train.main, "train", ["--set", "num_proposals"]),
        (evaluate.main, "evaluate", ["--data", "d"]),
    ],
)
def test_flags_that_do_not_parse_are_one_line_and_exit_2(main, name, arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    one_line_error(capsys, name)


def test_a_cuda_graph_needs_a_gpu(run, tmp_path, capsys):
    assert run("--cuda-graph") == 2
    assert "cuda_graph: expected a CUDA device, got cpu" in one_line_error(capsys, "train")
    assert not (tmp_path / "run").exists()


def test_a_training_image_that_cannot_be_read_is_named_and_exits_1(write_coco, tmp_path, capsys):
    folder = write_coco({1: (64, 64)}, {1: "cat"}, [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 30, 30]}])
    path = folder / "valid" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])  # a good header
    output = str(tmp_path / "run")
    code = train.main(["--data", str(folder / "valid.json"), "--output", output, *QUICK, *SET])
    assert code == 1
    assert "1.png" in one_line_error(capsys, "train")


def test_a_full_disk_exits_1_and_keeps_the_checkpoint(run, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    assert run() == 0
    capsys.readouterr()
    last = tmp_path / "run" / "last.pt"
    size, limits = last.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # the log has room, and model/ too
    try:
        assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = f"{last}: cannot write the checkpoint (File too large); the one before is as it was"
    assert one_line_error(capsys, "train") == f"sparse_rcnn.train: error: {message}"
    assert load_checkpoint(last)["step"] == 2
    assert train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "3"]) == 0
    assert load_checkpoint(last)["step"] == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_only_an_interrupt_is_a_failure(run, tmp_path, monkeypatch, number, code):
    step = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda *arguments: (step(*arguments), os.kill(os.getpid(), number)))
    assert run("--checkpoint-every", "0") == code
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


def test_a_time_limit_is_no_failure(run, tmp_path):
    assert run("--time-limit", "0", "--checkpoint-every", "0") == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


def test_a_damaged_checkpoint_is_one_line_and_exits_2(run, tmp_path, capsys):
    assert run() == 0
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    assert train.main(["--output", str(tmp_path / "run"), "--resume"]) == 2
    error = one_line_error(capsys, "train")
    assert error.startswith(f"sparse_rcnn.train: error: {last}: expected a training checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent", "--weights", "w"], "absent"),
        (["--data", "{scenes}", "--weights", "absent"], "absent"),
        (["--data", "{scenes}", "--weights", "w", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--data", "{scenes}", "--weights", "w", "--device", "gpu"], "device: expected one that is here, got 'gpu'"),
    ],
)
def test_evaluate_says_what_is_wrong_and_exits_2(arguments, message, scenes, capsys):
    assert evaluate.main([argument.format(scenes=scenes) for argument in arguments]) == 2
    assert message in one_line_error(capsys, "evaluate")


def test_evaluate_exits_1_on_an_unreadable_image_after_the_table(run, write_coco, tmp_path, capsys):
    assert run() == 0
    folder = write_coco(
        {1: (64, 64), 2: (64, 64)},
        {1: "cube"},
        [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 30, 30]}],
    )
    (folder / "valid" / "2.png").write_bytes(b"no picture")
    capsys.readouterr()
    arguments = ["--data", str(folder), "--weights", str(tmp_path / "run" / "model"), "--device", "cpu"]
    assert evaluate.main(arguments) == 1
    captured = capsys.readouterr()
    assert "AP50" in captured.out and "cube" in captured.out
    *named, summary = captured.err.strip().splitlines()
    assert len(named) == 1 and "2.png" in named[0]
    assert summary == "sparse_rcnn.evaluate: error: 1 of 2 images could not be read; they count as empty"
