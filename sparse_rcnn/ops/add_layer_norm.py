"""Residual, LayerNorm and ReLU as one operator: the small steps between the head's matrix products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_floating, check_same_device, check_shape


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, relu: bool = False
) -> Tensor:
    """``LayerNorm(x + residual)`` over the last dimension, then ReLU if asked for.

    Source: Ba et al., 2016 (layer normalisation); the residual blocks of Sparse R-CNN's head. The kernels keep the sum
    and the statistics in float32 (float64 for float64) and round once, at the end.

    Args:
        x: [..., C] floating point.
        residual: of the shape of ``x``, or None.
        weight, bias: [C] of the LayerNorm.
        eps: of the LayerNorm.
        relu: whether a ReLU follows.

    Returns:
        [..., C] in the wider dtype of ``x`` and ``residual``, under autocast too: what is a half type stays one.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    if residual is None:
        del tensors["residual"]
    _check(**tensors)
    native = _library.kernels("add_layer_norm", x.device)
    if native is None or (_wants_gradient(tensors.values()) and not _has_backward(x.device)):
        return add_layer_norm_reference(x, residual, weight, bias, eps, relu)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return native.add_layer_norm(x, residual, weight.to(wide), bias.to(wide), eps, relu)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, relu: bool = False
) -> Tensor:
    """The specification of :func:`add_layer_norm`."""
    if residual is not None:
        x = x + residual
    x = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.relu(x) if relu else x


def _wants_gradient(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _has_backward(device: torch.device) -> bool:
    """Not on the CPU, where it would cost more than it saves: see csrc/cpu/add_layer_norm.cpp."""
    return _library.serving("add_layer_norm_backward", device.type) != _library.REFERENCE


def _check(x: Tensor, weight: Tensor, bias: Tensor, **residual: Tensor) -> None:
    tensors = {"x": x, **residual, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        check_floating(name, tensor)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., C] with C >= 1, got {list(x.shape)}")
    for name, tensor in residual.items():
        check_shape(name, tensor, tuple(x.shape))
    check_shape("weight", weight, x.shape[-1:])
    check_shape("bias", bias, x.shape[-1:])
    check_same_device(**tensors)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    rows, C = x.numel() // x.shape[-1], x.shape[-1]
    part = torch.sym_max(8, (rows + 255) // 256)  # as rows_of_part() in csrc/cuda/add_layer_norm.cu
    parts = weight.new_empty((rows + part - 1) // part, 2, C)
    return torch.empty_like(x, memory_format=torch.contiguous_format), parts


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(*tensors)


def _backward(native: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x, parts = native.add_layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.relu)
    grad_weight, grad_bias = parts.sum(0)
    # One tensor for two gradients: whoever gets it must not write to it, and autograd does not.
    grad_residual = None if ctx.saved_tensors[1] is None else grad_x
    return grad_x, grad_residual, grad_weight, grad_bias, None, None


_library.declare("add_layer_norm", fake=_fake, setup_context=_setup_context, backward=_backward)
_library.declare("add_layer_norm_backward", fake=_fake_backward)
