"""IoU of boxes, plain and generalised (Rezatofighi et al., CVPR 2019), in pairs and of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rcnn.ops._check import check_floating, check_shape


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU of ``boxes[i]`` with ``others[i]``.

    Args:
        boxes, others: [..., 4] xyxy of one shape, floating point.

    Returns:
        [...] in (-1, 1], float32 for half types (whose range an area leaves); two boxes without area give 0, never
        NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype.
    """
    boxes, others = _checked(boxes, others)
    intersection, union = _intersection_and_union(boxes, others)
    low, high = torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = _area(low, high)
    return _share(intersection, union) - _share(hull - union, hull)


def pairwise_generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU of every pair: boxes [..., N, 4] and others [..., M, 4] give [..., N, M]; see :func:`generalized_iou`."""
    return generalized_iou(*_pairs(boxes, others))


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of every pair, in 0..1: boxes [..., N, 4] and others [..., M, 4] give [..., N, M].

    Else as :func:`generalized_iou`.
    """
    return _share(*_intersection_and_union(*_checked(*_pairs(boxes, others))))


def _pairs(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Views [..., N, M, 4] of both."""
    shape = (*boxes.shape[:-1], others.shape[-2], 4)
    return boxes.unsqueeze(-2).expand(shape), others.unsqueeze(-3).expand(shape)


def _checked(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    check_shape("others", others, tuple(boxes.shape))
    check_shape("boxes", boxes, (*boxes.shape[:-1], 4))
    check_floating("boxes", boxes)
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    return boxes.to(dtype), others.to(dtype)


def _intersection_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    areas = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:])
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = _area(low, high)
    return intersection, areas - intersection


def _area(low: Tensor, high: Tensor) -> Tensor:
    """Area of the boxes with corners low and high [..., 2], 0 where they are inverted."""
    size = (high - low).clamp(min=0)
    return size[..., 0] * size[..., 1]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0, and without a gradient, of a whole that is no area at all."""
    tiny = torch.finfo(whole.dtype).tiny
    return torch.where(whole >= tiny, part / whole.clamp(min=tiny), 0.0)
