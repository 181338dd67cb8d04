"""The set prediction loss of every stage (DETR, section 3.1; Sparse R-CNN, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.losses.denoising import mended
from sparse_rcnn.losses.further_matches import further_matches
from sparse_rcnn.losses.matcher import HungarianMatcher
from sparse_rcnn.losses.targets import PackedTargets
from sparse_rcnn.ops._check import nan_unless_finite
from sparse_rcnn.ops.set_focal_loss import matched_classes, set_focal_loss_reference


class SetCriterion(nn.Module):
    """Classification, L1 and generalised-IoU loss over the pairs that ``matcher`` finds.

    The weights of the losses are the matcher's; its ``classification`` chooses the sigmoid focal loss or DETR's
    softmax with a "no object" class.

    Args:
        matcher: finds the pairs.
        num_classes: foreground classes K.
        no_object_weight: weight of "no object" in the softmax loss.
        deep_supervision: a loss at every stage, or at the last alone.
        match_iou: IoU from which an unmatched proposal is a further match of a target (see :func:`further_matches`);
            None is none. The losses are divided by the number of boxes all the same, so that the gradient does not
            depend on how a step is divided. Not for the softmax loss, whose divisor is of one match a box.

    Raises:
        ValueError: ``match_iou`` with softmax classification.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        num_classes: int,
        no_object_weight: float = 0.1,
        deep_supervision: bool = True,
        match_iou: float | None = None,
    ) -> None:
        super().__init__()
        if match_iou is not None and matcher.classification != "focal":
            raise ValueError(f"match_iou: expected None with {matcher.classification} classification, got {match_iou}")
        self.matcher = matcher
        self.num_classes = num_classes
        self.no_object_weight = no_object_weight
        self.deep_supervision = deep_supervision
        self.match_iou = match_iou

    def forward(self, logits: Tensor, boxes: Tensor, targets: PackedTargets, image_sizes: Tensor) -> dict[str, Tensor]:
        """The weighted losses.

        Args:
            logits: [S, B, N, K].
            boxes: [S, B, N, 4] xyxy in pixels.
            targets: of the B images.
            image_sizes: [B, 2] (height, width).

        Returns:
            ``loss_ce``, ``loss_bbox`` and ``loss_giou`` of the last stage, and with ``_0``, ``_1``... of the others.
            Not finite where a prediction of the stage is not, matched or not. No value is read by the host.
        """
        if not self.deep_supervision:
            logits, boxes = logits[-1:], boxes[-1:]
        matches = self.matcher(logits, boxes, targets, image_sizes)  # [S, B, M]
        if self.match_iou is not None:
            matches, targets = further_matches(matches, boxes, targets, self.match_iou)
        return self._of_pairs(logits, boxes, matches, targets, image_sizes)

    def denoising(
        self, logits: Tensor, boxes: Tensor, origins: Tensor, targets: PackedTargets, image_sizes: Tensor
    ) -> dict[str, Tensor]:
        """The weighted losses of :class:`NoisyProposals`, which are matched already.

        Args:
            logits: [S, B, D, K].
            boxes: [S, B, D, 4] xyxy in pixels.
            origins: [B, D] int64, the target that each is to be mended to, -1 for one to be refused.
            targets: of the B images, those that the proposals were made of.
            image_sizes: [B, 2] (height, width).

        Returns:
            As :meth:`forward`, under the same names with ``_dn``; divided by the number of those to be mended.
        """
        if not self.deep_supervision:
            logits, boxes = logits[-1:], boxes[-1:]
        S, _, D, _ = logits.shape
        index = torch.where(origins < 0, targets.labels.shape[1], origins)
        wanted = PackedTargets(
            F.pad(targets.labels, (0, 1)).gather(1, index),  # a column for those without a target
            F.pad(targets.boxes, (0, 0, 0, 1)).gather(1, index.unsqueeze(-1).expand(-1, -1, 4)),
            mended(targets.counts, D),
            None if targets.step_counts is None else mended(targets.step_counts, D),
        )
        matches = torch.where(origins < 0, -1, torch.arange(D, device=origins.device)).repeat(S, 1, 1)
        losses = self._of_pairs(logits.contiguous(), boxes.contiguous(), matches, wanted, image_sizes)
        return {f"{name}_dn": loss for name, loss in losses.items()}

    def _of_pairs(
        self, logits: Tensor, boxes: Tensor, matches: Tensor, targets: PackedTargets, image_sizes: Tensor
    ) -> dict[str, Tensor]:
        """The losses of given matches [S, B, M]."""
        num_boxes = mean_box_count(targets.counts, boxes.dtype, targets.step_counts)
        class_weight, l1_weight, giou_weight = self.matcher.weights
        if self.matcher.classification == "focal":
            alpha, gamma = self.matcher.focal_alpha, self.matcher.focal_gamma
            # In float32 whatever the model's dtype is, as the official focal loss. A float64 model is there to be
            # compared, and 1e-7 is less than the order of a float32 sum makes: it takes the official order.
            focal_loss = set_focal_loss_reference if logits.dtype == torch.float64 else ops.set_focal_loss
            classes = focal_loss(logits.float(), matches, targets.labels, alpha, gamma) / num_boxes
        else:
            classes = self._softmax_loss(logits, matches, targets)
        l1, giou = ops.set_box_loss(boxes, matches, targets.boxes, image_sizes)
        return {
            **_named("loss_ce", class_weight * classes),
            **_named("loss_bbox", l1_weight * l1 / num_boxes),
            **_named("loss_giou", giou_weight * giou / num_boxes),
        }

    def _softmax_loss(self, logits: Tensor, matches: Tensor, targets: PackedTargets) -> Tensor:
        """DETR's class loss [S]: unmatched proposals are "no object", at a lower weight."""
        K, N = self.num_classes, logits.shape[2]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes = matched_classes(matches, targets.labels, N, background=K)
        classes = torch.where((classes < 0) | (classes > K), K, classes)
        likelihood = logits.log_softmax(-1).gather(3, classes.unsqueeze(-1)).squeeze(-1)
        weights = torch.ones_like(likelihood).masked_fill(classes == K, self.no_object_weight)
        if targets.step_counts is None:
            total = weights.flatten(1).sum(1)
        else:  # the same sum over the whole step: of each image the smaller number of boxes and proposals is matched
            matched = targets.step_counts.clamp(max=N).sum()
            others = len(targets.step_counts) * N - matched
            total = (matched + self.no_object_weight * others) / _processes()
        total = total.clamp(min=torch.finfo(weights.dtype).tiny)
        return -(weights * likelihood).flatten(1).sum(1) / total + nan_unless_finite(logits)


def mean_box_count(counts: Tensor, dtype: torch.dtype, step_counts: Tensor | None = None) -> Tensor:
    """Boxes of the batch averaged over all processes, at least 1: the divisor of the losses.

    With ``step_counts`` it is the boxes of the step, and the 1 is for all processes together: the gradient then does
    not depend on how the images of the step are divided among micro-batches and processes.
    """
    if step_counts is not None:
        return step_counts.sum().clamp(min=1).to(dtype) / _processes()
    total = counts.sum().to(dtype)
    if _processes() > 1:
        torch.distributed.all_reduce(total)
        total = total / _processes()
    return total.clamp(min=1)


def _processes() -> int:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def _named(name: str, values: Tensor) -> dict[str, Tensor]:
    """One entry a stage, the last under ``name`` itself (the official code's names)."""
    *others, last = values.unbind()
    return {name: last, **{f"{name}_{stage}": value for stage, value in enumerate(others)}}
