"""roi_dynamic_conv: RoIAlign and the interaction of a stage, on the maps of an R50-FPN at 800x1333."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.dynamic_conv import NORMS, interaction_flops, make_operands
from benchmarks.harness import Case, main, native
from benchmarks.multiscale_roi_align import (
    BINS,
    CHANNELS,
    HEIGHT,
    MIXED,
    SAMPLES,
    STRIDES,
    WIDTH,
    footprint_cells,
    make_boxes,
    planar,
    torchvision_pooler,
)
from sparse_rcnn.ops import (
    dynamic_conv,
    dynamic_conv_reference,
    multiscale_roi_align,
    roi_dynamic_conv,
    roi_dynamic_conv_reference,
)

INNER = 64


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The headline case, and twice as many proposals: time is to grow with their number."""
    yield _case("300 proposals", 300, device, dtype, headline=True)
    yield _case("600 proposals", 600, device, dtype)
    if device.type == "cuda":
        yield _case("16 images of 300 proposals", 300, device, dtype, images=16, headline=True)


def _case(
    name: str, count: int, device: torch.device, dtype: torch.dtype, images: int = 1, headline: bool = False
) -> Case:
    R, P, C, D = images * count, BINS**2, CHANNELS, INNER

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        shapes = [(images, HEIGHT // stride, WIDTH // stride, C) for stride in STRIDES]
        features = [torch.randn(*shape, device=device).to(dtype).permute(0, 3, 1, 2) for shape in shapes]
        boxes = make_boxes(images, count, MIXED, generator).to(device)
        operands = make_operands(R, C, D, device, dtype, generator)
        return {"features": features, "boxes": boxes, **operands, "strides": STRIDES}

    peers, prepare, ungated = {"two operators": native(two_operators)}, {}, {}
    if dtype != torch.bfloat16 or device.type == "cuda":  # which torchvision has no CPU kernel for
        peers["torchvision"] = torchvision_chain()
        prepare["torchvision"] = planar
        ungated["torchvision"] = "its RoIAlign is the one without the shift by half a pixel"
    footprint = footprint_cells(make_boxes(images, count, MIXED, torch.Generator().manual_seed(0)))
    cells = images * sum((HEIGHT // stride) * (WIDTH // stride) for stride in STRIDES)
    pooling = 2 * R * P * C * (2 * SAMPLES) ** 2
    interaction = interaction_flops(R, P, C, D)
    return Case(
        name=name,
        inputs=inputs,
        reference=roi_dynamic_conv_reference,
        implementations={"native": native(roi_dynamic_conv), **peers},
        # Forward: each box's cells, the parameters, the result. Backward: the first two again, the result's gradient,
        # that of the parameters; zeros for the maps' gradient, then each box's cells of it read and written.
        bytes={
            "forward": (footprint * C + 2 * R * C * D + R * P * C) * dtype.itemsize,
            "backward": (footprint * C + 4 * R * C * D + R * P * C) * dtype.itemsize + (cells + 2 * footprint) * C * 4,
        },
        flops={"forward": pooling + interaction, "backward": 2 * pooling + 3 * interaction},
        wrt=("features", "parameters", *NORMS),
        keep=("boxes",),
        prepare=prepare,
        ungated=ungated,
        modes=None if headline else ("forward",),
        headline=headline,
    )


def two_operators(
    features: Sequence[Tensor], boxes: Tensor, parameters: Tensor, strides: Sequence[int], **norms: Tensor
) -> Tensor:
    """Our RoIAlign, then our interaction: the RoI features go through memory."""
    pooled = multiscale_roi_align(features, boxes, strides)
    return dynamic_conv(pooled.flatten(0, 1), parameters, **norms).view_as(pooled)


def torchvision_chain() -> Any:
    """torchvision's pooler, then the interaction in plain PyTorch."""
    pool = torchvision_pooler()

    def run(
        features: list[Tensor], boxes: Tensor, parameters: Tensor, strides: tuple[int, ...], **norms: Tensor
    ) -> Tensor:
        pooled = pool(features, boxes, strides)
        return dynamic_conv_reference(pooled.flatten(0, 1), parameters, **norms).view(pooled.shape)

    return run


if __name__ == "__main__":
    sys.exit(main("roi_dynamic_conv", cases))
