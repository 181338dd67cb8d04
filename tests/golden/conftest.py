"""The R50-100 detector with the deterministic weights, images and targets that the golden figures were made with."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_rcnn import SparseRCNN, SparseRCNNConfig

HERE = Path(__file__).parent


def _official_key(name: str) -> str:
    """The official code's name of one of our parameters: what the deterministic weights are drawn from."""
    replacements = [
        *((f"backbone.fpn.inner_blocks.{i}.0", f"backbone.fpn_lateral{i + 2}") for i in range(4)),
        *((f"backbone.fpn.layer_blocks.{i}.0", f"backbone.fpn_output{i + 2}") for i in range(4)),
        *((f"backbone.body.layer{i}", f"backbone.bottom_up.res{i + 1}") for i in range(1, 5)),
        ("backbone.body.", "backbone.bottom_up.stem."),
        ("downsample.1", "shortcut.norm"),
        ("downsample.0", "shortcut"),
        ("head.stages", "head.head_series"),
        *((f".bn{i}.", f".conv{i}.norm.") for i in range(1, 4)),
    ]
    for ours, official in replacements:
        name = name.replace(ours, official)
    return name


@pytest.fixture(autouse=True)
def two_threads():
    """The order of summation, and with it the rounding noise, depends on the threads; the tolerances are for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fill():
    """``fill.py``: numpy weights, images and targets as functions of their names."""
    spec = importlib.util.spec_from_file_location("golden_fill", HERE / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def official_keys() -> dict[str, str]:
    """Our name of every tensor of R50-100 -> the official one."""
    with torch.device("meta"):
        model = SparseRCNN(SparseRCNNConfig.preset("r50_100"))
    return {name: _official_key(name) for name in model.state_dict()}


@pytest.fixture(scope="session")
def golden_state(fill, official_keys) -> dict[str, torch.Tensor]:
    """The deterministic weights under our names."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in SparseRCNN(SparseRCNNConfig.preset("r50_100")).state_dict().items()}
    return {name: torch.from_numpy(fill.value(official_keys[name], shapes[name])) for name in shapes}


@pytest.fixture
def golden_model(golden_state) -> SparseRCNN:
    """A fresh R50-100 with the deterministic weights, in training mode."""
    model = SparseRCNN(SparseRCNNConfig.preset("r50_100"))
    model.load_state_dict(golden_state)
    return model.train()


@pytest.fixture(scope="session")
def golden_images(fill) -> list[torch.Tensor]:
    """The two uint8 images, CHW."""
    return [torch.from_numpy(image).permute(2, 0, 1) for image in fill.images()]


@pytest.fixture(scope="session")
def golden_outputs() -> dict[str, np.ndarray]:
    """What the official implementation gave in evaluation."""
    with np.load(HERE / "official_r50_100.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_training() -> dict:
    """The official implementation's losses, gradient norms and AdamW steps."""
    with gzip.open(HERE / "official_r50_100_train.json.gz", "rt") as file:
        return json.load(file)


@pytest.fixture
def scenes_of_80(tmp_path) -> Path:
    """A COCO data set of one picture and of as many classes as the golden detector has."""
    Image.new("RGB", (64, 48)).save(tmp_path / "picture.png")
    content = {
        "images": [{"id": 1, "file_name": "picture.png", "width": 64, "height": 48}],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, 81)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]}],
    }
    (tmp_path / "one.json").write_text(json.dumps(content))
    return tmp_path / "one.json"
