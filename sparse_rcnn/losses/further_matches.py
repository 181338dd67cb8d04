"""Matches beyond the one-to-one ones: proposals that overlap a target well."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_rcnn.losses.targets import PackedTargets
from sparse_rcnn.ops.box_iou import pairwise_iou

# Further matches of a target at most. It bounds the columns, whose number the host has to know.
MAX_FURTHER = 7


@torch.no_grad()
def further_matches(matches: Tensor, boxes: Tensor, targets: PackedTargets, iou: float) -> tuple[Tensor, PackedTargets]:
    """Add the unmatched proposals that overlap a target by ``iou`` or more to the matches.

    A detector of few images learns faster from several good proposals an object than from one, with all others of it
    taught to be background; its duplicates then have to be suppressed. Each proposal goes to the target that it
    overlaps most, each target takes the best ``MAX_FURTHER`` of its own. No target is made to take a bad one.

    Source: the overlap assignment of Ouyang-Zhang et al., "NMS strikes back" (2022), here beside the one-to-one matches
    and at every stage.

    Args:
        matches: [S, B, M] int64, the proposal of each target, -1 for none.
        boxes: [S, B, N, 4] xyxy in pixels.
        targets: of the B images.
        iou: above 0 to 1.

    Returns:
        Matches [S, B, M * (1 + min(MAX_FURTHER, N))], the given ones first and -1 where there are no more; and the
        targets that these columns are, with the counts of the given ones. No value is read by the host.
    """
    (S, B, M), N = matches.shape, boxes.shape[2]
    if M == 0 or N == 0:
        return matches, targets
    overlaps = pairwise_iou(boxes, targets.boxes.to(boxes.dtype).expand(S, B, M, 4))  # [S, B, N, M], 0 for padding
    best, nearest = overlaps.max(3)
    taken = torch.zeros_like(best[..., :1], dtype=torch.bool).repeat(1, 1, N + 1)  # the last is of targets without one
    taken.scatter_(2, torch.where(matches < 0, N, matches), True)
    free = (best >= iou) & ~taken[..., :N]  # a box that is not finite has no overlap, and NaN is not enough
    of_target = nearest.unsqueeze(3) == torch.arange(M, device=boxes.device)
    ranked, proposals = torch.where(free.unsqueeze(3) & of_target, overlaps, 0).topk(min(MAX_FURTHER, N), dim=2)
    further = torch.where(ranked > 0, proposals, -1).flatten(2)  # [S, B, MAX_FURTHER * M]
    copies = 1 + ranked.shape[2]
    repeated = PackedTargets(
        targets.labels.repeat(1, copies), targets.boxes.repeat(1, copies, 1), targets.counts, targets.step_counts
    )
    return torch.cat([matches, further], dim=2), repeated
