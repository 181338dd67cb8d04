"""A convolution with all that follows it: folded normalisation, bias, residual and activation in one call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_rcnn.onednn import has_onednn
from sparse_rcnn.ops import _library, winograd_conv2d, winograd_weight
from sparse_rcnn.ops.winograd_conv2d import suits_winograd

# Of a convolution that Winograd's filtering serves: those of 512 channels, in the deepest stage of a ResNet-50, would
# take 56 MB more, and 30 ms less of its 1.5 s.
_MOST_WEIGHTS = 9 * 256**2


@dataclass(frozen=True)
class Activation:
    """An elementwise function in oneDNN's words: ``name``, numbers and algorithm; ``module`` computes the same."""

    module: nn.Module
    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = None

    @classmethod
    def of(cls, module: nn.Module) -> Activation | None:
        """The activation that ``module`` is, or None where oneDNN has no such function."""
        match module:
            case nn.ReLU():
                return cls(module, "relu")
            case nn.Hardtanh():  # ReLU6 is one
                return cls(module, "hardtanh", (float(module.min_val), float(module.max_val)))
            case nn.SiLU():
                return cls(module, "swish")
            case nn.Hardswish():
                return cls(module, "hardswish")
            case nn.Sigmoid():
                return cls(module, "sigmoid")
            case nn.GELU():
                return cls(module, "gelu", (), module.approximate)
        return None


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of the convolution that gives what ``norm`` makes of this one's result.

    Args:
        weight, bias: [Co, Ci / groups, h, w] and [Co] or None.
        norm: a BatchNorm of fixed statistics: ``running_mean``, ``running_var``, ``eps``, and ``weight`` and ``bias``
            or None.
    """
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if bias is not None:
        shift = shift + bias.double() * scale
    return weight.double() * scale.view(-1, 1, 1, 1), shift


class FusedConv2d(nn.Module):
    """``activation(conv(x) + residual)``, channels-last.

    On the CPU one call of oneDNN, or of :func:`~sparse_rcnn.ops.winograd_conv2d` after :meth:`use_winograd`; on a GPU
    cuDNN's fused convolution where the activation is a ReLU; elsewhere PyTorch's own operators, one after the other.

    Args:
        conv: gives weight, bias and geometry; a convolution of timm's with TensorFlow's "same" padding is known by its
            type's name.
        norm: the BatchNorm behind it, see :func:`fold_norm`, or None.
        device, dtype: of weights, inputs and results.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        self.kernel = list(conv.kernel_size)
        self.same = type(conv).__name__ == "Conv2dSame"
        self.padding = [0, 0] if self.same else list(conv.padding)
        self.activation: Activation | None = None
        # Whether ``residual`` is used by nobody else, so that the result can take its place.
        self.overwrite = False
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            weight, bias = fold_norm(weight, bias, norm)
        # Not in oneDNN's own blocked layouts: one that suits an input size is up to ten times slower for another, and
        # no more than 2 % faster over a ResNet-50 for its own.
        weight = weight.to(device, dtype).clone(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach().to(device, dtype))
        self.onednn = device.type == "cpu" and has_onednn(dtype)
        # With a row and a column of zeros before it, a kernel needs the same padding on both sides where it needed one
        # more at the end: no padded copy of the map. Only a depthwise one costs less than the copy.
        depthwise = self.same and self.groups == conv.in_channels > 1 and self.dilation == [1, 1]
        wider = F.pad(weight, (1, 0, 1, 0)) if self.onednn and depthwise else None
        self.register_buffer("wider", None if wider is None else wider.clone(memory_format=torch.channels_last))
        self.cudnn = device.type == "cuda" and torch.backends.cudnn.is_available() and self.bias is not None
        self.winograd = False

    def use_winograd(self) -> None:
        """From now on, let Winograd's filtering compute what it can and computes in half the time: 3x3 taps in float32,
        on a CPU with wide vectors. The weights are its own then, and four times as large, for which they have to be
        few."""
        geometry = (self.kernel, self.stride, self.dilation, self.padding, self.groups)
        fits = geometry == ([3, 3], [1, 1], [1, 1], [1, 1], 1) and suits_winograd(*self.weight.shape[:2])
        fits = fits and self.weight.numel() <= _MOST_WEIGHTS
        if not fits or not has_winograd() or self.weight.is_cuda or self.weight.dtype != torch.float32:
            return
        if self.activation is None or self.activation.name == "relu":
            self.weight, self.winograd = winograd_weight(self.weight), True

    @property
    def products(self) -> float:
        """Multiplications that a cell of the result takes."""
        return self.weight.numel() / 16 if self.winograd else self.weight.numel()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, Ci, H, W] and residual of the result's shape, or None: [B, Co, H', W']."""
        if self.winograd:
            return winograd_conv2d(x, self.weight, self.bias, residual, relu=self.activation is not None)
        weight, padding = self.weight, self.padding
        if self.same:
            x, weight, padding = self._pad_as_tensorflow(x)
        if self.onednn:
            return self._onednn(x, weight, residual, padding)
        if self.cudnn and self.activation is not None and self.activation.name == "relu":
            try:
                return self._cudnn(x, residual, padding)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # no engine for this geometry or type, which the first call tells
                self.cudnn = False
        x = F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        if residual is not None:
            x = x.add_(residual)
        return x if self.activation is None else self.activation.module(x)

    def _cudnn(self, x: Tensor, residual: Tensor | None, padding: list[int]) -> Tensor:
        geometry = (self.bias, self.stride, padding, self.dilation, self.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, *geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, *geometry)

    def _onednn(self, x: Tensor, weight: Tensor, residual: Tensor | None, padding: list[int]) -> Tensor:
        geometry = (padding, self.stride, self.dilation, self.groups)
        act = self.activation
        if residual is None:
            name, scalars, algorithm = (
                ("none", [], None) if act is None else (act.name, list(act.scalars), act.algorithm)
            )
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *geometry, name, scalars, algorithm)
        relu = None if act is None else act.name  # a ReLU: nothing else is fused behind a sum
        if self.overwrite:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, x, weight, self.bias, *geometry, "add", 1.0, relu, [], None
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, weight, self.bias, *geometry, "add", 1.0, relu, [], None
        )

    def _pad_as_tensorflow(self, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """``x``, the weights and the padding that give ceil(size / stride) rows and columns, the odd one at the end."""
        totals = [
            max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            for size, stride, kernel, dilation in zip(
                x.shape[-2:], self.stride, self.kernel, self.dilation, strict=True
            )
        ]
        if all(total % 2 == 0 for total in totals):
            return x, self.weight, [total // 2 for total in totals]
        if self.wider is not None and all(total % 2 for total in totals):
            return x, self.wider, [total // 2 + 1 for total in totals]
        (top, left), (height, width) = (total // 2 for total in totals), totals
        return F.pad(x, (left, width - left, top, height - top)), self.weight, [0, 0]


def has_winograd() -> bool:
    """Whether this processor has the vectors that Winograd's filtering gains by."""
    native = _library.serving("winograd_conv2d", "cpu") == _library.NATIVE
    return native and torch.ops.sparse_rcnn.cpu_capability() != "baseline"
