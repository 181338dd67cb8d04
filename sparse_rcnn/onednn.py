"""What of oneDNN, the CPU library under PyTorch, can be called from here: convolutions and linear layers with fused
activations and sums, the operators that ``torch.compile`` calls too. Where they are missing, or the processor has no
fast half types, PyTorch's ordinary operators serve."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_OPERATORS = ("_convolution_pointwise", "_convolution_pointwise_", "_linear_pointwise", "_reorder_linear_weight")


@functools.cache
def cpu_has(dtype: torch.dtype) -> bool:
    """Whether this processor computes in ``dtype`` itself: bfloat16 with avx512_bf16 or AMX, float16 with avx512_fp16
    or AMX-FP16."""
    features = torch.cpu.get_capabilities()
    wanted = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    return dtype in (torch.float32, torch.float64) or any(features.get(name) for name in wanted.get(dtype, ()))


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused operators are there and compute in ``dtype`` at speed."""
    available = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    return available and dtype != torch.float64 and cpu_has(dtype)


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of ``weight`` [Co, Ci] in the order in which oneDNN multiplies ``rows`` rows by it, for :func:`linear`
    alone: otherwise it is sorted anew in every call, an eighth of the time of a wide layer's. As it is where oneDNN
    does not serve."""
    if weight.device.type != "cpu" or not has_onednn(weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """``F.linear``, then ReLU if asked for; x [..., Ci], weight [Co, Ci] or what :func:`packed` made of it, bias [Co].

    On the CPU by oneDNN, in float32 too, where PyTorch itself takes the BLAS that it was built with: that of its wheels
    runs at half the speed on processors that are not of its maker. With gradients, where they are wanted, of the first
    order.
    """
    if x.numel() == 0 and weight.is_mkldnn:  # of nothing it can make no product
        return x.new_zeros(*x.shape[:-1], len(weight))
    if x.device.type != "cpu" or not has_onednn(x.dtype) or x.numel() == 0:
        x = F.linear(x, weight, bias)
        return x.relu_() if relu else x
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        x = _Linear.apply(x, weight, bias)
        return x.relu_() if relu else x
    return _product(x, weight, bias, "relu" if relu else "none")


class _Linear(torch.autograd.Function):
    """The gradients are products of the same kind, of transposed views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [R, Ci], [R, Co]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grads, weight.t()).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grads.t(), rows.t())
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
