"""Box decoding: four deltas move and scale a box (R-CNN, appendix C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_floating, check_same_device, check_shape

# A centre that moves by dx * width needs small dx: the official code divides the raw deltas by these.
DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)


def apply_deltas(
    deltas: Tensor,
    boxes: Tensor,
    weights: Sequence[float] = DELTA_WEIGHTS,
    clamp: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """Decode (dx, dy, dw, dh) relative to ``boxes``.

    Source: R-CNN, appendix C; detectron2's ``Box2BoxTransform``.

    Args:
        deltas: [..., 4] floating point, divided by ``weights`` first.
        boxes: [..., 4] xyxy of the same shape and device.
        weights: divisors of dx, dy, dw, dh.
        clamp: (lower, upper) bound of dw and dh before exp(); None is no bound.

    Returns:
        [..., 4] xyxy boxes, not clipped to the image, in the wider of the two dtypes.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_shape("deltas", deltas, (*boxes.shape[:-1], 4))
    check_shape("boxes", boxes, tuple(deltas.shape))
    check_floating("deltas", deltas)
    check_floating("boxes", boxes)
    check_same_device(deltas=deltas, boxes=boxes)
    if len(weights) != 4:
        raise ValueError(f"weights: expected four numbers, got {list(weights)}")
    native = _library.kernels("apply_deltas", deltas.device)
    if native is None:
        return apply_deltas_reference(deltas, boxes, weights, clamp)
    return native.apply_deltas(deltas, boxes, [float(weight) for weight in weights], *clamp)


def apply_deltas_reference(
    deltas: Tensor,
    boxes: Tensor,
    weights: Sequence[float] = DELTA_WEIGHTS,
    clamp: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """The specification of :func:`apply_deltas`."""
    deltas = deltas.to(torch.promote_types(deltas.dtype, boxes.dtype))
    sizes = boxes[..., 2:] - boxes[..., :2]
    centers = boxes[..., :2] + 0.5 * sizes
    deltas = torch.stack([delta / weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)], -1)
    shift, scale = deltas[..., :2], deltas[..., 2:]
    if clamp != (None, None):
        scale = scale.clamp(min=clamp[0], max=clamp[1])
    centers = shift * sizes + centers
    sizes = scale.exp() * sizes
    return torch.cat([centers - 0.5 * sizes, centers + 0.5 * sizes], dim=-1)


def _fake(deltas: Tensor, boxes: Tensor, weights: Sequence[float], lower: float | None, upper: float | None) -> Tensor:
    return deltas.new_empty(deltas.shape, dtype=torch.promote_types(deltas.dtype, boxes.dtype))


def _fake_backward(grad: Tensor, deltas: Tensor, boxes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return deltas.new_empty(deltas.shape), boxes.new_empty(boxes.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    deltas, boxes, *ctx.options = inputs
    ctx.save_for_backward(deltas, boxes)


def _backward(native: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_deltas, grad_boxes = native.apply_deltas_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad_deltas, grad_boxes, None, None, None


_library.declare("apply_deltas", fake=_fake, setup_context=_setup_context, backward=_backward)
_library.declare("apply_deltas_backward", fake=_fake_backward)
