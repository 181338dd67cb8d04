"""The dynamic interaction of a proposal with its RoI features (Sparse R-CNN, section 3.2, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_floating, check_same_device, check_same_dtype, check_shape


def dynamic_conv(
    roi_features: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Two 1x1 convolutions whose weights are the proposal's own, each with LayerNorm and ReLU.

    Source: Sparse R-CNN, algorithm 1: bmm, LayerNorm(D), ReLU, bmm, LayerNorm(C), ReLU. On CUDA, float32 products go
    by tensor cores in TF32 where PyTorch's own may (:func:`tf32_allowed`) and the sizes suit the kernels.

    Args:
        roi_features: [R, P, C] floating point, one row a bin.
        parameters: [R, 2 * C * D]; the first C * D are the first weight [C, D], the others the second [D, C].
        norm1_weight, norm1_bias: [D] of the inner LayerNorm.
        norm2_weight, norm2_bias: [C] of the outer LayerNorm.
        eps: of both LayerNorms.

    Returns:
        [R, P, C].

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_shape("roi_features", roi_features, ("R", "P", "C"))
    check_shape("norm1_weight", norm1_weight, ("D",))
    check_parameters(parameters, roi_features.shape[0], roi_features.shape[2], norm1_weight.shape[0])
    check_norms(roi_features.shape[2], norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    check_floating("roi_features", roi_features)
    check_same_dtype(roi_features=roi_features, parameters=parameters)
    check_same_device(roi_features=roi_features, parameters=parameters)
    check_same_device(roi_features=roi_features, norm1_weight=norm1_weight, norm1_bias=norm1_bias)
    check_same_device(roi_features=roi_features, norm2_weight=norm2_weight, norm2_bias=norm2_bias)
    native = _library.kernels("dynamic_conv", roi_features.device)
    norms = (norm1_weight, norm1_bias, norm2_weight, norm2_bias)
    if native is None:
        return dynamic_conv_reference(roi_features, parameters, *norms, eps)
    norms = wide_norms(norms, roi_features.dtype)
    return native.dynamic_conv(roi_features, parameters, *norms, eps, tf32_allowed())


def dynamic_conv_reference(
    roi_features: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of :func:`dynamic_conv`."""
    R, _, C = roi_features.shape
    D = norm1_weight.shape[0]
    first = parameters[:, : C * D].view(R, C, D)
    second = parameters[:, C * D :].view(R, D, C)
    x = torch.bmm(roi_features, first)  # [R, P, D]
    x = F.relu(F.layer_norm(x, (D,), norm1_weight, norm1_bias, eps))
    x = torch.bmm(x, second)  # [R, P, C]
    return F.relu(F.layer_norm(x, (C,), norm2_weight, norm2_bias, eps))


def check_parameters(parameters: Tensor, rois: int, channels: int, inner: int) -> None:
    """Raise unless ``parameters`` holds the 2 * C * D generated weights of every RoI."""
    check_shape("parameters", parameters, (rois, 2 * channels * inner))
    check_floating("parameters", parameters)


def check_norms(channels: int, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> None:
    """Raise unless the affine parameters of the two LayerNorms fit."""
    check_shape("norm1_weight", weight1, ("D",))
    check_shape("norm1_bias", bias1, tuple(weight1.shape))
    check_shape("norm2_weight", weight2, (channels,))
    check_shape("norm2_bias", bias2, (channels,))


def tf32_allowed() -> bool:
    """Whether PyTorch's setting lets float32 matmuls on CUDA round their operands to TF32, however it was set.

    A graph of torch.compile keeps what held when it was traced.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result() would do, which takes seconds to import the compiler.
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wide_norms(norms: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The norms' parameters in the type that a kernel for ``dtype`` sums in: float32, float64 for float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return tuple(norm.to(wide) for norm in norms)


def split_norm_grads(grad_norms: Tensor, inner: int, channels: int) -> tuple[Tensor, ...]:
    """Sum the RoIs' parts [R, 2 * (D + C)] into the gradients of the four norm parameters."""
    return grad_norms.sum(0).split([inner, inner, channels, channels])


def _fake(roi_features: Tensor, parameters: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(roi_features, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor,
    roi_features: Tensor,
    parameters: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    norm_sizes = 2 * (norm1_weight.shape[0] + norm2_weight.shape[0])
    return (
        torch.empty_like(roi_features, memory_format=torch.contiguous_format),
        torch.empty_like(parameters, memory_format=torch.contiguous_format),
        norm1_weight.new_empty(parameters.shape[0], norm_sizes),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.allow_tf32 = inputs
    ctx.save_for_backward(*tensors)


def _backward(native: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    roi_features, parameters, *norms = ctx.saved_tensors
    grad_roi_features, grad_parameters, grad_norms = native.dynamic_conv_backward(
        grad, roi_features, parameters, *norms, ctx.eps, ctx.allow_tf32
    )
    norm_grads = split_norm_grads(grad_norms, len(norms[0]), len(norms[2]))
    return grad_roi_features, grad_parameters, *norm_grads, None, None


def _autocast(dtype: torch.dtype, roi_features: Tensor, parameters: Tensor, *rest: Any) -> tuple[Any, ...]:
    return roi_features.to(dtype), parameters.to(dtype), *rest


_library.declare("dynamic_conv", fake=_fake, setup_context=_setup_context, backward=_backward, autocast=_autocast)
_library.declare("dynamic_conv_backward", fake=_fake_backward)
