"""The head's box branch as one operator: tower, prediction and decoding (Sparse R-CNN, section 3.2). Inference only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_floating, check_same_device, check_same_dtype, check_shape
from sparse_rcnn.ops.add_layer_norm import add_layer_norm, add_layer_norm_reference
from sparse_rcnn.ops.apply_deltas import DELTA_WEIGHTS, apply_deltas, apply_deltas_reference

# What one launch takes; above it the steps run one by one.
MAX_LAYERS = 8
MAX_CHANNELS = 1536


def refine_boxes(
    x: Tensor,
    boxes: Tensor,
    tower_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    delta_weight: Tensor,
    delta_bias: Tensor,
    weights: Sequence[float] = DELTA_WEIGHTS,
    clamp: tuple[float | None, float | None] = (None, None),
    eps: float = 1e-5,
) -> Tensor:
    """Refine every box by what its proposal's features predict: n x (Linear, LayerNorm, ReLU), Linear(4), decoding.

    Source: Sparse R-CNN, section 3.2 (three such layers). On a GPU one launch. On the CPU the operators that it
    consists of: seven eighths of their time (float32; bfloat16: two thirds) are matrix products of PyTorch's.

    Args:
        x: [R, C] floating point, the proposals' features.
        boxes: [R, 4] xyxy.
        tower_weights: n of [C, C], outputs by inputs, without bias.
        norm_weights, norm_biases: n of [C], of the LayerNorms.
        delta_weight, delta_bias: [4, C] and [4], of the prediction of (dx, dy, dw, dh).
        weights, clamp: as in :func:`apply_deltas`.
        eps: of the LayerNorms.

    Returns:
        [R, 4] xyxy boxes, not clipped to the image, in the dtype of ``boxes``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        RuntimeError: a gradient is wanted.
    """
    tower = (tower_weights, norm_weights, norm_biases, delta_weight, delta_bias)
    _check(x, boxes, *tower, weights)
    tensors = (x, boxes, *tower_weights, *norm_weights, *norm_biases, delta_weight, delta_bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "refine_boxes has no gradient: call it under torch.no_grad(), or its steps one by one "
            "(Linear, add_layer_norm, apply_deltas)"
        )
    fits = len(tower_weights) <= MAX_LAYERS and x.shape[1] <= MAX_CHANNELS
    if not fits or _library.serving("refine_boxes", x.device.type) == _library.REFERENCE:
        return _compose(add_layer_norm, apply_deltas, x, boxes, *tower, weights, clamp, eps)
    native = _library.kernels("refine_boxes", x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    refined = native.refine_boxes(
        *(x, boxes.to(torch.promote_types(boxes.dtype, torch.float32)), list(tower_weights)),
        *([norm.to(wide) for norm in norms] for norms in (norm_weights, norm_biases)),
        *(delta_weight, delta_bias, [float(weight) for weight in weights], *clamp, eps),
    )
    return refined.to(boxes.dtype)


def refine_boxes_reference(
    x: Tensor,
    boxes: Tensor,
    tower_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    delta_weight: Tensor,
    delta_bias: Tensor,
    weights: Sequence[float] = DELTA_WEIGHTS,
    clamp: tuple[float | None, float | None] = (None, None),
    eps: float = 1e-5,
) -> Tensor:
    """The specification of :func:`refine_boxes`."""
    tower = (tower_weights, norm_weights, norm_biases, delta_weight, delta_bias)
    return _compose(add_layer_norm_reference, apply_deltas_reference, x, boxes, *tower, weights, clamp, eps)


def _compose(
    layer_norm: Any,
    decode: Any,
    x: Tensor,
    boxes: Tensor,
    tower_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    delta_weight: Tensor,
    delta_bias: Tensor,
    weights: Sequence[float],
    clamp: tuple[float | None, float | None],
    eps: float,
) -> Tensor:
    for weight, norm_weight, norm_bias in zip(tower_weights, norm_weights, norm_biases, strict=True):
        x = layer_norm(F.linear(x, weight), None, norm_weight, norm_bias, eps, True)
    return decode(F.linear(x, delta_weight, delta_bias), boxes, weights, clamp).to(boxes.dtype)


def _check(
    x: Tensor,
    boxes: Tensor,
    tower_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    delta_weight: Tensor,
    delta_bias: Tensor,
    weights: Sequence[float],
) -> None:
    check_shape("x", x, ("R", "C"))
    R, C = x.shape
    if C == 0:
        raise ValueError(f"x: expected shape [R, C] with C >= 1, got {list(x.shape)}")
    check_shape("boxes", boxes, (R, 4))
    check_floating("boxes", boxes)
    if not len(tower_weights) == len(norm_weights) == len(norm_biases):
        lengths = f"{len(tower_weights)}, {len(norm_weights)} and {len(norm_biases)}"
        raise ValueError(f"tower_weights, norm_weights, norm_biases: expected one of each a layer, got {lengths}")
    like_x = {f"tower_weights[{i}]": weight for i, weight in enumerate(tower_weights)}
    like_x |= {"delta_weight": delta_weight, "delta_bias": delta_bias}
    norms = {f"norm_weights[{i}]": norm for i, norm in enumerate(norm_weights)}
    norms |= {f"norm_biases[{i}]": norm for i, norm in enumerate(norm_biases)}
    shapes = {"delta_weight": (4, C), "delta_bias": (4,)}
    for name, tensor in (like_x | norms).items():
        check_shape(name, tensor, shapes.get(name, (C,) if name in norms else (C, C)))
    for name, tensor in {"x": x, **norms}.items():
        check_floating(name, tensor)
    check_same_dtype(x=x, **like_x)
    check_same_device(x=x, boxes=boxes, **like_x, **norms)
    if len(weights) != 4:
        raise ValueError(f"weights: expected four numbers, got {list(weights)}")


def _fake(x: Tensor, boxes: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(boxes, memory_format=torch.contiguous_format)


def _autocast(
    dtype: torch.dtype,
    x: Tensor,
    boxes: Tensor,
    tower_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    delta_weight: Tensor,
    delta_bias: Tensor,
    *rest: Any,
) -> tuple[Any, ...]:
    dtype = x.dtype if x.dtype == torch.float64 else dtype  # which autocast leaves alone
    tower = [weight.to(dtype) for weight in tower_weights]
    return x.to(dtype), boxes, tower, norm_weights, norm_biases, delta_weight.to(dtype), delta_bias.to(dtype), *rest


_library.declare("refine_boxes", fake=_fake, autocast=_autocast)
