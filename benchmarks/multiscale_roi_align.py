"""multiscale_roi_align: 300 proposals on the maps of an R50-FPN at 800x1333, which are padded to 800x1344."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, main, native
from sparse_rcnn.ops import multiscale_roi_align, multiscale_roi_align_reference
from sparse_rcnn.ops.multiscale_roi_align import box_levels

HEIGHT, WIDTH, CHANNELS = 800, 1344, 256
STRIDES = (4, 8, 16, 32)
BINS, SAMPLES = 7, 2
MIXED = (16.0, 800.0)  # sides in pixels, evenly spread over their logarithm: all levels, more of them fine than coarse


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The headline case, and what its time depends on: the number of boxes, and their level as little as possible."""
    yield _case("300 boxes", 300, MIXED, device, dtype, headline=True)
    yield _case("600 boxes", 600, MIXED, device, dtype)
    for level, stride in enumerate(STRIDES):
        side = 28.0 * stride  # in the middle of what the level serves, as many cells on each
        yield _case(f"300 boxes on P{level + 2}", 300, (0.9 * side, 1.1 * side), device, dtype)
    if device.type == "cuda":
        yield _case("16 images of 300 boxes", 300, MIXED, device, dtype, images=16, headline=True)


def _case(
    name: str,
    count: int,
    sides: tuple[float, float],
    device: torch.device,
    dtype: torch.dtype,
    images: int = 1,
    headline: bool = False,
) -> Case:
    def inputs(generator: torch.Generator) -> dict[str, Any]:
        features = [
            torch.randn(images, HEIGHT // stride, WIDTH // stride, CHANNELS, device=device)
            .to(dtype)
            .permute(0, 3, 1, 2)
            for stride in STRIDES
        ]
        boxes = make_boxes(images, count, sides, generator)
        return {"features": features, "boxes": boxes.to(device), "strides": STRIDES}

    peers, prepare = {}, {}
    if dtype != torch.bfloat16 or device.type == "cuda":  # which torchvision has no CPU kernel for
        peers["torchvision"] = torchvision_pooler()
        prepare["torchvision"] = planar
    footprint = footprint_cells(make_boxes(images, count, sides, torch.Generator().manual_seed(0)))
    bins = images * count * BINS**2 * CHANNELS
    cells = images * sum((HEIGHT // stride) * (WIDTH // stride) for stride in STRIDES)
    flops = 2 * bins * (2 * SAMPLES) ** 2
    return Case(
        name=name,
        inputs=inputs,
        reference=multiscale_roi_align_reference,
        implementations={"native": native(multiscale_roi_align), **peers},
        # Forward: each box's cells once, each bin once. Backward: zeros, then each box's cells read and written.
        bytes={
            "forward": (footprint * CHANNELS + bins) * dtype.itemsize,
            "backward": (cells + 2 * footprint) * CHANNELS * 4 + bins * dtype.itemsize,
        },
        flops={"forward": flops, "backward": flops},
        wrt=("features",),
        keep=("boxes",),
        prepare=prepare,
        ungated=dict.fromkeys(peers, "its RoIAlign is the one without the shift by half a pixel"),
        modes=None if headline else ("forward",),
        headline=headline,
    )


def make_boxes(images: int, count: int, sides: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Boxes [images, count, 4] all over the image: square roots of areas within ``sides``, aspects from 1:2 to 2:1."""
    low, high = (math.log(side) for side in sides)
    side = torch.exp(low + (high - low) * torch.rand(images, count, 1, generator=generator))
    aspect = torch.exp((torch.rand(images, count, 1, generator=generator) - 0.5) * math.log(2))
    size = torch.cat([side * aspect, side / aspect], dim=-1)
    room = torch.tensor([1333.0, 800.0]) - size  # negative for a box longer than the image, which then covers it
    start = torch.rand(images, count, 2, generator=generator) * room
    return torch.cat([start, start + size], dim=-1)


def footprint_cells(boxes: Tensor) -> int:
    """How many cells the boxes read, those of each box counted once: at most two a sample along each side."""
    stride = torch.tensor(STRIDES)[box_levels(boxes, STRIDES)].unsqueeze(-1)
    sides = ((boxes[..., 2:] - boxes[..., :2]) / stride + 1).clamp(max=2 * BINS * SAMPLES)
    return int(sides.prod(-1).sum())


def torchvision_pooler() -> Callable[..., Tensor]:
    """torchvision's MultiScaleRoIAlign with our arguments and result."""
    from torchvision.ops import MultiScaleRoIAlign

    names = [str(level) for level in range(len(STRIDES))]
    pooler = MultiScaleRoIAlign(names, BINS, SAMPLES)

    def pool(features: list[Tensor], boxes: Tensor, strides: tuple[int, ...]) -> Tensor:
        pooled = pooler(dict(zip(names, features, strict=True)), list(boxes), [(HEIGHT, WIDTH)] * len(boxes))
        return pooled.flatten(2).transpose(1, 2).unflatten(0, boxes.shape[:2])  # a view

    return pool


def planar(inputs: dict[str, Any]) -> dict[str, Any]:
    """The maps in NCHW memory, torchvision's fastest."""
    return inputs | {"features": [feature.contiguous() for feature in inputs["features"]]}


if __name__ == "__main__":
    sys.exit(main("multiscale_roi_align", cases))
