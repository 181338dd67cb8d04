from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch import nn

from sparse_rcnn.engine.checkpoint import load_checkpoint, load_finetune_weights, rng_state, save_checkpoint


def state(step: int) -> dict:
    return {
        "model": {"weight": torch.arange(4.0)},
        "optimizer": {},
        "step": step,
        "best_ap": 0.5,
        "rng": rng_state(),
        "model_config": {"num_classes": 2},
        "train_config": {"decay_steps": (1, 2), "val": None},
    }


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "last.pt", state(7))
    loaded = load_checkpoint(tmp_path / "last.pt")
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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"last\.pt: expected a training checkpoint, found no such file"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("cut", [0, 10, 500, -100])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state(1))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"last\.pt: expected a training checkpoint"):
        load_checkpoint(path)


def test_a_foreign_checkpoint_is_refused_with_what_it_lacks(tmp_path):
    torch.save({"model": {}, "iteration": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="lacks optimizer, step"):
        load_checkpoint(tmp_path / "last.pt")
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(ValueError, match="lacks model"):
        load_checkpoint(tmp_path / "last.pt")


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
        with pytest.raises(ValueError, match="could not read it"):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


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
