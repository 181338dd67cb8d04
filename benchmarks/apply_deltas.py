"""apply_deltas: the boxes of one image's stage, and of sixteen."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torchvision.models.detection._utils import BoxCoder

from benchmarks.harness import Case, main, native
from sparse_rcnn.ops import apply_deltas, apply_deltas_reference

UPPER = math.log(100000 / 16)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Deltas in ``dtype``; the boxes are float32, as everywhere in the detector."""
    coder = BoxCoder((2.0, 2.0, 1.0, 1.0), bbox_xform_clip=UPPER)

    def torchvision(deltas: torch.Tensor, boxes: torch.Tensor, clamp: Any) -> torch.Tensor:
        return coder.decode_single(deltas, boxes)

    for images in (1, 16):
        R = 300 * images

        def inputs(generator: torch.Generator, R: int = R) -> dict[str, Any]:
            deltas = torch.randn(R, 4, generator=generator).to(device, dtype)
            corners = torch.rand(R, 2, generator=generator) * 800
            boxes = torch.cat([corners, corners + 1 + torch.rand(R, 2, generator=generator) * 400], dim=1)
            return {"deltas": deltas, "boxes": boxes.to(device), "clamp": (None, UPPER)}

        deltas, boxes = 4 * R * dtype.itemsize, 4 * R * 4
        yield Case(
            name=f"{R} boxes",
            inputs=inputs,
            reference=apply_deltas_reference,
            implementations={"native": native(apply_deltas), "torchvision": torchvision},
            bytes={"forward": deltas + 2 * boxes, "backward": 2 * deltas + 3 * boxes},
            wrt=("deltas", "boxes"),
            ungated={"torchvision": "decodes in the deltas' dtype"},
            headline=images == 1,
        )


if __name__ == "__main__":
    sys.exit(main("apply_deltas", cases))
