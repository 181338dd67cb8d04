from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.weights import check_state_dict, load_pretrained, read_checkpoint, read_config, save_pretrained
from sparse_rcnn.weights.mmdet import KEYS as MMDET
from sparse_rcnn.weights.mmdet import with_counters
from sparse_rcnn.weights.official import KEYS as OFFICIAL


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory, tiny_config, tiny_state):
    return save_pretrained(tiny_config, tiny_state, tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module")
def shapes(tiny_state):
    """The tiny detector's names and shapes as tensors that take no room in a file."""
    return {name: torch.ones(()).expand(tensor.shape) for name, tensor in tiny_state.items()}


def official(state):
    return {OFFICIAL.from_ours(name): tensor for name, tensor in state.items()}


def mmdet(state):
    return {MMDET.from_ours(name): tensor for name, tensor in with_counters(state).items()}


def test_own_format_gives_back_configuration_and_tensors(tiny_directory, tiny_config, tiny_state, assert_same):
    assert sorted(path.name for path in tiny_directory.iterdir()) == ["config.json", "model.safetensors"]
    for path in (tiny_directory, tiny_directory / "model.safetensors", str(tiny_directory)):
        config, state = load_pretrained(path)
        assert config == tiny_config
        assert_same(state, tiny_state)
    with safe_open(tiny_directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"config": (tiny_directory / "config.json").read_text()}
    assert (tiny_directory / "model.safetensors").stat().st_mode == (tiny_directory / "config.json").stat().st_mode


def test_config_json_is_readable_and_versioned(tiny_directory, tiny_config):
    text = (tiny_directory / "config.json").read_text()
    values = json.loads(text)
    assert list(values)[0] == "format_version" and values.pop("format_version") == 1
    assert values == json.loads(json.dumps(tiny_config.to_dict()))
    assert len(text.splitlines()) > len(values)
    assert read_config(tiny_directory / "config.json") == tiny_config


def test_half_storage_loads_as_float32(tmp_path, tiny_config, tiny_state, assert_same):
    save_pretrained(tiny_config, tiny_state, tmp_path, dtype=torch.float16)
    stored = read_checkpoint(tmp_path).state_dict
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert_same(load_pretrained(tmp_path)[1], {name: tensor.half().float() for name, tensor in tiny_state.items()})
    with pytest.raises(ValueError, match="dtype: expected a floating point type, got torch.int8"):
        save_pretrained(tiny_config, tiny_state, tmp_path, dtype=torch.int8)


def test_model_saves_and_loads(tmp_path, tiny_config, tiny_state):
    model = SparseRCNN(tiny_config)
    model.save_pretrained(tmp_path)
    loaded = SparseRCNN.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == tiny_config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_timm_detector_saves_and_loads(tmp_path, assert_same):
    config = SparseRCNNConfig.preset("small", num_stages=1, num_classes=2)
    state = SparseRCNN(config).state_dict()
    save_pretrained(config, state, tmp_path)
    loaded_config, loaded = load_pretrained(tmp_path)
    assert loaded_config == config
    assert_same(loaded, state)


def test_shared_and_strided_tensors_are_saved_by_value(tmp_path, tiny_config, shapes):
    state = dict(shapes)
    state["head.stages.0.linear1.weight"] = torch.arange(16 * 24.0).view(16, 24).t()
    state["head.stages.0.norm1.weight"] = state["head.stages.0.norm2.weight"] = torch.arange(32.0)[::2]
    save_pretrained(tiny_config, state, tmp_path)
    loaded = load_pretrained(tmp_path)[1]
    for name in ("linear1.weight", "norm1.weight", "norm2.weight", "norm3.weight"):
        assert torch.equal(loaded[f"head.stages.0.{name}"], state[f"head.stages.0.{name}"])


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("to_family, family", [(official, "official"), (mmdet, "mmdet")])
def test_foreign_checkpoint_is_recognised_by_its_keys(
    tmp_path, tiny_config, tiny_state, assert_same, to_family, family, bare
):
    foreign = to_family(tiny_state)
    container = {"model" if family == "official" else "state_dict": foreign, "iteration": 7, "optimizer": {"state": {}}}
    torch.save(foreign if bare else container, tmp_path / "weights.pth")
    config, state = load_pretrained(tmp_path / "weights.pth")
    differing = {"level_rule": "mmdet", "delta_clamp": (-math.log(62.5), math.log(62.5))} if family == "mmdet" else {}
    assert config == tiny_config.replace(**differing)
    assert_same(state, tiny_state)
    assert read_checkpoint(tmp_path / "weights.pth").family == family


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_depth_is_inferred(tmp_path, tiny_config, backbone):
    config = tiny_config.replace(backbone=backbone, num_cls_layers=0, num_reg_layers=4)
    with torch.device("meta"):
        state = SparseRCNN(config).state_dict()
    state = {name: torch.ones(()).expand(tensor.shape) for name, tensor in state.items()}
    torch.save({"model": official(state)}, tmp_path / "weights.pth")
    assert load_pretrained(tmp_path / "weights.pth")[0] == config


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2_pickle(tmp_path, tiny_config, tiny_state, assert_same, protocol):
    arrays = {name: tensor.numpy() for name, tensor in official(tiny_state).items()}
    content = {"model": arrays, "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    config, state = load_pretrained(tmp_path / "weights.pkl")
    assert config == tiny_config
    assert_same(state, tiny_state)


def test_class_names_of_mmdet_meta(tmp_path, shapes):
    for meta, names in [
        ({"dataset_meta": {"CLASSES": ("a", "b", "c")}}, ("a", "b", "c")),
        ({"CLASSES": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"CLASSES": ["a", "b"]}, None),
    ]:
        torch.save({"state_dict": mmdet(shapes), "meta": meta}, tmp_path / "weights.pth")
        assert load_pretrained(tmp_path / "weights.pth")[0].class_names == names


def test_training_checkpoint_loads_with_its_own_configuration(tmp_path, tiny_config, shapes):
    config = tiny_config.replace(num_heads=4, class_names=("a", "b", "c"))
    torch.save({"model": shapes, "model_config": config.to_dict(), "step": 3}, tmp_path / "last.pt")
    assert load_pretrained(tmp_path / "last.pt")[0] == config
    torch.save({"model": shapes, "step": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt: expected 'model_config'"):
        load_pretrained(tmp_path / "last.pt")


@pytest.mark.parametrize("to_family", [official, mmdet])
def test_every_wrong_tensor_is_listed_under_the_name_in_the_file(tmp_path, shapes, to_family):
    foreign = to_family(shapes)
    names = list(foreign)
    rename = OFFICIAL if to_family is official else MMDET
    missing = [rename.from_ours(f"head.stages.{name}") for name in ("0.norm1.weight", "1.linear2.bias")]
    missing += [name for name in names if "stages.1.class_logits.weight" in rename.to_ours(name)]
    for name in missing:
        del foreign[name]
    foreign["head.extra.weight"] = foreign["another"] = torch.zeros(2)
    wrong = rename.from_ours("init_proposal_features.weight")
    foreign[wrong] = torch.zeros(5, 17)
    integer = rename.from_ours("backbone.body.conv1.weight")
    foreign[integer] = foreign[integer].long()
    torch.save({"model": foreign}, tmp_path / "weights.pth")
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "weights.pth")
    message = str(error.value)
    assert str(tmp_path / "weights.pth") in message and "\n" not in message
    for name in missing:
        assert f"missing {name}" in message
    assert "unexpected head.extra.weight" in message and "unexpected another" in message
    assert f"{wrong}: expected shape [5, 16], got [5, 17]" in message
    assert f"{integer}: expected a kind of torch.float32, got torch.int64" in message
    assert message.count(";") == len(missing) + 3


def test_own_files_with_other_tensors_are_refused(tmp_path, tiny_config, tiny_directory, tiny_state):
    (tmp_path / "model.safetensors").hardlink_to(tiny_directory / "model.safetensors")
    config = {"format_version": 1, **tiny_config.replace(num_classes=4).to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"stages.1.class_logits.bias: expected shape \[4\], got \[3\]"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing head.stages.0.norm1.bias"):
        check_state_dict(tiny_config, {k: v for k, v in tiny_state.items() if k != "head.stages.0.norm1.bias"}, "x")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected the JSON"),
        ("{", "expected the JSON"),
        ("[" * 100_000, "expected the JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected format_version 1, got None"),
        ('{"format_version": 2}', "expected format_version 1, got 2"),
        ('{"format_version": 1, "colour": 3}', "unknown fields colour"),
        ('{"format_version": 1, "num_stages": 0}', "num_stages: expected an integer >= 1, got 0"),
        ('{"format_version": 1, "num_stages": 999999999999}', "num_stages 999999999999 in a file of"),
        ('{"format_version": 1, "hidden_dim": 80000000000000000000}', "no detector can be built"),
        ('{"format_version": 1, "backbone": "../../x"}', "no detector can be built"),
        ('{"format_version": 1, "pixel_mean": 3}', "config"),
    ],
)
def test_bad_config_json(tmp_path, tiny_directory, text, message):
    (tmp_path / "model.safetensors").hardlink_to(tiny_directory / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_without_config_json_the_weights_have_their_own(tmp_path, tiny_directory, tiny_config, assert_same):
    (tmp_path / "model.safetensors").hardlink_to(tiny_directory / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        config, state = load_pretrained(path)
        assert config == tiny_config
        assert_same(state, load_pretrained(tiny_directory)[1])


def test_a_config_json_that_was_edited_counts(tmp_path, tiny_config, tiny_state):
    save_pretrained(tiny_config, tiny_state, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"min_size": ' + str(tiny_config.min_size), '"min_size": 97'))
    assert load_pretrained(tmp_path)[0] == tiny_config.replace(min_size=97)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 9}', '{"format_version": 1, "num_classes": -1}'])
def test_a_bad_configuration_in_the_weights_is_refused(tmp_path, tiny_state, text):
    save_file(tiny_state, tmp_path / "model.safetensors", metadata={"config": text})
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_pretrained(tmp_path)


def test_missing_config_json(tmp_path, tiny_state):
    save_file(tiny_state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config.json: expected the JSON"):
        load_pretrained(tmp_path / "model.safetensors")


def test_equal_models_give_equal_files(tmp_path, tiny_config, tiny_state):
    first, second = (save_pretrained(tiny_config, tiny_state, tmp_path / name) for name in "ab")
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


class Killed(BaseException):
    pass


def test_a_folder_is_the_old_model_or_the_new_one_at_every_moment(tmp_path, tiny_config, monkeypatch, assert_same):
    """Ends the second save before each of its operations on names, and loads what there is."""
    config = tiny_config.replace(backbone="lcnet_035")  # small files
    other = config.replace(class_names=("c", "b", "a"))
    models = {name: (each, SparseRCNN(each).state_dict()) for name, each in (("old", config), ("new", other))}
    seen = []
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        save_pretrained(*models["old"], folder)
        count = 0

        def count_down(function, *arguments, moment=moment, **options):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return function(*arguments, **options)

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "unlink"), (os, "fsync")):
                patch.setattr(owner, name, functools.partial(count_down, getattr(owner, name)))
            patch.setattr(Path, "unlink", lambda path, missing_ok=False: path.exists() and os.unlink(path))
            with contextlib.suppress(Killed):
                save_pretrained(*models["new"], folder)
        loaded, state = load_pretrained(folder)
        found = next(name for name, model in models.items() if loaded == model[0])
        assert_same(state, models[found][1])
        seen.append(found)
        if count <= moment:
            break
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"} and len(seen) > 6


def test_failed_save_leaves_the_old_files(tmp_path, tiny_config, tiny_state, shapes, monkeypatch):
    save_pretrained(tiny_config, tiny_state, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("sparse_rcnn.weights.pretrained.save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(tiny_config, shapes, tmp_path)
    with pytest.raises(ValueError, match="missing init_proposal_boxes.weight"):
        save_pretrained(tiny_config, {k: v for k, v in shapes.items() if k != "init_proposal_boxes.weight"}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_a_file_is_refused(tmp_path, tiny_config, shapes):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="expected a directory to save to, got a file"):
        save_pretrained(tiny_config, shapes, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_what_does_not_read_back_is_not_kept(tmp_path, tiny_config, shapes, monkeypatch):
    def damaged(tensors, path, metadata):
        save_file({**tensors, "head.stages.1.norm3.bias": torch.zeros(16)}, path, metadata)

    monkeypatch.setattr("sparse_rcnn.weights.pretrained.save_file", damaged)
    with pytest.raises(OSError, match="does not read back: head.stages.1.norm3.bias"):
        save_pretrained(tiny_config, shapes, tmp_path)
    assert list(tmp_path.iterdir()) == []
