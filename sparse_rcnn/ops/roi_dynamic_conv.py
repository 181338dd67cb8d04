"""Multi-scale RoIAlign and the dynamic interaction as one operator: what the head runs at every stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_same_device, check_same_dtype, check_shape
from sparse_rcnn.ops.dynamic_conv import (
    check_norms,
    check_parameters,
    dynamic_conv_reference,
    split_norm_grads,
    tf32_allowed,
    wide_norms,
)
from sparse_rcnn.ops.multiscale_roi_align import check_roi_align, multiscale_roi_align_reference, wide_boxes
from sparse_rcnn.ops.shared_gradients import SharedFeatures, call_sharing, new_grad_cells, split_grad_cells


def roi_dynamic_conv(
    features: Sequence[Tensor],
    boxes: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    strides: Sequence[int],
    output_size: int = 7,
    sampling_ratio: int = 2,
    level_rule: str = "detectron2",
    eps: float = 1e-5,
) -> Tensor:
    """``dynamic_conv(multiscale_roi_align(features, boxes), parameters)``; arguments as in these two.

    Source: Sparse R-CNN, sections 3.1 and 3.2.

    Args:
        features: L maps [B, C, Hl, Wl].
        boxes: [B, N, 4] xyxy in pixels; no gradient flows to them.
        parameters: [B * N, 2 * C * D].
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [D], [D], [C], [C].
        strides: pixels a cell of each level.

    Returns:
        [B, N, P, C].

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    check_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule)
    channels = features[0].shape[1]
    check_shape("norm1_weight", norm1_weight, ("D",))
    check_parameters(parameters, boxes.shape[0] * boxes.shape[1], channels, norm1_weight.shape[0])
    check_norms(channels, norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    check_same_dtype(**{"features[0]": features[0], "parameters": parameters})
    check_same_device(boxes=boxes, parameters=parameters, norm1_weight=norm1_weight, norm1_bias=norm1_bias)
    check_same_device(boxes=boxes, norm2_weight=norm2_weight, norm2_bias=norm2_bias)
    native = _library.kernels("roi_dynamic_conv", boxes.device)
    norms = (norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    options = (strides, output_size, sampling_ratio, level_rule, eps)
    if native is None:
        return roi_dynamic_conv_reference(features, boxes, parameters, *norms, *options)
    norms, boxes = wide_norms(norms, features[0].dtype), wide_boxes(boxes)
    options = (*options, tf32_allowed())
    if _can_share(features):
        parameters = parameters.to(features[0].dtype)  # what autocast would have done
        backward = partial(_backward_sharing, native)
        return call_sharing(features, native.roi_dynamic_conv, backward, boxes, parameters, *norms, *options)
    return native.roi_dynamic_conv(list(features), boxes, parameters, *norms, *options)


def roi_dynamic_conv_reference(
    features: Sequence[Tensor],
    boxes: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    strides: Sequence[int],
    output_size: int = 7,
    sampling_ratio: int = 2,
    level_rule: str = "detectron2",
    eps: float = 1e-5,
) -> Tensor:
    """The specification of :func:`roi_dynamic_conv`."""
    roi = multiscale_roi_align_reference(features, boxes, strides, output_size, sampling_ratio, level_rule)
    x = dynamic_conv_reference(roi.flatten(0, 1), parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias, eps)
    return x.view_as(roi)


def _can_share(features: Sequence[Tensor]) -> bool:
    """Whether the gradient goes to a shared buffer; maps that autocast has to cast first are not the shared ones."""
    if not isinstance(features, SharedFeatures) or not torch.is_grad_enabled():
        return False
    device_type = features[0].device.type
    return not torch.is_autocast_enabled(device_type) or features[0].dtype == torch.get_autocast_dtype(device_type)


def _fake(
    features: Sequence[Tensor],
    boxes: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    strides: Sequence[int],
    output_size: int,
    *rest: Any,
) -> Tensor:
    return features[0].new_empty(*boxes.shape[:2], output_size**2, features[0].shape[1])


def _fake_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    norm_sizes = 2 * (norm1_weight.shape[0] + norm2_weight.shape[0])
    return (
        torch.empty_like(parameters, memory_format=torch.contiguous_format),
        norm1_weight.new_empty(parameters.shape[0], norm_sizes),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, parameters, *norms = inputs[:7]
    ctx.options = inputs[7:]
    ctx.save_for_backward(*features, boxes, parameters, *norms)


def _backward(native: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias = ctx.saved_tensors
    wanted = any(ctx.needs_input_grad[0])
    cells = new_grad_cells(features) if wanted else _no_cells(features, norm1_weight.dtype)
    arguments = (boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias, *ctx.options)
    grads = _backward_sharing(native, grad, features, cells, *arguments)
    return split_grad_cells(cells, features) if wanted else [None] * len(features), *grads


def _no_cells(features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The empty buffer that tells the kernel that the maps need no gradient."""
    return torch.empty(0, features[0].shape[1], dtype=dtype, device=features[0].device)


def _backward_sharing(
    native: Any,
    grad: Tensor,
    features: Sequence[Tensor],
    cells: Tensor,
    boxes: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    grad_parameters, grad_norms = native.roi_dynamic_conv_backward(
        *(grad, features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias),
        *(*options, torch.are_deterministic_algorithms_enabled(), cells),
    )
    grads = split_norm_grads(grad_norms, norm1_weight.shape[0], norm2_weight.shape[0])
    return None, grad_parameters, *grads, *(None for _ in options)


def _autocast(
    dtype: torch.dtype, features: Sequence[Tensor], boxes: Tensor, parameters: Tensor, *rest: Any
) -> tuple[Any, ...]:
    return [feature.to(dtype) for feature in features], boxes, parameters.to(dtype), *rest


_library.declare("roi_dynamic_conv", fake=_fake, setup_context=_setup_context, backward=_backward, autocast=_autocast)
_library.declare("roi_dynamic_conv_backward", fake=_fake_backward)
