"""One-to-one matching of proposals and targets (DETR, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rcnn import ops
from sparse_rcnn.losses.targets import PackedTargets


class HungarianMatcher:
    """The assignment of least cost, for all stages and images of a batch.

    Args:
        class_weight, l1_weight, giou_weight: of the terms of the cost.
        focal_alpha, focal_gamma: of the focal class cost.
        classification: ``focal``, or ``softmax`` for DETR's class probabilities with a "no object" class.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        classification: str = "focal",
    ) -> None:
        self.weights = (class_weight, l1_weight, giou_weight)
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.classification = classification

    @torch.no_grad()
    def __call__(self, logits: Tensor, boxes: Tensor, targets: PackedTargets, image_sizes: Tensor) -> Tensor:
        """Match.

        Args:
            logits: [S, B, N, K].
            boxes: [S, B, N, 4] xyxy in pixels.
            targets: of the B images.
            image_sizes: [B, 2] (height, width).

        Returns:
            [S, B, M] int64, the proposal of each target; -1 for padding and for targets that found none, which are
            those left over when there are more targets than proposals. Predictions that are not finite are taken
            last; they do not raise.
        """
        cost = ops.matching_cost(
            *(logits, boxes, targets.labels, targets.boxes, targets.counts, image_sizes),
            *(self.weights, self.focal_alpha, self.focal_gamma, self.classification),
        )
        return ops.linear_assignment(cost, targets.counts)
