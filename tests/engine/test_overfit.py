"""The training recipe, end to end, can learn photographs by heart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.trainer import Trainer
from tests.engine.test_trainer import log_of

ROOT = Path(__file__).resolve().parents[2]
AQUARIUM = ROOT.parent / "shared" / "data" / "aquarium"
DEMO = ROOT / "sparse_rcnn" / "assets" / "demo"
# Portraits of 1 to 9 objects each.
FILES = (
    *("IMG_2275.jpg", "IMG_2282.jpg", "IMG_2283.jpg", "IMG_2302.jpg"),
    *("IMG_2359.jpg", "IMG_2362.jpg", "IMG_2463.jpg", "IMG_2549.jpg"),
)


# The photographs are not part of the repository.
@pytest.mark.skipif(not AQUARIUM.is_dir(), reason=f"the photographs are not at {AQUARIUM}")
def test_eight_photographs_are_learnt_by_heart(tmp_path):
    """From the bundled detector of toy objects, at 192 x 256 pixels; each of the seven classes is there."""
    content = json.loads((AQUARIUM / "train.json").read_text(encoding="utf-8"))
    content["images"] = [image for image in content["images"] if image["file_name"] in FILES]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    assert len(ids) == 8 and len({each["category_id"] for each in content["annotations"]}) == 7
    data = tmp_path / "train.json"
    data.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "train").symlink_to(AQUARIUM / "train")
    trainer = Trainer(
        TrainConfig(
            **{"data": str(data), "val": str(data), "output": str(tmp_path / "run"), "weights": str(DEMO)},
            **{"set": {"min_size": 192, "max_size": 256}, "min_sizes": (192,), "flip": 0.0, "batch_size": 2},
            **{"steps": 220, "lr": 5e-4, "warmup_steps": 20, "decay_steps": (170,), "device": "cpu"},
        )
    )
    assert evaluate(trainer.model, trainer.dataset).metrics["AP50"] < 0.05
    trainer.run()
    assert log_of(tmp_path / "run")[-1]["AP50"] >= 0.95
