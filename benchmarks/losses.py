"""Losses: class, L1 and generalised-IoU loss of all stages with their gradients, and with the matching before them.

Peers: the reference in eager PyTorch, and ``official``: stage by stage, a one-hot target for the focal loss, the
matched boxes gathered image by image, as DETR and its descendants do. ``criterion`` is all of a training step between
the predictions and their gradients.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, main, using
from benchmarks.linear_assignment import MOST_TARGETS
from benchmarks.matching import (
    ALPHA,
    CLASSES,
    GAMMA,
    PROPOSALS,
    STAGES,
    WEIGHTS,
    as_lists,
    make_problem,
    matching_reference,
    official_pairs,
    ours,
    settings,
)
from sparse_rcnn import ops
from sparse_rcnn.losses import HungarianMatcher, PackedTargets, SetCriterion

Losses = tuple[Tensor, Tensor, Tensor]


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """In float32 alone, as in benchmarks/matching.py."""
    for name, images, targets in settings(device, dtype):
        logits = STAGES * images * PROPOSALS * CLASSES * 4
        pairs = STAGES * images * PROPOSALS * (targets or MOST_TARGETS)
        inputs = functools.partial(make_problem, images, targets, device)
        moved = {"forward": logits, "backward": logits}  # the logits read, their gradient written
        if targets != 20:
            yield _case(f"losses, {name}", functools.partial(_matched, inputs), moved, losses, device, False)
        moved = {"forward": logits + 2 * 4 * pairs, "backward": logits}
        yield _case(f"criterion, {name}", inputs, moved, criterion, device, images == 16 or targets == 8)


def _case(
    name: str,
    inputs: Callable[[torch.Generator], dict[str, Any]],
    moved: dict[str, float],
    function: Callable[..., Losses],
    device: torch.device,
    headline: bool,
) -> Case:
    return Case(
        name=name,
        inputs=inputs,
        reference=using("reference", function),
        implementations={"native": ours(function, device), "official": official_losses},
        bytes=moved,
        wrt=("logits", "boxes"),
        prepare={"official": _as_lists_with_pairs},
        modes=("forward", "both"),  # ours makes the gradients in the forward
        headline=headline,
    )


def _matched(inputs: Callable[[torch.Generator], dict[str, Any]], generator: torch.Generator) -> dict[str, Any]:
    problem = inputs(generator)
    return {**problem, "matches": matching_reference(**problem)}


def losses(matches: Tensor, logits: Tensor, boxes: Tensor, target_counts: Tensor, **targets: Tensor) -> Losses:
    """Of given matches: class, L1 and GIoU loss of each stage, [S], weighted and divided by the number of boxes."""
    total = target_counts.sum()
    classes = ops.set_focal_loss(logits, matches, targets["target_labels"], ALPHA, GAMMA)
    l1, giou = ops.set_box_loss(boxes, matches, targets["target_boxes"], targets["image_sizes"])
    return WEIGHTS[0] * classes / total, WEIGHTS[1] * l1 / total, WEIGHTS[2] * giou / total


def criterion(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_counts: Tensor,
    image_sizes: Tensor,
) -> Losses:
    """Matching and losses."""
    both = SetCriterion(HungarianMatcher(*WEIGHTS, ALPHA, GAMMA), CLASSES)
    named = both(logits, boxes, PackedTargets(target_labels, target_boxes, target_counts), image_sizes)
    return tuple(
        torch.stack([named[f"{loss}_{stage}"] for stage in range(STAGES - 1)] + [named[loss]])
        for loss in ("loss_ce", "loss_bbox", "loss_giou")
    )


def _as_lists_with_pairs(problem: dict[str, Any]) -> dict[str, Any]:
    """Targets, and matches where they are given, as the official code has them: an item an image."""
    lists = as_lists(problem)
    if "matches" in problem:
        counts, device = problem["target_counts"].tolist(), problem["matches"].device
        lists["pairs"] = [
            [(row[:count], torch.arange(count, device=device)) for row, count in zip(stage, counts, strict=True)]
            for stage in problem["matches"]
        ]
    return lists


def official_losses(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    labels: Sequence[Tensor],
    target_boxes: Sequence[Tensor],
    pairs: Sequence[Sequence[tuple[Tensor, Tensor]]] | None = None,
) -> Losses:
    """Stage by stage; without pairs it finds them, by the official matching."""
    total = float(max(sum(len(row) for row in labels), 1))
    found: list[Losses] = []
    for stage in range(len(logits)):
        matched = pairs[stage] if pairs else official_pairs(
            logits[stage], boxes[stage], image_sizes, labels, target_boxes
        )  # fmt: skip
        found.append(_official_stage(logits[stage], boxes[stage], image_sizes, labels, target_boxes, matched))
    return tuple(
        weight * torch.stack(column) / total for weight, column in zip(WEIGHTS, zip(*found, strict=True), strict=True)
    )


def _official_stage(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    labels: Sequence[Tensor],
    target_boxes: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> Losses:
    images = torch.cat([torch.full_like(proposals, image) for image, (proposals, _) in enumerate(pairs)])
    proposals = torch.cat([proposals for proposals, _ in pairs])
    classes = torch.full(logits.shape[:2], CLASSES, device=logits.device)
    classes[images, proposals] = torch.cat([row[t.to(row.device)] for row, (_, t) in zip(labels, pairs, strict=True)])
    one_hot = F.one_hot(classes, CLASSES + 1)[..., :CLASSES].to(logits.dtype)
    focal = torchvision.ops.sigmoid_focal_loss(logits, one_hot, ALPHA, GAMMA, "sum")
    chosen = boxes[images, proposals]
    wanted = torch.cat([row[t.to(row.device)] for row, (_, t) in zip(target_boxes, pairs, strict=True)])
    scale = image_sizes.flip(-1).repeat(1, 2)[images.to(image_sizes.device)]  # (w, h, w, h)
    l1 = F.l1_loss(chosen / scale, wanted / scale, reduction="sum")
    giou = (1 - torch.diag(torchvision.ops.generalized_box_iou(chosen, wanted))).sum()
    return focal, l1, giou


if __name__ == "__main__":
    sys.exit(main("losses", cases))
