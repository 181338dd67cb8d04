"""Training on the native kernels against training on the references, step by step."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn import SparseRCNN, ops
from sparse_rcnn.data.synthetic import make_scene
from sparse_rcnn.engine.optimizer import build_optimizer, lr_factor, set_lr
from sparse_rcnn.runtime import default_weights

STEPS = 20


def _scene(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    image, boxes, labels = make_scene(seed, (128, 160))
    target = {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels).long()}
    return torch.from_numpy(image).permute(2, 0, 1), target


def _loss(model: SparseRCNN, step: int) -> torch.Tensor:
    images, targets = zip(*(_scene(2 * step + i) for i in range(2)), strict=True)
    return sum(model(images, targets).values())


def _losses(backend: str) -> list[float]:
    # Trained weights: the equal boxes of a fresh model leave the matching to rounding.
    model = SparseRCNN.from_pretrained(default_weights()).train()
    optimizer = build_optimizer(model, lr=1e-4)
    losses = []
    with ops.backend(backend):
        for step in range(STEPS):
            set_lr(optimizer, lr_factor(step, 200, 0.01, ()))
            total = _loss(model, step)
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
    return losses


def test_losses_of_twenty_steps_equal_those_of_the_reference():
    ours, theirs = _losses("auto"), _losses("reference")
    assert ours == pytest.approx(theirs, rel=1e-4)
    # The steps had an effect that wrong gradients would have missed by far.
    untrained = _loss(SparseRCNN.from_pretrained(default_weights()).train(), STEPS - 1).item()
    assert abs(theirs[-1] / untrained - 1) > 0.05
