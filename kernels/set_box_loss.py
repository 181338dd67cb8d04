"""L1 and generalised-IoU loss of all stages' matched boxes with their gradients, in one pass of Triton.

A program takes BLOCK targets of one stage and image. A proposal has one target at most, so gradients are plain
stores. A few kilobytes a stage: the launch is the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rcnn.kernels.box_math import box_area

BLOCK = 64


def set_box_loss(
    boxes: Tensor, matches: Tensor, target_boxes: Tensor, image_sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two losses of each stage and their gradients.

    Args:
        boxes: [S, B, N, 4] float32 or float64.
        matches: [S, B, M] int64, the proposal of each target, -1 for none.
        target_boxes: [B, M, 4].
        image_sizes: [B, 2].

    Returns:
        L1 [S], 1 - GIoU [S], and the gradient of each with respect to its boxes, [S, B, N, 4] twice.
    """
    S, B, M = matches.shape
    N = boxes.shape[2]
    grad_l1, grad_giou = torch.zeros_like(boxes), torch.zeros_like(boxes)
    programs = max(1, triton.cdiv(M, BLOCK))  # an image
    parts = boxes.new_zeros(2, S, B, programs)
    if parts.numel() and N:
        _set_box_loss_kernel[(S * B, programs)](
            *(boxes.contiguous(), matches.contiguous(), target_boxes.contiguous(), image_sizes.contiguous()),
            *(grad_l1, grad_giou, parts[0], parts[1], B, N, M),
            TINY=torch.finfo(boxes.dtype).tiny, BLOCK=BLOCK, ROUNDS=triton.cdiv(N * 4, programs * BLOCK),
        )  # fmt: skip
    l1, giou = parts.flatten(2).sum(2)
    return l1, giou, grad_l1, grad_giou


@triton.jit
def _larger_slope(a, b):
    """d max(a, b) / da: halves at a tie, as autograd has it."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _set_box_loss_kernel(
    boxes,  # [S, B, N, 4]
    matches,  # [S, B, M]
    target_boxes,  # [B, M, 4]
    image_sizes,  # [B, 2]
    grad_l1,  # [S, B, N, 4]
    grad_giou,  # [S, B, N, 4]
    l1_parts,  # [S, B, programs]
    giou_parts,  # [S, B, programs]
    B,
    N,
    M,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,  # in which an image's programs look at all of its coordinates
):
    problem = tl.program_id(0).to(tl.int64)  # stage * B + image
    image = problem % B
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    match = tl.load(matches + problem * M + m, mask=m < M, other=-1)
    matched = (match >= 0) & (match < N)
    place = (problem * N + match) * 4
    ax1 = tl.load(boxes + place + 0, mask=matched, other=0.0)
    ay1 = tl.load(boxes + place + 1, mask=matched, other=0.0)
    ax2 = tl.load(boxes + place + 2, mask=matched, other=0.0)
    ay2 = tl.load(boxes + place + 3, mask=matched, other=0.0)
    target = target_boxes + (image * M + m) * 4
    bx1 = tl.load(target + 0, mask=matched, other=0.0)
    by1 = tl.load(target + 1, mask=matched, other=0.0)
    bx2 = tl.load(target + 2, mask=matched, other=0.0)
    by2 = tl.load(target + 3, mask=matched, other=0.0)
    height, width = tl.load(image_sizes + image * 2), tl.load(image_sizes + image * 2 + 1)

    l1 = tl.abs(ax1 / width - bx1 / width) + tl.abs(ay1 / height - by1 / height)
    l1 += tl.abs(ax2 / width - bx2 / width) + tl.abs(ay2 / height - by2 / height)
    tl.store(grad_l1 + place + 0, _sign(ax1 - bx1) / width, mask=matched)
    tl.store(grad_l1 + place + 1, _sign(ay1 - by1) / height, mask=matched)
    tl.store(grad_l1 + place + 2, _sign(ax2 - bx2) / width, mask=matched)
    tl.store(grad_l1 + place + 3, _sign(ay2 - by2) / height, mask=matched)

    overlap_w = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    overlap_h = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    hull_w = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
    hull_h = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
    overlap = tl.maximum(overlap_w, 0.0) * tl.maximum(overlap_h, 0.0)
    hull = tl.maximum(hull_w, 0.0) * tl.maximum(hull_h, 0.0)
    union = box_area(ax1, ay1, ax2, ay2) + box_area(bx1, by1, bx2, by2) - overlap
    by_one_union = tl.where(union >= TINY, 1.0 / tl.maximum(union, TINY), 0.0)  # nothing depends on what is no area
    by_one_hull = tl.where(hull >= TINY, 1.0 / tl.maximum(hull, TINY), 0.0)
    iou = tl.where(union >= TINY, overlap / tl.maximum(union, TINY), 0.0)
    unfilled = tl.where(hull >= TINY, (hull - union) / tl.maximum(hull, TINY), 0.0)

    # GIoU = overlap / union - (hull - union) / hull, with union = area + area' - overlap.
    by_union = by_one_hull - iou * by_one_union
    by_overlap = by_one_union - by_union
    by_hull = (unfilled - 1.0) * by_one_hull
    # Of a side that was clamped to 0 nothing depends on the box.
    area_dw = by_union * tl.where(ax2 - ax1 >= 0.0, tl.maximum(ay2 - ay1, 0.0), 0.0)
    area_dh = by_union * tl.where(ay2 - ay1 >= 0.0, tl.maximum(ax2 - ax1, 0.0), 0.0)
    overlap_dw = by_overlap * tl.where(overlap_w >= 0.0, tl.maximum(overlap_h, 0.0), 0.0)
    overlap_dh = by_overlap * tl.where(overlap_h >= 0.0, tl.maximum(overlap_w, 0.0), 0.0)
    hull_dw = by_hull * tl.where(hull_w >= 0.0, tl.maximum(hull_h, 0.0), 0.0)
    hull_dh = by_hull * tl.where(hull_h >= 0.0, tl.maximum(hull_w, 0.0), 0.0)
    dx1 = -area_dw - overlap_dw * _larger_slope(ax1, bx1) - hull_dw * _larger_slope(bx1, ax1)
    dy1 = -area_dh - overlap_dh * _larger_slope(ay1, by1) - hull_dh * _larger_slope(by1, ay1)
    dx2 = area_dw + overlap_dw * _larger_slope(bx2, ax2) + hull_dw * _larger_slope(ax2, bx2)
    dy2 = area_dh + overlap_dh * _larger_slope(by2, ay2) + hull_dh * _larger_slope(ay2, by2)
    tl.store(grad_giou + place + 0, -dx1, mask=matched)
    tl.store(grad_giou + place + 1, -dy1, mask=matched)
    tl.store(grad_giou + place + 2, -dx2, mask=matched)
    tl.store(grad_giou + place + 3, -dy2, mask=matched)

    zero = tl.zeros((BLOCK,), ax1.dtype)  # NaN where a box is not finite, matched or not
    for turn in range(ROUNDS):
        coordinate = (turn * tl.num_programs(1) + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(boxes + problem * N * 4 + coordinate, mask=coordinate < N * 4, other=0.0)
        zero += value - value
    part = problem * tl.num_programs(1) + tl.program_id(1)
    tl.store(l1_parts + part, tl.sum(tl.where(matched, l1, 0.0) + zero, 0))
    tl.store(giou_parts + part, tl.sum(tl.where(matched, 1.0 - (iou - unfilled), 0.0) + zero, 0))


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
