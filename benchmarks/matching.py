"""Matching: cost and assignment of all stages and images, as a training step needs them.

Peers: the reference is the same cost in eager PyTorch and SciPy in a loop; ``official`` concatenates the targets of all
images, makes the costs of every pair by cdist, brings them to the host and cuts out each image's block, stage by stage,
as DETR and its descendants do; ``torch-linear-assignment`` gets our costs.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.harness import Case, main, using
from benchmarks.linear_assignment import (
    MOST_TARGETS,
    PACKAGE,
    PACKAGE_REASON,
    PROPOSALS,
    STAGES,
    counts_like_coco,
    package_assignment,
)
from sparse_rcnn import ops

CLASSES = 80
WEIGHTS, ALPHA, GAMMA = (2.0, 5.0, 2.0), 0.25, 2.0
HEIGHT, WIDTH = 800, 1333


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """In float32 alone, in which matching and losses are computed whatever the model's type is."""
    for name, images, targets in settings(device, dtype):
        pairs = STAGES * images * PROPOSALS * (targets or MOST_TARGETS)

        def inputs(generator: torch.Generator, images: int = images, targets: int | None = targets) -> dict[str, Any]:
            return make_problem(images, targets, device, generator)

        yield Case(
            name=name,
            inputs=inputs,
            reference=matching_reference,
            implementations={
                "native": ours(matching, device),
                "official": official_matching,
                PACKAGE: using("auto", package_matching),
            },
            bytes={"forward": 2 * 4 * pairs},  # the costs, written and read
            prepare={"official": as_lists},
            ungated={PACKAGE: PACKAGE_REASON},
            headline=images == 16,
        )


def settings(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, int, int | None]]:
    """Name, images, and how many targets each has; None is as many as COCO's images have."""
    if dtype == torch.float32:
        yield "one image, 8 targets", 1, 8
        if device.type == "cpu":
            yield "one image, 20 targets", 1, 20
        yield "16 images as in COCO", 16, None


def ours(function: Any, device: torch.device) -> Any:
    """By the CPU kernels, or by what serves on a GPU: native and Triton kernels."""
    return using("native" if device.type == "cpu" else "auto", function)


def make_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    """xyxy [*shape, 4] in pixels, of 16 pixels to a third of the image."""
    size = torch.tensor([WIDTH, HEIGHT])
    sides = 16 + torch.rand(*shape, 2, generator=generator) ** 2 * size / 3
    corner = torch.rand(*shape, 2, generator=generator) * (size - sides)
    return torch.cat([corner, corner + sides], dim=-1)


def make_problem(images: int, targets: int | None, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """Six stages' predictions and the padded targets of a batch."""
    counts = counts_like_coco(images, generator) if targets is None else torch.full((images,), targets)
    M = int(counts.max())
    problem = {
        "logits": torch.randn(STAGES, images, PROPOSALS, CLASSES, generator=generator) - 4,
        "boxes": make_boxes(STAGES, images, PROPOSALS, generator=generator),
        "target_labels": torch.randint(CLASSES, (images, M), generator=generator),
        "target_boxes": make_boxes(images, M, generator=generator),
        "target_counts": counts,
        "image_sizes": torch.tensor([[HEIGHT, WIDTH]], dtype=torch.float32).repeat(images, 1),
    }
    return {name: tensor.to(device) for name, tensor in problem.items()}


def matching(**problem: Tensor) -> Tensor:
    """The proposal of each target, [S, B, M]."""
    cost = ops.matching_cost(**problem, weights=WEIGHTS, alpha=ALPHA, gamma=GAMMA)
    return ops.linear_assignment(cost, problem["target_counts"])


def matching_reference(**problem: Tensor) -> Tensor:
    """The same by the specifications: eager PyTorch, then SciPy in a loop."""
    cost = ops.matching_cost_reference(**problem, weights=WEIGHTS, alpha=ALPHA, gamma=GAMMA)
    return ops.linear_assignment_reference(cost, problem["target_counts"])


def package_matching(**problem: Tensor) -> Tensor:
    """Our cost, whose padding is 0 already, and the package's assignment."""
    cost = ops.matching_cost(**problem, weights=WEIGHTS, alpha=ALPHA, gamma=GAMMA)
    counts = problem["target_counts"].expand(cost.shape[:2]).flatten()
    return package_assignment(cost.flatten(0, 1).transpose(1, 2), counts).view(*cost.shape[:2], -1)


def as_lists(problem: dict[str, Any]) -> dict[str, Any]:
    """The targets as the official code has them: an item an image."""
    counts = problem["target_counts"].tolist()
    return {
        **{name: problem[name] for name in ("logits", "boxes", "image_sizes")},
        "labels": [row[:count] for row, count in zip(problem["target_labels"], counts, strict=True)],
        "target_boxes": [row[:count] for row, count in zip(problem["target_boxes"], counts, strict=True)],
    }


def official_matching(
    logits: Tensor, boxes: Tensor, image_sizes: Tensor, labels: Sequence[Tensor], target_boxes: Sequence[Tensor]
) -> Tensor:
    """Stage by stage and image by image on the host; padded at the end, to be compared."""
    counts = [len(row) for row in labels]
    matches = torch.full((*logits.shape[:2], max(counts)), -1)
    for stage in range(len(logits)):
        pairs = official_pairs(logits[stage], boxes[stage], image_sizes, labels, target_boxes)
        for image, (proposals, targets) in enumerate(pairs):
            matches[stage, image, targets] = proposals
    return matches.to(logits.device)


@torch.no_grad()
def official_pairs(
    logits: Tensor, boxes: Tensor, image_sizes: Tensor, labels: Sequence[Tensor], target_boxes: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(proposals, targets) of each image of one stage."""
    B, N, _ = logits.shape
    counts = [len(row) for row in labels]
    p, all_labels, all_boxes = (
        logits.flatten(0, 1).sigmoid(),
        torch.cat(labels),
        torch.cat(target_boxes),
    )
    negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
    positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    class_cost = positive[:, all_labels] - negative[:, all_labels]
    scale = image_sizes.flip(-1).repeat(1, 2)  # (w, h, w, h)
    target_scale = torch.cat([row.expand(count, 4) for row, count in zip(scale, counts, strict=True)])
    flat = boxes.flatten(0, 1)
    l1 = torch.cdist(flat / scale.unsqueeze(1).expand(B, N, 4).flatten(0, 1), all_boxes / target_scale, p=1)
    giou = torchvision.ops.generalized_box_iou(flat, all_boxes)
    cost = (WEIGHTS[0] * class_cost + WEIGHTS[1] * l1 - WEIGHTS[2] * giou).view(B, N, -1).cpu()
    solved = [linear_sum_assignment(block[image]) for image, block in enumerate(cost.split(counts, -1))]
    return [(torch.from_numpy(proposals), torch.from_numpy(targets)) for proposals, targets in solved]


if __name__ == "__main__":
    sys.exit(main("matching", cases))
