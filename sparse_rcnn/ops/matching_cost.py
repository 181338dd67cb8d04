"""The cost of every (proposal, target) pair, for all stages and images at once (DETR, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_dtype, check_floating, check_integral, check_same_device, check_shape
from sparse_rcnn.ops.box_iou import pairwise_generalized_iou

# What a NaN or infinite entry becomes: worse than any real pair, and finite, so that an assignment always exists.
NON_FINITE_COST = 1e6


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_counts: Tensor,
    image_sizes: Tensor,
    weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
    alpha: float = 0.25,
    gamma: float = 2.0,
    classification: str = "focal",
) -> Tensor:
    """Weighted sum of the class cost, the L1 distance and the negated generalised IoU of every pair.

    Source: DETR (section 3.1) with the focal class cost of Deformable DETR; Sparse R-CNN, section 3.3.

    Args:
        logits: [S, B, N, K]; for ``softmax`` the last class is "no object".
        boxes: [S, B, N, 4] xyxy in pixels.
        target_labels: [B, M] int64, padded to the largest count M with anything.
        target_boxes: [B, M, 4] xyxy in pixels, padded with anything.
        target_counts: [B] int64, how many of the M are real.
        image_sizes: [B, 2] (height, width) by which the L1 distance is normalised, of the boxes' dtype.
        weights: of the class cost, the L1 distance and the IoU.
        alpha, gamma: of the focal class cost.
        classification: ``focal`` or ``softmax``.

    Returns:
        [S, B, N, M] costs without a gradient, of the boxes' dtype but at least float32 (areas leave the range of the
        half types); 0 in padding, ``NON_FINITE_COST`` where a logit or box is not finite or the label is no class.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    S, B, N = check_predictions(logits, boxes)
    check_targets(B, target_labels, target_boxes)
    check_shape("target_counts", target_counts, (B,))
    check_integral("target_counts", target_counts)
    check_shape("image_sizes", image_sizes, (B, 2))
    check_same_device(
        boxes=boxes, target_labels=target_labels, target_boxes=target_boxes, target_counts=target_counts,
        image_sizes=image_sizes,
    )  # fmt: skip
    for name, tensor in (("target_boxes", target_boxes), ("image_sizes", image_sizes)):
        check_dtype(name, tensor, boxes.dtype)
    if classification not in ("focal", "softmax"):
        raise ValueError(f"classification: expected focal or softmax, got {classification!r}")
    arguments = (logits, boxes, target_labels, target_boxes, target_counts, image_sizes)
    kernels = _library.kernels("matching_cost", boxes.device)
    if kernels is None:
        return matching_cost_reference(*arguments, weights, alpha, gamma, classification)
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    arguments = [a.detach().to(dtype) if a.is_floating_point() else a for a in arguments]
    options = ([float(weight) for weight in weights], alpha, gamma, classification, NON_FINITE_COST)
    return kernels.matching_cost(*arguments, *options)


@torch.no_grad()
def matching_cost_reference(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_counts: Tensor,
    image_sizes: Tensor,
    weights: tuple[float, float, float] = (2.0, 5.0, 2.0),
    alpha: float = 0.25,
    gamma: float = 2.0,
    classification: str = "focal",
) -> Tensor:
    """The specification of :func:`matching_cost`."""
    S, B, N, K = logits.shape
    M = target_labels.shape[1]
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    logits, boxes, target_boxes, image_sizes = (t.to(dtype) for t in (logits, boxes, target_boxes, image_sizes))
    labels = target_labels.view(1, B, 1, M).expand(S, B, N, M)
    places = labels.clamp(0, K - 1)
    chosen = torch.where(labels == places, logits.gather(3, places), torch.nan)
    if classification == "focal":
        class_cost = _focal_cost(chosen, alpha, gamma)
    else:
        class_cost = -logits.softmax(-1).gather(3, places)
    scale = image_sizes.flip(-1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    normalised = target_boxes / scale.view(B, 1, 4)
    l1_cost = torch.cdist(boxes / scale.view(1, B, 1, 4), normalised.expand(S, B, M, 4), p=1)
    giou = pairwise_generalized_iou(boxes, target_boxes.expand(S, B, M, 4))
    cost = weights[0] * class_cost + weights[1] * l1_cost - weights[2] * giou
    cost = torch.where(cost.isfinite() & chosen.isfinite(), cost, NON_FINITE_COST)
    padding = torch.arange(M, device=boxes.device) >= target_counts.view(B, 1)  # [B, M]
    return cost.masked_fill(padding.view(1, B, 1, M), 0.0)


def _focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss as a positive minus focal loss as a negative; the 1e-8 inside the log is the official code's."""
    p, q = logits.sigmoid(), (-logits).sigmoid()  # q is 1 - p, not rounded to a multiple of 6e-8
    positive = alpha * q**gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(q + 1e-8).log()
    return positive - negative


def check_predictions(logits: Tensor, boxes: Tensor) -> tuple[int, int, int]:
    """Raise unless logits [S, B, N, K] and boxes [S, B, N, 4] fit; return S, B, N."""
    check_shape("logits", logits, ("S", "B", "N", "K"))
    check_shape("boxes", boxes, (*logits.shape[:3], 4))
    check_floating("logits", logits)
    check_floating("boxes", boxes)
    check_same_device(boxes=boxes, logits=logits)
    return boxes.shape[0], boxes.shape[1], boxes.shape[2]


def check_targets(batch: int, target_labels: Tensor, target_boxes: Tensor) -> None:
    """Raise unless target_labels [B, M] and target_boxes [B, M, 4] fit."""
    check_shape("target_labels", target_labels, (batch, "M"))
    check_integral("target_labels", target_labels)
    check_shape("target_boxes", target_boxes, (*target_labels.shape, 4))
    check_floating("target_boxes", target_boxes)


def _fake(logits: Tensor, boxes: Tensor, target_labels: Tensor, *rest: Any) -> Tensor:
    return boxes.new_empty(*boxes.shape[:3], target_labels.shape[1])


_library.declare("matching_cost", fake=_fake)
_library.declare_triton("matching_cost")
