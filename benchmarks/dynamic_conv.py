"""dynamic_conv: the proposals of an image as a stage of the head interacts with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, main, native
from sparse_rcnn.ops import dynamic_conv, dynamic_conv_reference
from sparse_rcnn.self_test import steady_norm

NORMS = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """R50 with 300 proposals is the headline; the small preset has narrow matrices."""
    yield _case("300 proposals", 300, 256, 64, device, dtype, headline=True)
    yield _case("50 proposals of the small preset", 50, 96, 16, device, dtype)
    if device.type == "cuda":
        yield _case("16 images of 300 proposals", 4800, 256, 64, device, dtype, headline=True)


def _case(name: str, R: int, C: int, D: int, device: torch.device, dtype: torch.dtype, headline: bool = False) -> Case:
    P = 49

    def inputs(generator: torch.Generator) -> dict[str, Any]:
        features = torch.randn(R, P, C, generator=generator).to(device, dtype)
        return {"roi_features": features, **make_operands(R, C, D, device, dtype, generator)}

    # Forward: features and parameters read, the result written. Backward: these, the result's gradient and theirs.
    moved = (2 * R * P * C + 2 * R * C * D) * dtype.itemsize
    return Case(
        name=name,
        inputs=inputs,
        reference=dynamic_conv_reference,
        implementations={"native": native(dynamic_conv)},
        bytes={"forward": moved, "backward": (3 * R * P * C + 4 * R * C * D) * dtype.itemsize},
        flops={"forward": interaction_flops(R, P, C, D), "backward": 3 * interaction_flops(R, P, C, D)},
        wrt=("roi_features", "parameters", *NORMS),
        headline=headline,
    )


def make_operands(
    R: int, C: int, D: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """The generated parameters of R proposals, of a size that keeps the variance, and the norms."""
    first = torch.randn(R, C * D, generator=generator) / C**0.5
    second = torch.randn(R, D * C, generator=generator) / D**0.5
    norms = [tensor for size in (D, C) for tensor in steady_norm(size, generator)]
    operands = {"parameters": torch.cat([first, second], dim=1), **dict(zip(NORMS, norms, strict=True))}
    return {name: tensor.to(device, dtype) for name, tensor in operands.items()}


def interaction_flops(R: int, P: int, C: int, D: int) -> int:
    """Of the two products; the backward has four, and the forward's first ones again."""
    return 2 * 2 * R * P * C * D


if __name__ == "__main__":
    sys.exit(main("dynamic_conv", cases))
