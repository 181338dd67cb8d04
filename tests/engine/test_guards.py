"""What training elsewhere stumbles over: no boxes, more boxes than proposals, the learning rate of another batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_rcnn.engine.trainer import Trainer

TWO_BOXES = [
    {"id": 1, "image_id": 2, "category_id": 1, "bbox": [4, 4, 30, 30]},
    {"id": 2, "image_id": 2, "category_id": 1, "bbox": [20, 10, 40, 50]},
]


def log_of(config) -> list[dict]:
    return [
        json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_images_without_boxes_are_used(write_coco, tiny_config, monkeypatch):
    folder = write_coco(dict.fromkeys((1, 2, 3), (64, 64)), {1: "cat"}, TWO_BOXES)
    config = tiny_config(data=str(folder / "valid.json"), batch_size=1, steps=3)
    trainer = Trainer(config)
    prepare, seen = trainer.model.prepare, []
    monkeypatch.setattr(
        trainer.model, "prepare", lambda images, targets, *more: seen.extend(targets) or prepare(images, targets, *more)
    )
    trainer.run()
    assert sorted(target["image_id"] for target in seen) == [1, 2, 3]
    for target, record in zip(seen, log_of(config), strict=True):
        boxes = 2 if target["image_id"] == 2 else 0
        assert len(target["boxes"]) == boxes
        # Without boxes there is nothing to regress, and every proposal learns that it is background.
        assert (record["loss_bbox"] > 0) == (record["loss_giou"] > 0) == (boxes > 0)
        assert record["loss_ce"] > 0 and record["grad_norm"] > 0


def test_more_boxes_than_proposals_are_warned_of_once_and_trained_on(write_coco, tiny_config, capsys):
    boxes = [
        {"id": 14 * image + place, "image_id": image, "category_id": 1, "bbox": [place, 2, 20, 40]}
        for image in (1, 2)
        for place in range(1, 15)
    ]
    folder = write_coco(dict.fromkeys((1, 2), (64, 64)), {1: "cat"}, boxes)
    config = tiny_config(data=str(folder / "valid.json"), steps=3)
    Trainer(config).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "proposals" in line]
    assert len(lines) == 1
    assert "2 images have more than the 10 boxes that the proposals can cover (at most 14;" in lines[0]
    losses = [record["loss"] for record in log_of(config)]
    assert len(losses) == 3 and all(0 < loss < 1e3 for loss in losses)


@pytest.mark.parametrize(("lr", "warned"), [(1e-3, True), (1.2e-4, False), (None, False)])
def test_a_rate_of_another_batch_is_warned_of_before_the_first_step(tiny_config, lr, warned, capsys):
    Trainer(tiny_config(lr=lr, steps=1, warmup_steps=0)).run()
    lines = capsys.readouterr().out.splitlines()
    schedule = next(number for number, line in enumerate(lines) if line.startswith("schedule: 1 steps of 2 images"))
    assert schedule < next(number for number, line in enumerate(lines) if line.startswith("step 1/1"))
    assert ["--lr 0.0001 is in proportion" in line for line in lines].count(True) == warned
