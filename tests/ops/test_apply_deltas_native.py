"""The kernels of apply_deltas against the reference in float64; by hand it is tested in test_apply_deltas."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.self_test import Specification

OFFICIAL = (None, math.log(100000 / 16))
MMDET = (-math.log(1000 / 16), math.log(1000 / 16))
CLAMPS = [(None, None), OFFICIAL, MMDET, (-0.5, None), (-0.25, 0.75)]
HALVES = (torch.bfloat16, torch.float16)

# Around a warp, a block, a task of the CPU kernel, and the sizes of a stage.
SHAPES = [(), *((n,) for n in (0, 1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 300, 2047))]
SHAPES += [(2048,), (2049,), (4800,), (1, 1), (2, 3), (3, 2), (2, 300), (16, 100), (0, 5), (5, 0), (1, 64), (64, 1)]
SHAPES += [(6, 2, 10), (1, 1, 1), (2, 3, 4), (2, 0, 4), (3, 5, 7), (2, 2, 2, 2), (7, 1, 3, 1), (1, 2, 33)]


def make(shape, deltas_dtype=torch.float32, boxes_dtype=torch.float32, seed=0, scale=1.0):
    """Deltas around the clamps, and boxes whose coordinates are of the order of ``scale``; some are inverted."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
    corners = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    sizes = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 0.1
    boxes = torch.cat([corners, corners + sizes], dim=-1) * scale
    return deltas.to(deltas_dtype), boxes.to(boxes_dtype)


def check(deltas, boxes, **options):
    """Values and both gradients; half types err at most twice as much as the reference in the same type."""
    inputs = {"deltas": deltas, "boxes": boxes, **options}
    record = Specification(ops.apply_deltas_reference, inputs, ("deltas", "boxes")).compare(ops.apply_deltas)
    assert record["passed"], record


def test_shapes_are_many():
    assert len(set(SHAPES)) >= 40


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_against_float64(backend, shape):
    for seed, clamp in enumerate(CLAMPS):
        deltas, boxes = make(shape, seed=seed)
        leaves = [tensor.requires_grad_() for tensor in (deltas, boxes)]
        exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
        actual = ops.apply_deltas(*leaves, clamp=clamp)
        expected = ops.apply_deltas_reference(*exact, clamp=clamp)
        assert actual.shape == (*shape, 4) and actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(actual, leaves, grad)
        for got, want in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("deltas_dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1,), (37,), (2, 100)], ids=str)
def test_every_pair_of_dtypes(backend, shape, deltas_dtype, boxes_dtype):
    deltas, boxes = make(shape, deltas_dtype, boxes_dtype)
    assert ops.apply_deltas(deltas, boxes).dtype == torch.promote_types(deltas_dtype, boxes_dtype)
    for weights in ((2.0, 2.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        check(deltas, boxes, weights=weights, clamp=(None, 0.7))


def test_boxes_in_pixels(backend):
    deltas, boxes = make((2, 300), torch.bfloat16, scale=1333.0)
    check(deltas, boxes, clamp=OFFICIAL)
    check(deltas.float(), boxes, clamp=MMDET)


@pytest.mark.parametrize("clamp", CLAMPS, ids=str)
def test_clamp_and_its_gradient(backend, clamp):
    # On both bounds, and beside them; no gradient at a bound itself, whatever this torch's clamp gives there.
    bounds = [bound for bound in clamp if bound is not None] or [0.0]
    values = torch.tensor([bound + step for bound in bounds for step in (-1e-3, 0.0, 1e-3)], dtype=torch.float64)
    deltas = values.view(-1, 1).repeat(1, 4).requires_grad_()
    boxes = torch.tensor([0.0, 0.0, 2.0, 3.0], dtype=torch.float64).repeat(len(values), 1)
    weights = (1.0, 1.0, 1.0, 1.0)
    decoded = ops.apply_deltas(deltas, boxes, weights, clamp)
    torch.testing.assert_close(decoded, ops.apply_deltas_reference(deltas, boxes, weights, clamp))
    (grad,) = torch.autograd.grad(decoded[:, 2:].sum(), deltas)
    inside = torch.ones_like(values, dtype=torch.bool)
    if clamp[0] is not None:
        inside &= values > clamp[0]
    if clamp[1] is not None:
        inside &= values < clamp[1]
    expected = torch.where(inside, values.exp(), 0.0)  # of x2 and y2: half of the size's, 2 and 3
    torch.testing.assert_close(grad[:, 2], expected)
    torch.testing.assert_close(grad[:, 3], 1.5 * expected)
    torch.testing.assert_close(grad[:, :2], boxes[:, 2:])


@pytest.mark.parametrize("clamp", [(None, None), OFFICIAL, MMDET], ids=str)
def test_what_is_not_finite_stays_in_its_row(backend, clamp):
    deltas, boxes = make((40,))
    for row, (bad, place) in enumerate((bad, place) for bad in (math.nan, math.inf, -math.inf) for place in range(8)):
        (deltas if place < 4 else boxes)[row, place % 4] = bad
    actual = ops.apply_deltas(deltas, boxes, clamp=clamp)
    torch.testing.assert_close(actual, ops.apply_deltas_reference(deltas, boxes, clamp=clamp), equal_nan=True)
    assert actual[24:].isfinite().all()


@pytest.mark.parametrize("seed", range(10))
def test_gradcheck(backend, seed):
    deltas, boxes = make((2, 3), torch.float64, torch.float64, seed=seed)
    clamp = CLAMPS[seed % len(CLAMPS)]
    inputs = (deltas.requires_grad_(), boxes.requires_grad_())
    assert torch.autograd.gradcheck(lambda d, b: ops.apply_deltas(d, b, clamp=clamp), inputs)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), HALVES], ids=str)
def test_opcheck(backend, dtypes):
    namespace = getattr(torch.ops, backend.namespace)
    deltas, boxes = make((3, 5), *dtypes)
    grad = torch.randn(3, 5, 4, dtype=torch.promote_types(*dtypes))
    options = ([2.0, 2.0, 1.0, 1.0], None, 0.5)
    for needed in (False, True):
        inputs = (deltas.clone().requires_grad_(needed), boxes.clone().requires_grad_(needed))
        torch.library.opcheck(namespace.apply_deltas.default, (*inputs, *options))
    torch.library.opcheck(namespace.apply_deltas_backward.default, (grad, deltas, boxes, *options))


def test_repeats_are_equal_in_every_bit(backend):
    deltas, boxes = (tensor.requires_grad_() for tensor in make((4800,)))
    runs = []
    for _ in range(3):
        decoded = ops.apply_deltas(deltas, boxes, clamp=OFFICIAL)
        runs.append((decoded, *torch.autograd.grad(decoded.square().sum(), (deltas, boxes))))
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run, strict=True))


def test_every_order_of_threads_gives_the_same(emulator):
    with ops.backend("emulated"):
        deltas, boxes = make((300,))
        runs = []
        for seed in range(5):
            emulator.set_seed(seed)
            runs.append(ops.apply_deltas(deltas, boxes))
        assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_views(backend):
    deltas, boxes = make((6, 5))
    expected = ops.apply_deltas(deltas, boxes)
    wide = torch.zeros(6, 5, 9)
    wide[..., 3:7] = deltas  # not contiguous
    torch.testing.assert_close(ops.apply_deltas(wide[..., 3:7], boxes), expected, rtol=0, atol=0)
    shifted = torch.zeros(121)
    shifted[1:] = boxes.flatten()  # contiguous, but not where a vector starts
    torch.testing.assert_close(ops.apply_deltas(deltas, shifted[1:].view(6, 5, 4)), expected, rtol=0, atol=0)
    one = boxes[:1, :1].expand(6, 5, 4)
    torch.testing.assert_close(
        ops.apply_deltas(deltas, one), ops.apply_deltas(deltas, one.contiguous()), rtol=0, atol=0
    )
    transposed = ops.apply_deltas(deltas.transpose(0, 1), boxes.transpose(0, 1))
    torch.testing.assert_close(transposed, expected.transpose(0, 1), rtol=0, atol=0)


def test_gradient_that_is_a_view(backend):
    deltas, boxes = (tensor.requires_grad_() for tensor in make((12,)))
    grads = torch.autograd.grad(ops.apply_deltas(deltas, boxes).sum(), (deltas, boxes))  # one number, expanded
    expected = torch.autograd.grad(ops.apply_deltas_reference(deltas, boxes).sum(), (deltas, boxes))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_bad_input_of_the_native_operator(backend):
    native = getattr(torch.ops, backend.namespace).apply_deltas
    weights = [2.0, 2.0, 1.0, 1.0]
    deltas, boxes = torch.zeros(3, 4), torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=r"boxes: expected shape \[..., 4\], got \[3, 5\]"):
        native(torch.zeros(3, 5), torch.zeros(3, 5), weights, None, None)
    with pytest.raises(RuntimeError, match=r"deltas: expected shape \[3, 4\], got \[2, 4\]"):
        native(torch.zeros(2, 4), boxes, weights, None, None)
    with pytest.raises(RuntimeError, match="weights: expected four numbers, got 3"):
        native(deltas, boxes, weights[:3], None, None)
    with pytest.raises(RuntimeError, match="boxes: expected float32, float64, bfloat16 or float16"):
        native(deltas, boxes.int(), weights, None, None)
    with pytest.raises(RuntimeError, match="deltas: expected float32, float64, bfloat16 or float16"):
        native(deltas.int(), boxes, weights, None, None)
    backward = getattr(torch.ops, backend.namespace).apply_deltas_backward
    with pytest.raises(RuntimeError, match=r"grad: expected shape \[3, 4\], got \[3\]"):
        backward(torch.zeros(3), deltas, boxes, weights, None, None)
    with pytest.raises(RuntimeError, match="grad: expected dtype Float, got Double"):
        backward(torch.zeros(3, 4).double(), deltas, boxes, weights, None, None)
