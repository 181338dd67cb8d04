from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from sparse_rcnn import SparseRCNN
from sparse_rcnn.engine import step as step_module
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.trainer import Trainer, TrainingError


def log_of(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(run) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in log_of(run)]


def assert_same(a, b, path="") -> None:
    """Bit-equality of nested dicts, lists and tensors."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{index}")
    else:
        assert a == b, path


def test_what_a_run_leaves_behind(tiny_config, scenes, capsys):
    config = tiny_config(val=str(scenes), steps=3, eval_every=2, checkpoint_every=2)
    trainer = Trainer(config)
    assert trainer.run() is None
    run = Path(config.output)
    records = log_of(run)
    assert [(r["kind"], r["step"]) for r in records] == [
        *(("train", 1), ("train", 2), ("val", 2)),
        *(("train", 3), ("val", 3)),
    ]
    train, val = records[0], records[2]
    losses = {f"loss_{kind}{stage}" for kind in ("ce", "bbox", "giou") for stage in ("", "_0")}
    assert losses <= train.keys()
    assert train["loss"] == pytest.approx(sum(train[name] for name in losses), abs=1e-4)
    assert train["lr"] == pytest.approx(1e-3 * 0.01) and records[1]["lr"] == pytest.approx(1e-3 * (0.01 * 0.75 + 0.25))
    assert train["grad_norm"] > 0 and train["images_per_second"] > 0
    assert 0 <= val["AP"] <= 1 and set(val["per_class"]) == set(trainer.dataset.class_names)

    saved = SparseRCNN.from_pretrained(run / "model")
    assert saved.config == trainer.model.config and saved.config.class_names == tuple(trainer.dataset.class_names)
    assert_same(dict(saved.state_dict()), dict(trainer.model.state_dict()))
    best = load_checkpoint(run / "last.pt")["best_ap"]
    assert best == max(r["AP"] for r in records if r["kind"] == "val")
    assert (run / "best").is_dir()
    assert "data: 6 images" in capsys.readouterr().out


def test_training_goes_down_on_two_images(tiny_config, scenes, tmp_path):
    content = json.loads((scenes / "train.json").read_text(encoding="utf-8"))
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in annotated][:2]
    ids = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    data = tmp_path / "two"
    data.mkdir()
    (data / "train.json").write_text(json.dumps(content), encoding="utf-8")
    (data / "train").symlink_to(scenes / "train")
    Trainer(tiny_config(data=str(data), steps=30, flip=0.0, min_sizes=(64,), log_every=5)).run()
    losses = [record["loss"] for record in log_of(tmp_path / "run")]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]


def in_steps(trainer: Trainer, steps, change) -> None:
    """Let ``change(losses)`` have the losses of some steps; what it returns, if anything, takes their place."""
    count = 0

    def hook(module, arguments, losses):
        nonlocal count
        count += 1
        return change(losses) if count in steps else None

    trainer.model.criterion.register_forward_hook(hook)


def poison(losses):
    return {**losses, "loss_giou_0": losses["loss_giou_0"] * math.nan}


def ids_of_batches(trainer: Trainer, monkeypatch) -> list[str]:
    """The image ids of each batch from now on, as messages show them."""
    seen = []
    prepare = trainer.model.prepare

    def watched(images, targets, *shape):
        seen.append(", ".join(str(target["image_id"]) for target in targets))
        return prepare(images, targets, *shape)

    monkeypatch.setattr(trainer.model, "prepare", watched)
    return seen


def test_five_steps_in_a_row_that_are_not_finite_stop_and_keep_the_checkpoint(tiny_config, tmp_path, monkeypatch):
    trainer = Trainer(tiny_config(checkpoint_every=2, steps=12))
    ids = ids_of_batches(trainer, monkeypatch)
    in_steps(trainer, {1, 3, 4, 5, 6, 7}, poison)
    with pytest.raises(TrainingError) as raised:
        trainer.run()
    kept = f"{tmp_path / 'run' / 'last.pt'} is as it was"
    last = "; ".join(f"step {step}, image ids {ids[step - 1]}" for step in range(3, 8))
    assert str(raised.value) == (
        f"step 7, image ids {ids[6]}: loss_giou_0 is nan; 5 steps in a row and 6 in all were not finite; {kept}. "
        f"The last of them: {last}. A lower lr or a longer warm-up may help"
    )
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["step"] == 6 and checkpoint["skipped"] == [4, 5]
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    records = log_of(tmp_path / "run")
    assert [(record["kind"], record["step"]) for record in records] == [
        *(("skipped", 1), ("train", 2), ("skipped", 3), ("skipped", 4), ("skipped", 5), ("skipped", 6), ("skipped", 7)),
    ]
    assert records[2]["problem"] == "loss_giou_0 is nan"
    assert ", ".join(str(image_id) for image_id in records[2]["image_ids"]) == ids[2]


def test_a_step_that_is_not_finite_is_skipped_and_said(tiny_config, tmp_path, monkeypatch, capsys):
    trainer = Trainer(tiny_config(log_every=3))
    ids = ids_of_batches(trainer, monkeypatch)
    before = {}

    def remember(losses):
        before.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return poison(losses)

    in_steps(trainer, {4}, remember)
    in_steps(trainer, {5}, lambda losses: assert_same(before, dict(trainer.model.state_dict())))
    trainer.run()
    assert f"warning: step 4, image ids {ids[3]}: loss_giou_0 is nan; the step is skipped\n" in capsys.readouterr().out
    records = log_of(tmp_path / "run")
    assert [(record["kind"], record["step"]) for record in records] == [("train", 3), ("skipped", 4), ("train", 6)]
    assert all(math.isfinite(record["loss"]) for record in records[::2])
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (checkpoint["step"], checkpoint["skipped"]) == (6, [0, 1])
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {5}
    assert not all(torch.equal(value, before[name]) for name, value in checkpoint["model"].items())


def test_steps_that_are_not_finite_resume_exactly(tiny_config, tmp_path):
    """The last of four in a row is the first of the resumed part; the fifth ends either run."""
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    messages = []
    for output, stops in ((whole, [10]), (parts, [5, 10])):
        for stop in stops:
            trainer = Trainer(tiny_config(output=output, steps=stop, checkpoint_every=5, resume=stop != stops[0]))
            in_steps(trainer, {step - trainer.step for step in (3, 4, 5, 6, 7)}, poison)
            if stop == 10:
                with pytest.raises(TrainingError) as raised:
                    trainer.run()
                messages.append(str(raised.value).split(";")[:2])
            else:
                trainer.run()
    assert messages[0] == messages[1] and "5 steps in a row" in messages[0][1]
    first, second = load_checkpoint(f"{whole}/last.pt"), load_checkpoint(f"{parts}/last.pt")
    for key in ("model", "optimizer", "skipped", "step"):
        assert_same(first[key], second[key], key)
    assert timeless(whole) == timeless(parts) and len(timeless(whole)) == 7


class Late:
    """The ``Event`` of a copy that is there only once it is waited for, as on a GPU that lags behind."""

    waits = 0

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        Late.waits += 1


@pytest.fixture
def late_reports(monkeypatch):
    monkeypatch.setattr(Late, "waits", 0)
    monkeypatch.setattr(step_module, "to_host", lambda values: (values.clone(), Late()))


# What first makes the host sure of all steps: the end, a log record, a checkpoint, an evaluation.
BOUNDARIES = {
    "end": {"log_every": 100, "checkpoint_every": 0},
    "log": {"log_every": 8, "checkpoint_every": 0},
    "checkpoint": {"log_every": 100, "checkpoint_every": 8},
    "evaluation": {"log_every": 100, "checkpoint_every": 0, "eval_every": 8},
}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_too_many_bad_steps_found_later_are_named_and_nothing_is_written(
    tiny_config, scenes, tmp_path, late_reports, monkeypatch, boundary
):
    changes = {**BOUNDARIES[boundary], "val": str(scenes) if boundary == "evaluation" else None}
    trainer = Trainer(tiny_config(steps=10, **changes))
    in_steps(trainer, {2, 3, 4, 5, 6}, poison)
    ids = ids_of_batches(trainer, monkeypatch)
    with pytest.raises(TrainingError) as raised:
        trainer.run()
    counts = "5 steps in a row and 5 in all were not finite"
    assert str(raised.value).startswith(
        f"step 6, image ids {ids[5]}: loss_giou_0 is nan; {counts}; there is no checkpoint yet. "
    )
    assert len(ids) == (10 if boundary == "end" else 8), "the host looked later than the step"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data_report.txt", "metrics.jsonl"]
    assert {record["kind"] for record in log_of(tmp_path / "run")} == {"skipped"}


def test_late_reports_make_the_same_log_and_the_same_model(tiny_config, tmp_path, monkeypatch, request):
    at_once, late = str(tmp_path / "at_once"), str(tmp_path / "late")
    Trainer(tiny_config(output=at_once, log_every=4)).run()
    request.getfixturevalue("late_reports")
    Trainer(tiny_config(output=late, log_every=4)).run()
    assert Late.waits == 6
    assert timeless(at_once) == timeless(late)
    assert [record["step"] for record in timeless(late)] == [4, 6]
    first, second = load_checkpoint(f"{at_once}/last.pt"), load_checkpoint(f"{late}/last.pt")
    for key in ("model", "optimizer", "rng"):
        assert_same(first[key], second[key], key)


def test_targets_that_the_model_refuses_stop_with_the_step_and_the_images(tiny_config):
    trainer = Trainer(tiny_config())
    targets = [{"boxes": torch.tensor([[5.0, 5, 4, 9]]), "labels": torch.tensor([0]), "image_id": 7}]
    message = r"^step 1, image ids 7: targets\[0\]\.boxes: expected x1 < x2 .*; there is no checkpoint yet$"
    with pytest.raises(TrainingError, match=message):
        trainer.train_step([torch.zeros(3, 32, 32)], targets)


def test_predictions_that_are_not_finite_stop_with_the_step_and_the_images(tiny_config):
    trainer = Trainer(tiny_config())
    with torch.no_grad():
        trainer.model.init_proposal_features.weight.fill_(math.inf)
    with pytest.raises(TrainingError, match=r"step 5, image ids \d+, \d+: loss_.* is nan.*there is no checkpoint yet"):
        trainer.run()


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_config):
    trainer = Trainer(tiny_config())
    trainer.model.init_proposal_features.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match="gradient norm is (nan|inf)"):
        trainer.run()
    assert_same(before, dict(trainer.model.state_dict()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tiny_config, tmp_path, number):
    before = signal.getsignal(number)
    trainer = Trainer(tiny_config(checkpoint_every=0))
    in_steps(trainer, {2}, lambda losses: os.kill(os.getpid(), number))
    assert trainer.run() == number
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
    assert signal.getsignal(number) is before


def test_the_time_limit_ends_with_a_checkpoint(tiny_config, tmp_path, capsys):
    assert Trainer(tiny_config(time_limit=0)).run() is None
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1
    assert "time limit" in capsys.readouterr().out


def test_a_run_is_not_overwritten(tiny_config):
    Trainer(tiny_config(steps=1)).run()
    with pytest.raises(ValueError, match=r"output: .*last\.pt exists; pass --resume"):
        Trainer(tiny_config(steps=1))


def test_resuming_a_finished_run_changes_nothing(tiny_config, tmp_path):
    Trainer(tiny_config(steps=2)).run()
    before = (tmp_path / "run" / "last.pt").read_bytes()
    Trainer(tiny_config(steps=2, resume=True)).run()
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resuming_takes_the_new_learning_rate_and_keeps_the_moments(tiny_config):
    Trainer(tiny_config(steps=2)).run()
    trainer = Trainer(tiny_config(resume=True, lr=5e-4, weight_decay=0.5))
    assert {group["base_lr"] for group in trainer.optimizer.param_groups} == {5e-4}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5}
    assert trainer.step == 2 and max(float(state["step"]) for state in trainer.optimizer.state.values()) == 2


def test_bfloat16_autocast_keeps_float32_weights(tiny_config, tmp_path):
    trainer = Trainer(tiny_config(dtype="bfloat16", steps=2))
    trainer.run()
    assert {value.dtype for value in trainer.model.state_dict().values()} == {torch.float32}
    assert all(math.isfinite(record["loss"]) for record in log_of(tmp_path / "run"))


def test_frozen_stages_stay_and_the_rest_moves(tiny_config):
    config = tiny_config(steps=1)
    trainer = Trainer(TrainConfig(**{**vars(config), "set": {**config.set, "frozen_stages": 2}}))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run()
    after = trainer.model.state_dict()
    frozen = [name for name in after if name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))]
    assert len(frozen) > 4 and all(torch.equal(before[name], after[name]) for name in frozen)
    for name in ("backbone.body.layer2.0.conv1.weight", "backbone.fpn.layer_blocks.0.0.weight"):
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, got -1"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"lr": math.inf}, "lr: expected a positive number"),
        ({"flip": 1.5}, "flip: expected a probability"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16, got 'float16'"),
        ({"min_sizes": ()}, "min_sizes: expected positive sizes"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
