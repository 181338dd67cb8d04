"""Sigmoid focal loss of a set of predictions, all stages at once (Lin et al., ICCV 2017)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_floating, check_integral, check_same_device, check_shape, nan_unless_finite


def set_focal_loss(
    logits: Tensor, matches: Tensor, target_labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss summed over proposals and classes, where matched proposals have one positive class.

    Source: RetinaNet (equation 5); Sparse R-CNN, section 3.3.

    Args:
        logits: [S, B, N, K] floating point.
        matches: [S, B, M] int64, the proposal of each target, -1 (or anything else outside of 0..N-1) for none.
        target_labels: [B, M] int64; a label outside of 0..K-1 makes no positive.
        alpha, gamma: weight of the positives, and the focusing exponent.

    Returns:
        [S], the sum of each stage; divide it by the number of boxes. Not finite where a logit of the stage is not.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_shape("logits", logits, ("S", "B", "N", "K"))
    check_shape("matches", matches, (*logits.shape[:2], "M"))
    check_shape("target_labels", target_labels, tuple(matches.shape[1:]))
    check_floating("logits", logits)
    check_integral("matches", matches)
    check_integral("target_labels", target_labels)
    check_same_device(logits=logits, matches=matches, target_labels=target_labels)
    kernels = _library.kernels("set_focal_loss", logits.device)
    if kernels is None:
        return set_focal_loss_reference(logits, matches, target_labels, alpha, gamma)
    classes = matched_classes(matches, target_labels, logits.shape[2], logits.shape[3])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _SetFocalLoss.apply(kernels, wide, classes, alpha, gamma).to(logits.dtype)


def set_focal_loss_reference(
    logits: Tensor, matches: Tensor, target_labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """The specification of :func:`set_focal_loss`, with the official code's operations in their order."""
    K = logits.shape[3]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes = matched_classes(matches, target_labels, logits.shape[2], K)  # [S, B, N], K for no match
    positive = classes.unsqueeze(-1) == torch.arange(K, device=logits.device)
    p = _Sigmoid.apply(x)
    cross_entropy = F.binary_cross_entropy_with_logits(x, positive.to(x.dtype), reduction="none")
    likelihood = torch.where(positive, p, 1 - p)
    miss = (1 - likelihood).clamp(min=torch.finfo(x.dtype).tiny)  # the slope of a power below 1 is infinite at 0
    weight = torch.full_like(x, 1 - alpha).masked_fill(positive, alpha)
    losses = weight * (cross_entropy * miss**gamma)
    return (losses.flatten(1).sum(1) + nan_unless_finite(x)).to(logits.dtype)


class _Sigmoid(torch.autograd.Function):
    """The sigmoid with the derivative as TorchScript, by which the official focal loss is compiled, rounds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = x.sigmoid()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return (1 - p) * p * grad


def matched_classes(matches: Tensor, target_labels: Tensor, proposals: int, background: int) -> Tensor:
    """The class of every proposal, int64 [S, B, N]: its target's label, or ``background`` without a target.

    Args:
        matches: [S, B, M], the proposal of each target, anything outside of 0..proposals - 1 for none.
        target_labels: [B, M].
    """
    # One column more than there are proposals takes what the unmatched targets write, and is cut off.
    classes = matches.new_full((*matches.shape[:2], proposals + 1), background)
    index = torch.where(matches < 0, proposals, matches).clamp(max=proposals)
    return classes.scatter(2, index, target_labels.expand_as(matches))[..., :proposals]


class _SetFocalLoss(torch.autograd.Function):
    """The kernel makes the loss and its gradient in one pass; the backward only scales it."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> Tensor:
        loss, grad = kernels.set_focal_loss(logits, classes, alpha, gamma)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return None, grad * grad_loss.view(-1, 1, 1, 1), None, None, None


def _fake(logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)


_library.declare("set_focal_loss", fake=_fake)
_library.declare_triton("set_focal_loss")
