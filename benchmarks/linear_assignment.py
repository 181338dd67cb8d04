"""linear_assignment: the matching problems of a training step, six stages of one image and of sixteen."""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Case, main, native
from sparse_rcnn.ops import linear_assignment, linear_assignment_reference

STAGES, PROPOSALS, MOST_TARGETS = 6, 300, 63


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Costs in ``dtype``; as many targets as COCO's images have, 7 on average, and the padding of its crowded ones."""
    for images in (1, 16):
        problems = STAGES * images

        def inputs(generator: torch.Generator, images: int = images) -> dict[str, Any]:
            cost = torch.randn(STAGES, images, PROPOSALS, MOST_TARGETS, generator=generator)
            counts = torch.empty(images).exponential_(1 / 7, generator=generator).long().clamp(1, MOST_TARGETS)
            counts[0] = MOST_TARGETS
            return {"cost": cost.to(device, dtype), "counts": counts.to(device)}

        yield Case(
            name=f"{problems} problems of {PROPOSALS} x {MOST_TARGETS}",
            inputs=inputs,
            reference=linear_assignment_reference,  # SciPy in a loop
            implementations={"native": native(linear_assignment)},
            bytes={"forward": problems * PROPOSALS * MOST_TARGETS * dtype.itemsize},
            headline=images == 16,
        )


if __name__ == "__main__":
    sys.exit(main("linear_assignment", cases))
