"""refine_boxes: the box branch of a stage, 300 and 4800 proposals, C = 256, three layers. Inference only."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Case, main, using
from sparse_rcnn.ops import refine_boxes, refine_boxes_reference


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Features and weights in ``dtype``, boxes in float32."""
    C, layers = 256, 3
    for R in (300, 4800):

        def inputs(generator: torch.Generator, R: int = R) -> dict[str, Any]:
            def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
                return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

            corners = torch.rand(R, 2, generator=generator)
            return {
                "x": random(R, C),
                "boxes": torch.cat([corners, corners + 1], dim=1).to(device),
                "tower_weights": [random(C, C, scale=C**-0.5) for _ in range(layers)],
                "norm_weights": [random(C) for _ in range(layers)],
                "norm_biases": [random(C) for _ in range(layers)],
                "delta_weight": random(4, C, scale=C**-0.5),
                "delta_bias": random(4),
                "clamp": (None, math.log(100000 / 16)),
            }

        yield Case(
            name=f"{R} proposals",
            inputs=inputs,
            reference=refine_boxes_reference,
            # On the CPU the native operators that it consists of, one by one.
            implementations={"native": using("auto", refine_boxes)},
            bytes={"forward": (R * C + layers * C * C) * dtype.itemsize + 2 * R * 4 * 4},
            flops={"forward": 2 * R * C * (layers * C + 4)},
            headline=R == 300,
        )


if __name__ == "__main__":
    sys.exit(main("refine_boxes", cases))
