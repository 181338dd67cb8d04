"""Loading a detector: nothing is computed that the file replaces, nothing imported that inference does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.models.uninitialized import Uninitialized

TINY = {
    **{"num_classes": 3, "num_proposals": 10, "num_stages": 2, "backbone": "resnet18", "hidden_dim": 32},
    **{"dim_dynamic": 8, "dim_feedforward": 64, "num_heads": 4},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = SparseRCNN(SparseRCNNConfig(**TINY))
    return model, model.save_pretrained(tmp_path_factory.mktemp("model") / "model")


def test_nothing_is_initialised_inside():
    before = torch.get_rng_state()
    filled = torch.full((4, 4), 7.0)
    with Uninitialized():
        for initialise in (torch.nn.init.xavier_uniform_, torch.nn.init.kaiming_normal_, torch.nn.init.normal_):
            assert initialise(filled) is filled
        assert filled.normal_() is filled and filled.uniform_(0, 1) is filled
    assert torch.equal(filled, torch.full((4, 4), 7.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.nn.init.normal_(filled), torch.full((4, 4), 7.0))


def test_every_value_comes_from_the_file(saved):
    model, folder = saved
    before = torch.get_rng_state()
    loaded = SparseRCNN.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, value), (other, expected) in zip(
        [*loaded.named_parameters(), *loaded.named_buffers()],
        [*model.named_parameters(), *model.named_buffers()],
        strict=True,
    ):
        assert name == other and torch.equal(value, expected) and value.requires_grad == expected.requires_grad


def test_weights_do_not_change_with_their_file(saved, tmp_path):
    model, folder = saved
    copy = SparseRCNN.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    loaded = SparseRCNN.from_pretrained(copy)
    with open(copy / "model.safetensors", "r+b") as file:
        file.write(bytes(file.seek(0, 2) and (copy / "model.safetensors").stat().st_size))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


PROGRAM = """
import sys, torch
from sparse_rcnn import SparseRCNN
model = SparseRCNN.from_pretrained(sys.argv[1])
found = model.optimize()([torch.full((3, 64, 96), 99, dtype=torch.uint8)])
assert len(found[0]["scores"]) > 0
assert not any(name.startswith(("torch._dynamo", "triton", "sympy")) for name in sys.modules)
from sparse_rcnn.models import light_torchvision as light
assert light._is_compile_supported("cpu") is sys.modules["torch._dynamo.utils"].is_compile_supported("cpu")
boxes = torch.tensor([[0.0, 1.0, 1.0, 7.0, 7.0]])
assert light.torchvision.ops.roi_align(torch.ones(1, 2, 8, 8), boxes, 2).shape == (1, 2, 2, 2)
"""


def test_inference_does_without_the_compiler(saved):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(saved[1])], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
