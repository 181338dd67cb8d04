"""apply_deltas against values worked out by hand and against its inverse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_rcnn.ops import apply_deltas

OFFICIAL = (None, math.log(100000 / 16))
MMDET = (-math.log(1000 / 16), math.log(1000 / 16))


def encode(boxes, targets, weights=(2.0, 2.0, 1.0, 1.0)):
    """The deltas that turn ``boxes`` into ``targets``, one number at a time."""
    sizes = [boxes[2] - boxes[0], boxes[3] - boxes[1]]
    target_sizes = [targets[2] - targets[0], targets[3] - targets[1]]
    deltas = []
    for axis in range(2):
        shift = (targets[axis] + targets[axis + 2]) / 2 - (boxes[axis] + boxes[axis + 2]) / 2
        deltas.append(weights[axis] * shift / sizes[axis])
    return deltas + [weights[2 + axis] * math.log(target_sizes[axis] / sizes[axis]) for axis in range(2)]


def test_zero_deltas_keep_the_box():
    boxes = torch.tensor([[10.0, 20, 50, 100], [-5, -7, 3, 9]])
    torch.testing.assert_close(apply_deltas(torch.zeros(2, 4), boxes), boxes)


def test_by_hand():
    # Width 40, height 80, centre (30, 60). dx: 1 / 2 of the width, 20 to the right; dy: -0.5 / 2 of the height, 20 up.
    # dw = log 2: width 80; dh = -log 4: height 20. Centre (50, 40).
    boxes = torch.tensor([[10.0, 20, 50, 100]], dtype=torch.float64)
    deltas = torch.tensor([[1.0, -0.5, math.log(2), -math.log(4)]], dtype=torch.float64)
    expected = torch.tensor([[10.0, 30, 90, 50]], dtype=torch.float64)
    torch.testing.assert_close(apply_deltas(deltas, boxes), expected)


def test_weights_divide_the_deltas():
    boxes = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64)
    deltas = torch.tensor([[10.0, 20, 5 * math.log(2), 4 * math.log(3)]], dtype=torch.float64)
    actual = apply_deltas(deltas, boxes, weights=(10, 10, 5, 4))
    # Centre (5 + 10, 5 + 20), size (20, 30).
    torch.testing.assert_close(actual, torch.tensor([[5.0, 10, 25, 40]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("clamp", "delta", "factor"),
    [
        ((None, None), 12.0, math.exp(12.0)),
        ((None, None), -12.0, math.exp(-12.0)),
        (OFFICIAL, 12.0, 6250.0),
        (OFFICIAL, 8.0, math.exp(8.0)),
        (OFFICIAL, -12.0, math.exp(-12.0)),
        (MMDET, 12.0, 62.5),
        (MMDET, 4.0, math.exp(4.0)),
        (MMDET, -12.0, 1 / 62.5),
        ((-1.0, None), -2.0, math.exp(-1.0)),
        ((-1.0, None), 9.0, math.exp(9.0)),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_clamp(clamp, delta, factor, axis):
    boxes = torch.tensor([[-0.5, -0.5, 0.5, 0.5]], dtype=torch.float64)
    deltas = torch.zeros(1, 4, dtype=torch.float64)
    deltas[0, 2 + axis] = delta
    decoded = apply_deltas(deltas, boxes, clamp=clamp)[0]
    sizes = [1.0, 1.0]
    sizes[axis] = factor
    expected = torch.tensor([-sizes[0], -sizes[1], sizes[0], sizes[1]], dtype=torch.float64) / 2
    torch.testing.assert_close(decoded, expected)


def test_clamp_leaves_the_centre_alone():
    boxes = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64)
    deltas = torch.tensor([[40.0, -60, 0, 0]], dtype=torch.float64)
    expected = torch.tensor([[200.0, -300, 210, -290]], dtype=torch.float64)
    torch.testing.assert_close(apply_deltas(deltas, boxes, clamp=MMDET), expected)


coordinate = st.floats(-500, 500)
side = st.floats(0.5, 500)
boxes_of = st.tuples(coordinate, coordinate, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(box=boxes_of, target=boxes_of)
def test_decoding_inverts_encoding(box, target):
    deltas = torch.tensor(encode(box, target), dtype=torch.float64)
    decoded = apply_deltas(deltas, torch.tensor(box, dtype=torch.float64), clamp=OFFICIAL)
    torch.testing.assert_close(decoded, torch.tensor(target, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 4), (2, 3, 4), (2, 0, 5, 4)])
def test_leading_dimensions(shape):
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(shape, generator=generator, dtype=torch.float64)
    boxes = torch.randn(shape, generator=generator, dtype=torch.float64)
    actual = apply_deltas(deltas, boxes)
    rows = [apply_deltas(d, b) for d, b in zip(deltas.reshape(-1, 4), boxes.reshape(-1, 4), strict=True)]
    expected = torch.stack(rows) if rows else torch.empty(0, 4, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.view(shape))


@pytest.mark.parametrize("clamp", [(None, None), OFFICIAL, MMDET])
def test_gradcheck(clamp):
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    deltas[:, 2:] *= 4  # some beyond mmdet's clamp of 4.1, on both sides
    boxes = torch.randn(5, 4, generator=generator, dtype=torch.float64) * 10
    assert (deltas[:, 2:] > MMDET[1]).any()
    assert (deltas[:, 2:] < MMDET[0]).any()
    inputs = (deltas.requires_grad_(), boxes.requires_grad_())
    assert torch.autograd.gradcheck(lambda d, b: apply_deltas(d, b, clamp=clamp), inputs)


@pytest.mark.parametrize(
    ("deltas", "boxes", "result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_mixed_dtypes_compute_in_the_wider(deltas, boxes, result):
    d = torch.tensor([[0.3, -0.7, 0.25, 0.5]]).to(deltas)
    b = torch.tensor([[12.0, 20, 50, 108]]).to(boxes)
    actual = apply_deltas(d, b)
    assert actual.dtype == result
    torch.testing.assert_close(actual, apply_deltas(d.to(result), b.to(result)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"deltas": torch.zeros(2, 4)}, ValueError, r"deltas: expected shape \[3, 4\], got \[2, 4\]"),
        ({"deltas": torch.zeros(3, 5)}, ValueError, r"deltas: expected shape \[3, 4\], got \[3, 5\]"),
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes: expected shape \[3, 4\], got \[3, 5\]"),
        ({"deltas": [0.0] * 4}, TypeError, "deltas: expected a tensor, got list"),
        ({"deltas": torch.zeros(3, 4).long()}, TypeError, "deltas: expected a floating-point tensor, got torch.int64"),
        ({"boxes": torch.zeros(3, 4).int()}, TypeError, "boxes: expected a floating-point tensor, got torch.int32"),
        ({"boxes": torch.zeros(3, 4, device="meta")}, ValueError, "boxes: expected it on cpu like deltas, got meta"),
        ({"weights": (1.0, 1.0)}, ValueError, r"weights: expected four numbers, got \[1.0, 1.0\]"),
    ],
)
def test_argument_errors(change, error, message):
    with pytest.raises(error, match=message):
        apply_deltas(**{"deltas": torch.zeros(3, 4), "boxes": torch.zeros(3, 4), **change})
