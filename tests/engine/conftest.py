from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from sparse_rcnn.data import synthetic
from sparse_rcnn.engine.config import TrainConfig

TINY = {
    **{"num_stages": 2, "num_proposals": 10, "hidden_dim": 32, "dim_dynamic": 8, "dim_feedforward": 64},
    **{"num_heads": 4, "min_size": 64, "max_size": 96},
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bit-equality is promised for a fixed number of threads; one also leaves the other cores to others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with six training and three validation scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    synthetic.write_dataset(folder, 6, seed=1, size=(96, 128), split="train")
    synthetic.write_dataset(folder, 3, seed=2, size=(96, 128), split="valid")
    return folder


@pytest.fixture
def tiny_config(scenes, tmp_path):
    """Makes the configuration of a run of a few quick steps into ``tmp_path / "run"``."""

    def make(**changes) -> TrainConfig:
        values = {
            **{"data": str(scenes), "output": str(tmp_path / "run"), "backbone": "resnet18", "set": TINY},
            **{"backbone_weights": "none", "steps": 6, "lr": 1e-3, "warmup_steps": 4, "log_every": 1},
        }
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def write_coco(tmp_path):
    """Writes a COCO data set of plain pictures: ``(images {id: (w, h)}, categories {id: name}, annotations)``."""

    def write(images, categories, annotations):
        folder = tmp_path / "coco"
        (folder / "valid").mkdir(parents=True)
        for image_id, (width, height) in images.items():
            Image.new("RGB", (width, height), (90, 120, 150)).save(folder / "valid" / f"{image_id}.png")
        content = {
            "images": [
                {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}
                for image_id, (width, height) in images.items()
            ],
            "categories": [{"id": number, "name": name} for number, name in categories.items()],
            "annotations": annotations,
        }
        (folder / "valid.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write
