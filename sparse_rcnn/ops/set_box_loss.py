"""L1 and generalised-IoU loss of matched boxes, all stages at once (DETR, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.ops import _check, _library
from sparse_rcnn.ops._check import check_dtype, check_floating, check_integral, check_same_device, check_shape
from sparse_rcnn.ops.box_iou import generalized_iou


def set_box_loss(boxes: Tensor, matches: Tensor, target_boxes: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The two box losses summed over matched pairs.

    Source: DETR (equation 2); Sparse R-CNN, section 3.3.

    Args:
        boxes: [S, B, N, 4] xyxy in pixels, floating point.
        matches: [S, B, M] int64, the proposal of each target, -1 (or anything else outside of 0..N-1) for none.
        target_boxes: [B, M, 4] xyxy in pixels, of the boxes' dtype.
        image_sizes: [B, 2] (height, width) by which the L1 distance is normalised, of the boxes' dtype.

    Returns:
        L1 [S] and 1 - GIoU [S], the sums of each stage; divide them by the number of boxes. Of the boxes' dtype but at
        least float32; NaN for a stage with a box that is not finite, matched or not.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_shape("boxes", boxes, ("S", "B", "N", 4))
    check_shape("matches", matches, (*boxes.shape[:2], "M"))
    check_shape("target_boxes", target_boxes, (*matches.shape[1:], 4))
    check_shape("image_sizes", image_sizes, (boxes.shape[1], 2))
    check_floating("boxes", boxes)
    check_integral("matches", matches)
    check_same_device(boxes=boxes, matches=matches, target_boxes=target_boxes, image_sizes=image_sizes)
    for name, tensor in (("target_boxes", target_boxes), ("image_sizes", image_sizes)):
        check_dtype(name, tensor, boxes.dtype)
    kernels = _library.kernels("set_box_loss", boxes.device)
    if kernels is None:
        return set_box_loss_reference(boxes, matches, target_boxes, image_sizes)
    wide = boxes.to(torch.promote_types(boxes.dtype, torch.float32))  # an area leaves the range of the half types
    return _SetBoxLoss.apply(kernels, wide, matches, target_boxes.to(wide.dtype), image_sizes.to(wide.dtype))


def set_box_loss_reference(
    boxes: Tensor, matches: Tensor, target_boxes: Tensor, image_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification of :func:`set_box_loss`."""
    S, B, M = matches.shape
    N = boxes.shape[2]
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    target_boxes, image_sizes = target_boxes.to(boxes.dtype), image_sizes.to(boxes.dtype)
    if M == 0 or N == 0:  # nothing to gather; keeps the graph, as a batch without boxes must
        zero = boxes.flatten(1).sum(1) * 0.0
        return zero, zero
    index = matches.clamp(0, N - 1)
    matched = index == matches
    chosen = boxes.gather(2, index.unsqueeze(-1).expand(S, B, M, 4))
    targets = target_boxes.expand(S, B, M, 4)
    scale = image_sizes.flip(-1).repeat(1, 2).view(1, B, 1, 4)  # (w, h, w, h)
    giou = 1 - generalized_iou(chosen, targets)
    l1 = (chosen / scale - targets / scale).abs().sum(-1)
    zero, nan = l1.new_zeros(()), _check.nan_unless_finite(boxes)
    l1, giou = torch.where(matched, l1, zero), torch.where(matched, giou, zero)
    return l1.flatten(1).sum(1) + nan, giou.flatten(1).sum(1) + nan


class _SetBoxLoss(torch.autograd.Function):
    """The kernel makes both losses and their gradients in one pass; the backward only weighs them."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Any, boxes: Tensor, matches: Tensor, target_boxes: Tensor, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        l1, giou, grad_l1, grad_giou = kernels.set_box_loss(boxes, matches, target_boxes, image_sizes)
        ctx.save_for_backward(grad_l1, grad_giou)
        return l1, giou

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_l1: Tensor, by_giou: Tensor) -> tuple[Tensor | None, ...]:
        grad_l1, grad_giou = ctx.saved_tensors
        grad = torch.addcmul(grad_l1 * by_l1.view(-1, 1, 1, 1), grad_giou, by_giou.view(-1, 1, 1, 1))
        return None, grad, None, None, None


def _fake(boxes: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = boxes.new_empty(boxes.shape[0])
    return loss, torch.empty_like(loss), boxes.new_empty(boxes.shape), boxes.new_empty(boxes.shape)


_library.declare("set_box_loss", fake=_fake)
_library.declare_triton("set_box_loss")
