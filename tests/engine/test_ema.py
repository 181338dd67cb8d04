from __future__ import annotations

from pathlib import Path

import torch

from sparse_rcnn import SparseRCNN
from sparse_rcnn.engine import trainer as trainer_module
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.ema import build_ema
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.trainer import Trainer
from tests.host_reads import forbid_host_reads
from tests.training_step import make_step, sample


def copies(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_average_is_the_recurrence_with_a_rising_decay_and_reads_nothing_on_the_host():
    step = make_step()
    ema = build_ema(step.model, 0.6)
    exact = {}
    for number in range(1, 6):
        batch = step.model.prepare(*sample(number))
        with forbid_host_reads():
            step(batch)
            ema.update(step.model, number)
        decay = 0.0 if number == 1 else min(0.6, 1 - number ** (-2 / 3))
        for name, value in step.model.state_dict().items():
            exact[name] = decay * exact.get(name, 0.0) + (1 - decay) * value.double()
    averaged = copies(ema.module)
    moved = [name for name, value in averaged.items() if not torch.equal(value, step.model.state_dict()[name])]
    assert len(moved) > 60, "it lags behind what is trained, and only that"
    assert all(name not in moved for name, parameter in step.model.named_parameters() if not parameter.requires_grad)
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), exact[name].double(), rtol=1e-6, atol=1e-7)


def test_the_average_is_what_is_evaluated_and_kept(tiny_config, scenes, monkeypatch):
    seen = []
    monkeypatch.setattr(
        trainer_module, "evaluate", lambda model, *rest, **more: seen.append(model) or evaluate(model, *rest, **more)
    )
    trainer = Trainer(tiny_config(val=str(scenes), steps=3, ema_decay=0.5))
    trainer.run()
    assert seen == [trainer.ema.module] and not trainer.ema.module.training
    assert not same(copies(trainer.ema.module), copies(trainer.model))
    run = Path(trainer.config.output)
    for folder in ("model", "best"):
        assert same(copies(SparseRCNN.from_pretrained(run / folder)), copies(trainer.ema.module))
    assert same(load_checkpoint(run / "last.pt")["model"], copies(trainer.model))


def test_a_resumed_average_is_the_uninterrupted_one(tiny_config, tmp_path):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    Trainer(tiny_config(output=whole, steps=4, ema_decay=0.9)).run()
    Trainer(tiny_config(output=parts, steps=2, ema_decay=0.9)).run()
    Trainer(tiny_config(output=parts, steps=4, ema_decay=0.9, resume=True)).run()
    a, b = load_checkpoint(f"{whole}/last.pt"), load_checkpoint(f"{parts}/last.pt")
    assert same(a["ema"], b["ema"]) and same(a["model"], b["model"])


def test_an_average_can_be_turned_on_and_off_on_resume(tiny_config):
    first = Trainer(tiny_config(steps=2))
    first.run()
    assert first.ema is None and load_checkpoint(first.checkpoint_path)["ema"] == {}
    on = Trainer(tiny_config(steps=3, resume=True, ema_decay=0.9))
    assert same(copies(on.ema.module), copies(first.model)), "it starts from the trained weights"
    on.run()
    off = Trainer(tiny_config(steps=3, resume=True))
    assert off.ema is None and off.eval_model is off.model
