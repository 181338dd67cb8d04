"""Linear layers of the head with weights of one type, and the two inexact forms that the heavy ones can take:
factors of low rank, and 8-bit floating point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_rcnn.onednn import linear, packed

FP8 = torch.float8_e4m3fn
_FP8_MULTIPLE = 16  # that a GPU's matrix product of this type asks of both sides of the weight

Layer = Callable[[Tensor], Tensor]  # [..., Ci] -> [..., Co]


class Dense:
    """``linear`` with its weights bound.

    Args:
        weight, bias: [Co, Ci], or what :func:`~sparse_rcnn.onednn.packed` made of it, and [Co] or None; of the device
            and the type of the computation.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Fp8:
    """Weight and input in :data:`FP8`, each row of both with a scale of its own; sums in float32.

    A GPU multiplies them as they are; elsewhere their values are multiplied in the type of the input, which gives the
    same sums, slowly.

    Args:
        weight, bias: as of :class:`Dense`, the weight in rows.

    Raises:
        ValueError: on a GPU, a side of the weight that is not a multiple of 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.quantized, self.scales = quantize(weight)  # [Co, Ci], [Co, 1]
        self.bias = bias
        if weight.is_cuda and any(side % _FP8_MULTIPLE for side in weight.shape):
            raise ValueError(f"fp8: expected layers of multiples of {_FP8_MULTIPLE}, got {list(weight.shape)}")

    def __call__(self, x: Tensor) -> Tensor:
        rows, scales = quantize(x.flatten(0, -2))
        y = self._multiply_on_gpu(rows, scales) if x.is_cuda else self._multiply(rows, scales)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def _multiply_on_gpu(self, rows: Tensor, scales: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.bfloat16()
        return torch._scaled_mm(rows, self.quantized.t(), scales, self.scales.t(), bias, out_dtype=torch.bfloat16)

    def _multiply(self, rows: Tensor, scales: Tensor) -> Tensor:
        y = linear(rows.float(), self.quantized.float()) * scales * self.scales.t()
        return y if self.bias is None else y + self.bias.float()


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x [R, C] as FP8 [R, C], and what each is to be multiplied by, float32 [R, 1].

    The largest value of a row becomes the largest of the type, 448; a row of zeros stays one.
    """
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True) / torch.finfo(FP8).max
    scales = torch.where(scales > 0, scales, 1.0)
    return (x / scales).to(FP8), scales


class InTurn:
    """Layers one after the other."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors up [Co, rank] and down [rank, Ci], float32, whose product is the nearest to the weight [Co, Ci] of that
    rank: its truncated singular value decomposition, as Fast R-CNN (section 3.1) speeds up its layers."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = values[:rank].sqrt()  # halves in both, for the sake of half types
    return (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()


def make_layer(
    layer: nn.Linear, device: torch.device, dtype: torch.dtype, rows: int, rank: int | None, fp8: bool
) -> Layer:
    """What ``layer`` computes of some ``rows`` rows, in ``dtype`` on ``device``; of reduced rank and in 8 bits if asked
    for.

    On a GPU, weights that have the type and the device already are shared, unless they are changed.
    """
    kind = Fp8 if fp8 else Dense
    weights = [layer.weight.detach()] if rank is None else [*reversed(low_rank(layer.weight, rank))]
    bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
    weights = [weight.to(device, torch.float32 if fp8 else dtype) for weight in weights]
    weights = weights if fp8 else [packed(weight, rows) for weight in weights]
    last = kind(weights[-1], bias)
    return last if rank is None else InTurn(kind(weights[0], None), last)


def check_compression(rank: int | None, largest: int, fp8: bool, device: torch.device) -> None:
    """Whether the head's heavy layers can be compressed so.

    Raises:
        ValueError: a rank outside of 1 to ``largest``, or 8 bits on a GPU without a matrix product of them.
    """
    if rank is not None and not 1 <= rank <= largest:
        raise ValueError(f"out_layer_rank: expected 1 to {largest}, got {rank}")
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8: expected a GPU of compute capability 8.9 or more, got {name}")
