"""winograd_conv2d: the 3x3 convolutions of a ResNet-50 with its pyramid at 800x1333, against direct ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, main, native
from sparse_rcnn.onednn import has_onednn
from sparse_rcnn.ops import winograd_conv2d, winograd_conv2d_reference, winograd_weight
from sparse_rcnn.ops.winograd_conv2d import direct_weight

HEIGHT, WIDTH = 800, 1344
# (stride, channels) of the maps: the pyramid's finest and coarsest level, and the four stages of the body.
MAPS = {"P2": (4, 256), "P5": (32, 256), "res2": (4, 64), "res3": (8, 128), "res4": (16, 256), "res5": (32, 512)}


def direct(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """oneDNN's, with bias and ReLU in the same call."""
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, "relu" if relu else "none", [], None)


def with_direct_weight(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with 3x3 weights, channels-last."""
    return inputs | {"weight": direct_weight(inputs["weight"]).contiguous(memory_format=torch.channels_last)}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Float32 on a CPU: the kernels take nothing else."""
    if device.type != "cpu" or dtype != torch.float32:
        return
    for name, (stride, channels) in MAPS.items():
        height, width = HEIGHT // stride, WIDTH // stride

        def inputs(generator: torch.Generator, shape: tuple[int, ...] = (1, height, width, channels)) -> dict[str, Any]:
            channels = shape[-1]
            weight = torch.randn(channels, channels, 3, 3, generator=generator) / (3 * channels**0.5)
            x = torch.randn(shape, generator=generator).permute(0, 3, 1, 2)
            bias = torch.randn(channels, generator=generator)
            return {"x": x, "weight": winograd_weight(weight), "bias": bias, "relu": True}

        cells, tiles = height * width, -(-height // 4) * -(-width // 4)
        peers = {"oneDNN": direct} if has_onednn(dtype) else {}
        yield Case(
            name=f"{name}: {channels} channels of {height}x{width}",
            inputs=inputs,
            reference=winograd_conv2d_reference,
            implementations={"native": native(winograd_conv2d), **peers},
            prepare={name: with_direct_weight for name in peers},
            bytes={"forward": 4 * (2 * cells * channels + 36 * channels**2)},
            flops={"forward": 2 * 36 * tiles * channels**2},
            headline=name in ("P2", "res4"),
        )


if __name__ == "__main__":
    sys.exit(main("winograd_conv2d", cases))
