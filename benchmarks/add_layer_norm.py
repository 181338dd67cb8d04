"""add_layer_norm: the residual LayerNorm of a stage and the LayerNorm + ReLU of its towers, 300 and 4800 proposals."""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Case, main, native
from sparse_rcnn.ops import add_layer_norm, add_layer_norm_reference


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """C = 256; the LayerNorm's parameters are of the features' dtype, which is what the eager reference wants."""
    C = 256
    for R in (300, 4800):
        for residual in (True, False):

            def inputs(generator: torch.Generator, R: int = R, residual: bool = residual) -> dict[str, Any]:
                shapes = {"x": (R, C), "weight": (C,), "bias": (C,)} | ({"residual": (R, C)} if residual else {})
                tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
                tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
                return {"residual": None, **tensors, "relu": not residual}

            row = R * C * dtype.itemsize
            wrt = ("x", "residual", "weight", "bias") if residual else ("x", "weight", "bias")
            yield Case(
                name=f"[{R}, {C}] " + ("+ residual" if residual else "and ReLU"),
                inputs=inputs,
                reference=add_layer_norm_reference,
                implementations={"native": native(add_layer_norm)},
                bytes={"forward": row * (2 + residual), "backward": row * (3 + residual)},
                wrt=() if device.type == "cpu" else wrt,  # where PyTorch's operators serve training
                headline=R == 300,
            )


if __name__ == "__main__":
    sys.exit(main("add_layer_norm", cases))
