"""The matching cost of all (proposal, target) pairs of all stages and images in one Triton launch.

A program makes a tile of BLOCK_N proposals by BLOCK_M targets of one stage and image: it reads the logit of each
pair's class where it lies, so neither a one-hot nor a [N, K] probability is ever written. Bound by the write of the
cost, S * B * N * M * 4 bytes: 7 MB for six stages, 16 images, 300 proposals and 63 targets, under 2 us of an H200's
bandwidth; the launch is longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rcnn.kernels.box_math import generalized_iou, power

BLOCK_N, BLOCK_M, BLOCK_K = 32, 16, 64


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_counts: Tensor,
    image_sizes: Tensor,
    weights: Sequence[float],
    alpha: float,
    gamma: float,
    classification: str,
    non_finite_cost: float,
) -> Tensor:
    """See ``sparse_rcnn.ops.matching_cost``, which has checked the arguments."""
    S, B, N, K = logits.shape
    M = target_labels.shape[1]
    cost = boxes.new_empty(S, B, N, M)
    if cost.numel() == 0:
        return cost
    grid = (S * B, triton.cdiv(N, BLOCK_N), triton.cdiv(M, BLOCK_M))
    _matching_cost_kernel[grid](
        *(logits.contiguous(), boxes.contiguous(), target_labels.contiguous(), target_boxes.contiguous()),
        *(target_counts.contiguous(), image_sizes.contiguous(), cost, B, N, M),
        K=K, CLASS_WEIGHT=float(weights[0]), L1_WEIGHT=float(weights[1]), GIOU_WEIGHT=float(weights[2]),
        ALPHA=float(alpha), GAMMA=float(gamma), FOCAL=classification == "focal",
        NON_FINITE_COST=non_finite_cost, TINY=torch.finfo(boxes.dtype).tiny,
        BLOCK_N=BLOCK_N, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return cost


@triton.jit
def _matching_cost_kernel(
    logits,  # [S, B, N, K]
    boxes,  # [S, B, N, 4]
    target_labels,  # [B, M]
    target_boxes,  # [B, M, 4]
    target_counts,  # [B]
    image_sizes,  # [B, 2]
    cost,  # [S, B, N, M]
    B,
    N,
    M,
    K: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    L1_WEIGHT: tl.constexpr,
    GIOU_WEIGHT: tl.constexpr,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    NON_FINITE_COST: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)  # stage * B + image
    image = problem % B
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < M
    pair = in_n[:, None] & in_m[None, :]

    box = boxes + (problem * N + n)[:, None] * 4
    ax1 = tl.load(box + 0, mask=in_n[:, None], other=0.0)
    ay1 = tl.load(box + 1, mask=in_n[:, None], other=0.0)
    ax2 = tl.load(box + 2, mask=in_n[:, None], other=0.0)
    ay2 = tl.load(box + 3, mask=in_n[:, None], other=0.0)
    target = target_boxes + (image * M + m)[None, :] * 4
    bx1 = tl.load(target + 0, mask=in_m[None, :], other=0.0)
    by1 = tl.load(target + 1, mask=in_m[None, :], other=0.0)
    bx2 = tl.load(target + 2, mask=in_m[None, :], other=0.0)
    by2 = tl.load(target + 3, mask=in_m[None, :], other=0.0)
    height, width = tl.load(image_sizes + image * 2), tl.load(image_sizes + image * 2 + 1)

    label = tl.load(target_labels + image * M + m, mask=in_m, other=0)
    row = logits + (problem * N + n)[:, None] * K
    is_class = (label >= 0) & (label < K)
    logit = tl.load(row + label[None, :], mask=pair & is_class[None, :], other=float("nan"))
    if FOCAL:
        small = tl.exp(-tl.abs(logit))
        p = tl.where(logit >= 0.0, 1.0, small) / (1.0 + small)  # sigmoid(logit)
        q = tl.where(logit >= 0.0, small, 1.0) / (1.0 + small)  # sigmoid(-logit), not rounded as 1 - p is
        positive = ALPHA * power(q, GAMMA) * -tl.log(p + 1e-8)
        negative = (1.0 - ALPHA) * power(p, GAMMA) * -tl.log(q + 1e-8)
        class_cost = positive - negative
    else:
        top = tl.full((BLOCK_N,), -float("inf"), ax1.dtype)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            values = tl.load(row + k[None, :], mask=in_n[:, None] & (k < K)[None, :], other=-float("inf"))
            top = tl.maximum(top, tl.max(values, 1))
        total = tl.zeros((BLOCK_N,), ax1.dtype)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            values = tl.load(row + k[None, :], mask=in_n[:, None] & (k < K)[None, :], other=-float("inf"))
            total += tl.sum(tl.exp(values - top[:, None]), 1)
        class_cost = -tl.exp(logit - top[:, None]) / total[:, None]

    l1 = tl.abs(ax1 / width - bx1 / width) + tl.abs(ay1 / height - by1 / height)
    l1 += tl.abs(ax2 / width - bx2 / width) + tl.abs(ay2 / height - by2 / height)
    giou = generalized_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, TINY)
    value = CLASS_WEIGHT * class_cost + L1_WEIGHT * l1 - GIOU_WEIGHT * giou
    # x - x is 0 for a finite x and NaN for all others.
    finite = (value - value == 0.0) & (logit - logit == 0.0)
    value = tl.where(finite, value, NON_FINITE_COST)
    value = tl.where((m < tl.load(target_counts + image))[None, :], value, 0.0)
    tl.store(cost + (problem * N + n)[:, None] * M + m[None, :], value, mask=pair)
