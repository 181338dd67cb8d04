"""IoU and generalised IoU against torchvision's, and its bounds."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_rcnn.ops import generalized_iou, pairwise_generalized_iou, pairwise_iou


def make_boxes(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 100
    sizes = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 60 + 0.5
    return torch.cat([corners, corners + sizes], dim=-1)


@pytest.mark.parametrize(("N", "M"), [(1, 1), (7, 5), (0, 3), (3, 0), (40, 1)])
def test_pairwise_equals_torchvision(N, M):
    boxes, others = make_boxes(N, seed=1), make_boxes(M, seed=2)
    expected = torchvision.ops.generalized_box_iou(boxes, others)
    torch.testing.assert_close(pairwise_generalized_iou(boxes, others), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        pairwise_iou(boxes, others), torchvision.ops.box_iou(boxes, others), rtol=1e-12, atol=1e-12
    )


def test_pairwise_iou_of_boxes_without_area():
    boxes = torch.tensor([[0.0, 0, 0, 0], [1, 1, 3, 3], [5, 5, 2, 2]])
    expected = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(boxes, boxes), expected, rtol=0, atol=0)


def test_pairwise_with_leading_dimensions():
    boxes, others = make_boxes(2, 3, 5, seed=1), make_boxes(2, 3, 4, seed=2)
    actual = pairwise_generalized_iou(boxes, others)
    assert actual.shape == (2, 3, 5, 4)
    for i in range(2):
        for j in range(3):
            expected = torchvision.ops.generalized_box_iou(boxes[i, j], others[i, j])
            torch.testing.assert_close(actual[i, j], expected, rtol=1e-12, atol=1e-12)


def test_in_pairs_is_the_diagonal():
    boxes, others = make_boxes(2, 6, seed=1), make_boxes(2, 6, seed=2)
    expected = pairwise_generalized_iou(boxes, others).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(generalized_iou(boxes, others), expected)


def test_by_hand():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 4, 4]])
    others = torch.tensor([[1.0, 1, 3, 3], [3, 0, 4, 1], [1, 1, 3, 3]])
    # Overlap 1 of 7 in a hull of 9; two unit boxes in a hull of 4; 4 inside 16.
    expected = torch.tensor([1 / 7 - 2 / 9, -0.5, 0.25])
    torch.testing.assert_close(generalized_iou(boxes, others), expected)


coordinate = st.floats(-1000, 1000, width=32)
side = st.floats(0, 1000, width=32)
box = st.tuples(coordinate, coordinate, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(first=box, second=box)
def test_bounds_and_symmetry(first, second):
    first, second = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    value = generalized_iou(first, second)
    assert -1 <= value <= 1 + 1e-12
    torch.testing.assert_close(value, generalized_iou(second, first), rtol=1e-12, atol=1e-12)


def test_far_apart_goes_towards_minus_one():
    near = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)
    far = torch.tensor([999.0, 999, 1000, 1000], dtype=torch.float64)
    torch.testing.assert_close(generalized_iou(near, far).item(), -1 + 2e-6)


def test_identical_boxes_give_one():
    boxes = make_boxes(20, dtype=torch.float32)
    torch.testing.assert_close(generalized_iou(boxes, boxes), torch.ones(20), rtol=0, atol=1e-6)


def test_boxes_without_area():
    point = torch.tensor([5.0, 5, 5, 5])
    line = torch.tensor([5.0, 0, 5, 10])
    inverted = torch.tensor([10.0, 10, 0, 0])
    real = torch.tensor([0.0, 0, 10, 10])
    for empty in (point, line):
        assert generalized_iou(empty, empty).item() == 0
        assert generalized_iou(empty, real).item() == 0  # inside: the hull is the real box
    assert generalized_iou(point, line).item() == 0
    assert generalized_iou(inverted, inverted).isfinite()
    assert generalized_iou(inverted, real).isfinite()


@pytest.mark.parametrize(
    "predicted",
    [[0.0, 0, 10, 10], [5, 5, 5, 5], [5, 0, 5, 10], [0, 0, 0, 0], [30, 30, 20, 20], [1e6, 1e6, 1e6, 1e6]],
)
def test_gradients_to_any_box_are_finite(predicted):
    predicted = torch.tensor([predicted], dtype=torch.float32, requires_grad=True)
    target = torch.tensor([[0.0, 0, 10, 10]])
    generalized_iou(predicted, target).sum().backward()
    assert predicted.grad.isfinite().all()


def test_gradcheck():
    boxes, others = make_boxes(6, seed=1).requires_grad_(), make_boxes(6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(generalized_iou, (boxes, others))
    assert torch.autograd.gradcheck(pairwise_generalized_iou, (boxes[:3], others[:2]))


@pytest.mark.parametrize(
    ("boxes", "others", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4), ValueError, r"others: expected shape \[3, 4\], got \[2, 4\]"),
        (torch.zeros(3, 5), torch.zeros(3, 5), ValueError, r"boxes: expected shape \[3, 4\], got \[3, 5\]"),
        (torch.zeros(3, 4).long(), torch.zeros(3, 4), TypeError, "boxes: expected a floating-point tensor"),
        (torch.zeros(3, 4), [0.0], TypeError, "others: expected a tensor, got list"),
    ],
)
def test_argument_errors(boxes, others, error, message):
    with pytest.raises(error, match=message):
        generalized_iou(boxes, others)
