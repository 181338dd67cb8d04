"""Tensors made again in the backward pass."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparse_rcnn.models.recompute import recomputed


def _gradients(drop: bool, calls: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, other = (torch.randn(5, 5, generator=generator, requires_grad=True) for _ in range(3))

    def generate() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return F.linear(x, weight)

    parameters = generate()
    if drop:
        with recomputed(parameters, generate):
            y = parameters * other
    else:
        y = parameters * other
    del parameters
    y.square().sum().backward()
    return [x.grad, weight.grad, other.grad]


def test_gradients_are_those_of_the_kept_tensor() -> None:
    kept_calls, dropped_calls = [], []
    kept, dropped = _gradients(False, kept_calls), _gradients(True, dropped_calls)
    for a, b in zip(kept, dropped, strict=True):
        assert torch.equal(a, b)
    assert kept_calls == [True]
    assert dropped_calls == [True, False], "made once in the forward, once in the backward and without a graph"


def test_the_tensor_is_freed_before_the_backward() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    parameters = x * 2
    storage = parameters.untyped_storage()._weak_ref()
    with recomputed(parameters, lambda: x * 2):
        y = parameters * x
    del parameters
    assert torch.UntypedStorage._expired(storage)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 4 * x.detach())
    torch.UntypedStorage._free_weak_ref(storage)
