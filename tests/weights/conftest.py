from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig


@pytest.fixture(scope="session")
def key_tables():
    """Key -> shape tables of the published checkpoints, and the key map of the two families."""
    path = Path(__file__).parent / "data" / "key_tables.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.fixture(scope="session")
def tiny_config():
    """The smallest detector with a torchvision ResNet, every size different from the default and from each other."""
    return SparseRCNNConfig(
        **{"backbone": "resnet18", "num_classes": 3, "num_proposals": 5, "num_stages": 2, "hidden_dim": 16},
        **{"dim_dynamic": 4, "dim_feedforward": 24, "num_cls_layers": 2, "num_reg_layers": 1, "pooler_resolution": 3},
    )


@pytest.fixture(scope="session")
def tiny_state(tiny_config):
    """Distinct values for every tensor of ``tiny_config``; a NaN among them."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SparseRCNN(tiny_config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["head.stages.0.norm1.bias"][3] = float("nan")
    return state


@pytest.fixture
def assert_same():
    def compare(got, wanted):
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype, name
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)

    return compare
