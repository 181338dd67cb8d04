"""A detector whose answers are known, images to feed it, and a real one with random weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sparse_rcnn import SparseRCNN, SparseRCNNConfig

CLASSES = ("fish", "crab", "star")

# Five detections as fractions of the image (x1, y1, x2, y2), score, label; the fourth lies on the border, the last two
# are one object found twice.
KNOWN = (
    ((0.25, 0.25, 0.75, 0.5), 0.9, 0),
    ((0.5, 0.0, 1.0, 1.0), 0.8, 1),
    ((0.1, 0.1, 0.3, 0.3), 0.6, 2),
    ((1.0, 0.2, 1.0, 0.6), 0.5, 0),
    ((0.26, 0.25, 0.76, 0.5), 0.2, 0),
)


class KnownDetector(nn.Module):
    """Answers every image with ``KNOWN``; two stages, which start from boxes half as large at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SparseRCNNConfig(num_classes=3, class_names=CLASSES, num_proposals=5, min_size=64, max_size=96)
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches: list[list[tuple[int, ...]]] = []

    def forward(self, images, targets=None, return_stages=False):
        self.batches.append([tuple(image.shape) for image in images])
        fractions = torch.tensor([box for box, _, _ in KNOWN])
        scores = torch.tensor([score for _, score, _ in KNOWN])
        labels = torch.tensor([label for _, _, label in KNOWN])
        sizes = [torch.tensor([image.shape[2], image.shape[1]] * 2) for image in images]
        proposals = torch.arange(4, -1, -1)  # proposal 4 is detection 0, and so on
        found = [
            {"boxes": fractions * size, "scores": scores, "labels": labels, "proposals": proposals} for size in sizes
        ]
        if not return_stages:
            return found
        last = torch.stack([fractions * size for size in sizes]).flip(1)
        logits = torch.full((2, len(images), 5, 3), -8.0)
        for position, label in enumerate(labels):
            logits[1, :, 4 - position, label] = torch.logit(scores[position])
        return SimpleNamespace(
            logits=logits, boxes=torch.stack([last * 0.75, last]), proposal_boxes=last * 0.5, detections=found
        )


@pytest.fixture
def detector():
    return KnownDetector()


@pytest.fixture
def known_weights(monkeypatch, detector):
    """Makes every checkpoint that the command loads the known detector."""
    monkeypatch.setattr(SparseRCNN, "from_pretrained", classmethod(lambda cls, path: detector))
    return detector


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A saved real model with random weights."""
    torch.manual_seed(0)
    config = SparseRCNNConfig(
        **{"num_classes": 3, "class_names": CLASSES, "num_proposals": 10, "num_stages": 2, "backbone": "resnet18"},
        **{"hidden_dim": 32, "dim_dynamic": 8, "dim_feedforward": 64, "num_heads": 4, "min_size": 64, "max_size": 96},
    )
    directory = tmp_path_factory.mktemp("tiny") / "model"
    SparseRCNN(config).save_pretrained(directory)
    return directory


@pytest.fixture
def write_image():
    """Writes a picture of noise: write_image(path, height, width) -> path."""

    def write(path: Path, height: int = 40, width: int = 60) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write
