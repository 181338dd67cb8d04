"""Sigmoid focal loss of all stages and its gradient in one pass of Triton.

The class of a proposal comes as one index, not as a one-hot. A program reads BLOCK logits, writes their gradient and
one partial sum: bound by reading and writing the logits once, 37 MB in float32 for six stages, 16 images, 300
proposals and 80 classes, 9 us of an H200's bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_rcnn.kernels.box_math import power

BLOCK = 1024


def set_focal_loss(logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The loss of each stage and its gradient.

    Args:
        logits: [S, B, N, K] float32 or float64.
        classes: [S, B, N] int64, outside of 0..K-1 for a proposal without a target.

    Returns:
        [S], and the gradient of each of them with respect to its logits, [S, B, N, K].
    """
    S, K = logits.shape[0], logits.shape[3]
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    elements = logits.numel() // max(S, 1)
    parts = logits.new_empty(S, triton.cdiv(elements, BLOCK))  # each is written
    if parts.numel():
        _set_focal_loss_kernel[(parts.shape[1], S)](
            *(logits.contiguous(), classes.contiguous(), grad, parts, elements, K),
            ALPHA=float(alpha), GAMMA=float(gamma), BLOCK=BLOCK,
        )  # fmt: skip
    return parts.sum(1), grad


@triton.jit
def _set_focal_loss_kernel(
    logits,  # [S, elements]
    classes,  # [S, elements / K]
    grad,  # [S, elements]
    parts,  # [S, programs]
    elements,
    K,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stage = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    x = tl.load(logits + stage * elements + element, mask=inside, other=0.0)
    wanted = tl.load(classes + stage * (elements // K) + element // K, mask=inside, other=K)
    positive = wanted == element % K

    # The loss of a positive is that of a negative with the sign of the logit turned, and another weight.
    z = tl.where(positive, -x, x)
    weight = tl.where(positive, tl.full((BLOCK,), ALPHA, x.dtype), 1.0 - ALPHA)  # where() alone makes it float32
    small = tl.exp(-tl.abs(z))
    # log(1 + small), with what the rounding of the sum lost; z - z is NaN for a logit that is not finite, of which
    # minus infinity would else cost nothing.
    rounded = 1.0 + small
    cross_entropy = tl.maximum(z, 0.0) + tl.log(rounded) - ((rounded - 1.0) - small) / rounded + (z - z)
    miss = tl.where(z >= 0.0, 1.0, small) / (1.0 + small)  # sigmoid(z)
    modulated = weight * power(miss, GAMMA)
    slope = modulated * (miss + GAMMA * (1.0 - miss) * cross_entropy)
    slope = tl.where(positive, -slope, slope)
    tl.store(grad + stage * elements + element, slope, mask=inside)
    total = tl.sum(tl.where(inside, modulated * cross_entropy, 0.0), 0)
    tl.store(parts + stage * tl.num_programs(0) + tl.program_id(0), total)
