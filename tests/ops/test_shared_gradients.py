"""Operators that add the gradient of the feature maps to one buffer."""

from __future__ import annotations

import gc

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.ops.shared_gradients import HUGE_PAGES_FROM, SharedFeatures, new_grad_cells, split_grad_cells

STRIDES = (8, 16)
BOXES = torch.tensor([[[4.0, 4, 60, 70], [10, 0, 120, 127], [30, 30, 40, 50]]])


@pytest.fixture
def maps() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 5, 128 // s, 128 // s, dtype=torch.float64, requires_grad=True) for s in STRIDES]


def _pool(features, shift: float) -> torch.Tensor:
    return ops.multiscale_roi_align(features, BOXES + shift, STRIDES)


def _expected(maps: list[torch.Tensor], shifts: tuple[float, ...]) -> list[torch.Tensor]:
    with ops.backend("reference"):
        return list(torch.autograd.grad(sum(_pool(maps, shift).square().sum() for shift in shifts), maps))


def test_gradients_of_several_operators_add_up(maps: list[torch.Tensor]) -> None:
    shared = ops.share_gradients(maps)
    assert isinstance(shared, SharedFeatures)
    got = torch.autograd.grad(sum(_pool(shared, shift).square().sum() for shift in (0, 3, 9)), maps)
    for a, b in zip(got, _expected(maps, (0, 3, 9)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_that_stops_before_the_maps_leaves_nothing_behind(maps: list[torch.Tensor]) -> None:
    shared = ops.share_gradients(maps)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (_pool(shared, 0).square() * scale).sum()
    torch.autograd.grad(loss, scale, retain_graph=True)
    for _ in range(2):
        got = torch.autograd.grad(loss, maps, retain_graph=True)
        for a, b in zip(got, _expected(maps, (0,)), strict=True):
            torch.testing.assert_close(a, b)


def test_other_uses_of_the_maps_count_too(maps: list[torch.Tensor]) -> None:
    shared = ops.share_gradients(maps)
    got = torch.autograd.grad(_pool(shared, 0).square().sum() + shared[1].sum(), maps)
    first, second = _expected(maps, (0,))
    torch.testing.assert_close(got[0], first)
    torch.testing.assert_close(got[1], second + 1)
    unread = torch.autograd.grad(ops.share_gradients(maps)[0].sum(), maps, allow_unused=True)
    assert torch.equal(unread[0], torch.ones_like(maps[0]))


def test_maps_without_gradient_are_returned_as_they_are(maps: list[torch.Tensor]) -> None:
    with torch.no_grad():
        assert ops.share_gradients(maps) is maps
    frozen = [feature.detach() for feature in maps]
    assert ops.share_gradients(frozen) is frozen


def test_the_buffer_is_the_maps_gradient_without_a_copy() -> None:
    features = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 3)]
    cells = new_grad_cells(features)
    assert cells.shape == (2 * (20 + 6), 3)
    cells.copy_(torch.arange(cells.numel()).view_as(cells))
    for feature, grad in zip(features, split_grad_cells(cells, features), strict=True):
        assert grad.shape == feature.shape
        assert grad.is_contiguous(memory_format=torch.channels_last)
        assert grad.untyped_storage().data_ptr() == cells.untyped_storage().data_ptr()
    grad = split_grad_cells(cells, features)[1]
    assert grad[1, 2, 1, 0] == cells[40 + 6 + 3, 2]


def test_a_large_buffer_is_zeros_that_outlive_their_maker() -> None:
    features = [torch.empty(1, 256, 200, 200)]
    assert HUGE_PAGES_FROM <= 256 * 200 * 200 * 4
    cells = new_grad_cells(features)
    assert cells.dtype == torch.float32
    assert not cells.any()
    grad = split_grad_cells(cells.add_(1), features)[0]
    del cells
    gc.collect()
    assert torch.equal(grad, torch.ones(1, 256, 200, 200))
