"""A detector small enough to train a step in a blink, and images and targets for it."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig


@pytest.fixture(scope="session")
def tiny() -> SparseRCNNConfig:
    """Five classes, six proposals spread over the image, three stages."""
    return SparseRCNNConfig(
        backbone="mobilenetv3_small_050", num_classes=5, num_proposals=6, num_stages=3, hidden_dim=16,
        num_heads=4, dim_dynamic=4, dim_feedforward=32, pooler_resolution=3, proposal_init="grid",
    )  # fmt: skip


@pytest.fixture
def build():
    """Builds the detector of a configuration from a fixed seed, in training mode."""

    def build(config: SparseRCNNConfig) -> SparseRCNN:
        torch.manual_seed(0)
        return SparseRCNN(config)

    return build


@pytest.fixture
def images() -> list[torch.Tensor]:
    """Two images of differing sizes, not multiples of 32."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((50, 64), (40, 90))]


@pytest.fixture
def targets() -> list[dict[str, torch.Tensor]]:
    """Three and one boxes."""
    boxes = torch.tensor([[4.0, 5, 40, 45], [10, 2, 20, 12], [30, 20, 60, 48]])
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 4, 2])},
        {"boxes": boxes[:1], "labels": torch.tensor([3])},
    ]
