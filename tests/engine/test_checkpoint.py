from __future__ import annotations

import os
import pickle
import zipfile

import numpy
import pytest
import torch
from torch import nn

from sparse_rcnn.engine.checkpoint import load_checkpoint, load_finetune_weights, rng_state, save_checkpoint
from sparse_rcnn.weights.atomic import remove_leftovers
from tests.full_disk import files_of_at_most


def state(step: int) -> dict:
    return {
        "model": {"weight": torch.arange(4.0)},
        "ema": {},
        "optimizer": {},
        "step": step,
        "best_ap": 0.5,
        "skipped": [0.0, 2.0],
        "data": {"class_names": ("cat", "dog"), "names": "a.jpg", "digests": "0" * 16},
        "rng": rng_state(),
        "model_config": {"num_classes": 2},
        "train_config": {"decay_steps": (1, 2), "val": None},
    }


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "last.pt", state(7))
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded["format_version"] == 2 and loaded["data"] == state(7)["data"] and loaded["skipped"] == [0, 2]
    assert loaded["step"] == 7 and loaded["train_config"] == {"decay_steps": (1, 2), "val": None}
    assert torch.equal(loaded["model"]["weight"], torch.arange(4.0))
    assert torch.equal(loaded["rng"]["cpu"], torch.get_rng_state())


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_midway_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state(1))

    def fail(*args):
        if failing == "torch.save":
            args[1].write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")

    module, name = failing.split(".")
    with monkeypatch.context() as patch:
        patch.setattr({"torch": torch, "os": os}[module], name, fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, state(2))
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def write_version_1(path):
    old = {name: value for name, value in state(1).items() if name not in ("skipped", "data")}
    torch.save(old, path)


def write_flipped(path):
    save_checkpoint(path, state(1))
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(4.0).numpy().tobytes())
    content[place + 5] ^= 1
    path.write_bytes(content)


def write_cut(path, end):
    save_checkpoint(path, state(1))
    path.write_bytes(path.read_bytes()[:end])


# How a bad file comes about, and what is said after its name and "expected a training checkpoint".
BAD_FILES = {
    "missing": (lambda path: None, " (.safetensors, .pth, .pt, .pkl), there is no such file"),
    "folder": (lambda path: path.mkdir(), " (.safetensors, .pth, .pt, .pkl), it is not a file"),
    "empty": (lambda path: path.touch(), " (.safetensors, .pth, .pt, .pkl), the file is empty"),
    "text": (lambda path: path.write_text("step 5"), " (.safetensors, .pth, .pt, .pkl), cannot read it: "),
    "first bytes": (lambda path: write_cut(path, 10), " (.safetensors, .pth, .pt, .pkl), cannot read it: "),
    "first half": (lambda path: write_cut(path, 4000), " (.safetensors, .pth, .pt, .pkl), cannot read it: "),
    "all but the end": (lambda path: write_cut(path, -100), " (.safetensors, .pth, .pt, .pkl), cannot read it: "),
    "one bit": (write_flipped, ", it is damaged: "),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"step": 5})), " (.safetensors, .pth, .pt, .pkl), cannot"),
    "official": (
        lambda path: path.write_bytes(pickle.dumps({"model": {"head.x": numpy.ones(3)}, "matching_heuristics": True})),
        " (.safetensors, .pth, .pt, .pkl), cannot read it: ",
    ),
    "zip": (lambda path: zipfile.ZipFile(path, "w").close(), " (.safetensors, .pth, .pt, .pkl), cannot read it: "),
    "list": (lambda path: torch.save([1, 2], path), " (.safetensors, .pth, .pt, .pkl), it holds a list instead of"),
    "other trainer": (lambda path: torch.save({"model": {}, "iteration": 3}, path), ", it lacks optimizer, step, "),
    "version 1": (write_version_1, " of format version 2, got version 1: another release wrote it and can resume it; "),
    "newer": (
        lambda path: torch.save({**state(1), "format_version": 3}, path),
        " of format version 2, got version 3: ",
    ),
    "kinds": (lambda path: save_checkpoint(path, {**state(1), "step": "5"}), ", its step is a str instead of a int"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_in_one_line_with_what_was_expected(tmp_path, kind):
    write, message = BAD_FILES[kind]
    path = tmp_path / "last.pt"
    write(path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(f"{path}: expected a training checkpoint{message}")
    assert "\n" not in str(error.value)


class Hostile:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_pickled_code_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": Hostile(marker)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(ValueError, match="cannot read it"):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_file_that_cannot_grow_leaves_the_old_one(tmp_path, size):
    path = tmp_path / "last.pt"
    large = {**state(2), "model": {"weight": torch.ones(100_000)}}
    with pytest.raises(OSError) as error, files_of_at_most(size):
        save_checkpoint(path, large)
    assert str(error.value) == f"{path}: cannot write the checkpoint (File too large); there is none before"
    save_checkpoint(path, state(1))
    with pytest.raises(OSError) as error, files_of_at_most(size):
        save_checkpoint(path, large)
    assert str(error.value) == f"{path}: cannot write the checkpoint (File too large); the one before is as it was"
    assert load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_an_error_that_is_not_of_the_disk_stays_what_it_is(tmp_path):
    class Unwilling:
        def __reduce__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="^no$"):
        save_checkpoint(tmp_path / "last.pt", {**state(1), "model": Unwilling()})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in (".last.tmp.pt", ".model.tmp.safetensors", ".other.tmp", ".hidden", "a.tmp", "last.pt"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.tmp", "last.pt"]


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.tower = nn.Linear(3, 3)
        self.stage = nn.Module()
        self.stage.class_logits = nn.Linear(3, classes)


def test_fine_tuning_keeps_the_new_class_layer_and_loads_the_rest():
    source, model = Classifier(5), Classifier(2)
    fresh_weight = model.stage.class_logits.weight.detach().clone()
    fresh = load_finetune_weights(model, source.state_dict(), reset_classes=True)
    assert fresh == ["stage.class_logits.weight", "stage.class_logits.bias"]
    assert torch.equal(model.stage.class_logits.weight, fresh_weight)
    assert torch.equal(model.tower.weight, source.tower.weight)


def test_the_same_classes_are_loaded():
    source, model = Classifier(2), Classifier(2)
    assert load_finetune_weights(model, source.state_dict(), reset_classes=False) == []
    assert torch.equal(model.stage.class_logits.weight, source.stage.class_logits.weight)


def test_everything_else_must_fit_and_each_misfit_is_listed():
    model = Classifier(2)
    before = model.tower.bias.detach().clone()
    given = {"tower.weight": torch.zeros(4, 3), "tower.bias": torch.ones(3), "extra": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_finetune_weights(model, given, reset_classes=False)
    for part in (
        "missing stage.class_logits.weight",
        "missing stage.class_logits.bias",
        "unexpected extra",
        "tower.weight: expected shape (3, 3), got (4, 3)",
    ):
        assert part in str(error.value)
    assert torch.equal(model.tower.bias, before)
