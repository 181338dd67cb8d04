from __future__ import annotations

import pytest

from sparse_rcnn import SparseRCNNConfig
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.schedule import resolve

PAPER = {"epochs": 36, "base_lr": 2.5e-5, "decay_at": (0.777778, 0.925926)}
R50, SMALL = SparseRCNNConfig.preset("r50_100"), SparseRCNNConfig.preset("small")


def resolved(batch: int, model: SparseRCNNConfig = R50, num_images: int = 120_000, **fields):
    return resolve(TrainConfig(data="d", output="o", batch_size=batch, **fields), model, num_images)


def test_the_paper_s_recipe_is_270_000_steps_of_16():
    config, notes = resolved(16, **PAPER)
    assert (config.steps, config.lr, config.decay_steps) == (270_000, 2.5e-5, (210_000, 250_000))
    assert notes == [
        "schedule: 270000 steps of 16 images (36 epochs of 120000), learning rate 2.5e-05, from 2.5e-05 for 16 images, "
        "divided by 10 at steps 210000, 250000"
    ]


@pytest.mark.parametrize(("batch", "lr", "steps"), [(2, 3.125e-6, 2_160_000), (64, 1e-4, 67_500)])
def test_rate_and_steps_follow_the_batch(batch, lr, steps):
    config, notes = resolved(batch, **PAPER)
    assert config.lr == pytest.approx(lr, rel=1e-12) and config.steps == steps
    assert config.decay_steps == (round(steps * 7 / 9), round(steps * 25 / 27))
    assert len(notes) == 1


def test_given_numbers_are_taken_as_they_are():
    given = {"lr": 3e-6, "steps": 500, "decay_steps": (100, 400), "warmup_steps": 10}
    config, notes = resolved(2, **PAPER, **given)
    assert (config.lr, config.steps, config.decay_steps) == (3e-6, 500, (100, 400))
    assert len(notes) == 1 and "learning rate 3e-06, divided" in notes[0]


def test_parts_of_the_run_follow_given_steps():
    assert resolved(2, steps=90, decay_at=(0.5, 1.0))[0].decay_steps == (45, 90)


@pytest.mark.parametrize(
    ("epochs", "num_images", "batch", "steps"), [(1, 9, 4, 3), (2, 9, 4, 5), (0.1, 30, 1, 3), (1, 3, 16, 1)]
)
def test_the_last_epoch_is_complete(epochs, num_images, batch, steps):
    assert resolved(batch, num_images=num_images, epochs=epochs)[0].steps == steps


def test_without_a_recipe_the_rate_is_that_of_the_model_s_kind():
    assert resolved(16)[0].lr == 2.5e-5
    assert resolved(2, SMALL)[0].lr == 1e-4


@pytest.mark.parametrize(
    ("model", "batch", "lr", "warning"),
    [
        # What people do on one GPU with the paper's rate, and what they find that it ends in.
        (
            R50,
            2,
            2.5e-5,
            "2.5e-05 is 8 times what 2.5e-05 for 16 images comes to for 2; --lr 3.13e-06 is in proportion",
        ),
        (R50, 16, 1e-6, "1e-06 is 1/25 of what 2.5e-05 for 16 images comes to for 16; --lr 2.5e-05 is in proportion"),
        (SMALL, 8, 1e-2, "0.01 is 25 times what 0.0008 for 16 images comes to for 8; --lr 0.0004 is in proportion"),
        (R50, 16, 9e-5, None),
        (R50, 16, 7e-6, None),
        (SMALL, 8, 4e-4, None),
    ],
)
def test_a_rate_out_of_proportion_is_warned_of_with_the_right_one(model, batch, lr, warning):
    config, notes = resolved(batch, model, lr=lr)
    assert config.lr == lr
    assert notes[1:] == ([] if warning is None else [f"warning: the learning rate {warning}"])


def test_a_warm_up_without_an_end_is_warned_of():
    _, notes = resolved(16, steps=100)
    assert notes[1:] == ["warning: the warm-up of 1000 steps is as long as the run of 100"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected a positive number, got 0"),
        ({"base_lr": -1.0}, "base_lr: expected a positive number"),
        ({"base_batch": 0}, "base_batch: expected at least 1, got 0"),
        ({"decay_at": (0.5, 1.5)}, r"decay_at: expected parts of the run, above 0 and at most 1, got \(0.5, 1.5\)"),
        ({"ema_decay": 1.0}, "ema_decay: expected at least 0 and below 1, got 1.0"),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="d", output="o", **changes)
