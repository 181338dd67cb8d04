"""Multi-scale RoIAlign and the dynamic interaction as one operator: what the head runs at every stage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparse_rcnn.ops._check import check_shape
from sparse_rcnn.ops.dynamic_conv import check_norms, check_parameters, dynamic_conv_reference
from sparse_rcnn.ops.multiscale_roi_align import check_roi_align, multiscale_roi_align_reference


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
    return roi_dynamic_conv_reference(
        *(features, boxes, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias),
        *(strides, output_size, sampling_ratio, level_rule, eps),
    )


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
