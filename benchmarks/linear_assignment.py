"""linear_assignment: the matching problems of a training step, six stages of one image and of sixteen.

Peers: SciPy in a loop (the reference), and the package ``torch-linear-assignment`` where it is installed, which is
SciPy too on the CPU and a Triton kernel on a GPU.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, main, native
from sparse_rcnn.ops import linear_assignment, linear_assignment_reference

STAGES, PROPOSALS, MOST_TARGETS = 6, 300, 63
PACKAGE = "torch-linear-assignment"
PACKAGE_REASON = "in the costs' own type, where costs nearly tie it may pair others"


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Costs in ``dtype``; as many targets as COCO's images have, and the padding of its crowded ones."""
    for images in (1, 16):
        problems = STAGES * images

        def inputs(generator: torch.Generator, images: int = images) -> dict[str, Any]:
            cost = torch.randn(STAGES, images, PROPOSALS, MOST_TARGETS, generator=generator)
            return {"cost": cost.to(device, dtype), "counts": counts_like_coco(images, generator).to(device)}

        yield Case(
            name=f"{problems} problems of {PROPOSALS} x {MOST_TARGETS}",
            inputs=inputs,
            reference=linear_assignment_reference,  # SciPy in a loop
            implementations={"native": native(linear_assignment), PACKAGE: package_assignment},
            bytes={"forward": problems * PROPOSALS * MOST_TARGETS * dtype.itemsize},
            prepare={PACKAGE: for_package},
            ungated={PACKAGE: PACKAGE_REASON},
            headline=images == 16,
        )


def counts_like_coco(images: int, generator: torch.Generator) -> Tensor:
    """Targets of each image: 7 on average, and one image as crowded as they come."""
    counts = torch.empty(images).exponential_(1 / 7, generator=generator).long().clamp(1, MOST_TARGETS)
    counts[0] = MOST_TARGETS
    return counts


def for_package(inputs: dict[str, Any]) -> dict[str, Any]:
    """Targets as rows. Those of the padding cost nothing anywhere: they take proposals that are left over."""
    cost, counts = inputs["cost"], inputs["counts"]
    padding = torch.arange(cost.shape[-1], device=cost.device) >= counts.unsqueeze(-1)  # [B, M]
    cost = cost.masked_fill(padding.unsqueeze(-2), 0.0).flatten(0, 1).float()
    return {"cost": cost.transpose(1, 2).contiguous(), "counts": counts.expand(inputs["cost"].shape[:2]).flatten()}


def package_assignment(cost: Tensor, counts: Tensor) -> Tensor:
    """The proposal of each target [Q, M] for costs [Q, M, N].

    Raises:
        ImportError: the package is not installed.
    """
    from torch_linear_assignment import batch_linear_assignment

    matches = batch_linear_assignment(cost)
    padding = torch.arange(cost.shape[1], device=cost.device) >= counts.unsqueeze(-1)
    return matches.masked_fill(padding, -1)


if __name__ == "__main__":
    sys.exit(main("linear_assignment", cases))
