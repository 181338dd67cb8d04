"""A small training step and batches for it, for tests that look at the step from several sides."""

from __future__ import annotations

import torch

from sparse_rcnn.engine.optimizer import build_optimizer
from sparse_rcnn.engine.step import TrainStep
from sparse_rcnn.models import SparseRCNN, SparseRCNNConfig

CONFIG = SparseRCNNConfig(
    **{"backbone": "resnet18", "num_classes": 5, "num_stages": 2, "num_proposals": 6, "hidden_dim": 32},
    **{"dim_dynamic": 8, "dim_feedforward": 64, "num_heads": 4},
)


def make_step(bfloat16: bool = False, device: str = "cpu", **changes) -> TrainStep:
    """The step of a small model, the same one every time; ``changes`` are to its configuration."""
    torch.manual_seed(0)
    model = SparseRCNN(CONFIG.replace(**changes)).to(device, memory_format=torch.channels_last).train()
    return TrainStep(model, build_optimizer(model, lr=1e-3, weight_decay=0.1), clip_norm=1.0, bfloat16=bfloat16)


def sample(seed: int, counts=(3, 1), sizes=((50, 90), (64, 40))) -> tuple[list[torch.Tensor], list[dict]]:
    """uint8 images of ``sizes`` (height, width) and their targets, ``counts`` of them."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for (height, width), count in zip(sizes, counts, strict=True):
        images.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        corners = torch.rand(count, 2, generator=generator) * 20
        sides = 4 + torch.rand(count, 2, generator=generator) * 16
        labels = torch.randint(0, 5, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], dim=1), "labels": labels})
    return images, targets


def state_of(step: TrainStep) -> list[torch.Tensor]:
    """Copies of the parameters and of everything that the optimizer keeps."""
    moments = [value for state in step.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*step.model.state_dict().values(), *moments]]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    """Bit-equality of two results of :func:`state_of`."""
    assert len(first) == len(second) > 100
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
