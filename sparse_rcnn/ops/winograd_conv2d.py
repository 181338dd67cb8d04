"""3x3 convolutions in float32 with fewer products: Winograd's minimal filtering, for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_dtype, check_same_device, check_shape

POINTS = 36
INPUTS, OUTPUTS = 16, 32  # Channels of input and output are multiples of these.
_NEAR, _FAR = 2 / 3, 3 / 2  # The taps are a polynomial, interpolated at 0, both, their negatives, and infinity.


def _interpolation() -> Tensor:
    """[6, 3] float64, that takes three taps to the six points."""
    rows = [[1.0, 0.0, 0.0]]
    for point, other in ((_NEAR, _FAR), (_FAR, _NEAR)):
        scale = 2 * point**2 * (point**2 - other**2)
        rows += [[1 / scale, sign * point / scale, point**2 / scale] for sign in (1, -1)]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """``conv2d(x) + bias + residual``, then ReLU if asked for: 3x3 taps, stride 1, a frame of zeros one cell wide.

    In tiles of 4x4 cells with 36 products in place of 144. The error is about twice a direct convolution's: the
    transforms enlarge that of the products, which are sums over the input channels alone.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, F(4x4, 3x3); that the error
    depends on the points: Barabasz, Anderson, Soodhalter and Gregg, "Error Analysis and Improving the Accuracy of
    Winograd Convolution for Deep Neural Networks", 2020. These are found by trial.

    Args:
        x: [B, Ci, H, W] float32, channels-last in memory (else it is copied); Ci a multiple of 16.
        weight: [Co / T, 36, Ci, T] float32, made by :func:`winograd_weight`.
        bias: [Co] or None.
        residual: [B, Co, H, W] or None, channels-last.

    Returns:
        [B, Co, H, W], channels-last. Tensors that want gradients get them, from the reference.

    Raises:
        TypeError, ValueError: an argument of another shape, type or device.
    """
    _check(x, weight, bias, residual)
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    native = None if trains else _library.kernels("winograd_conv2d", x.device)
    if native is None:
        return winograd_conv2d_reference(x, weight, bias, residual, relu)
    residual = None if residual is None else residual.permute(0, 2, 3, 1)
    return native.winograd_conv2d(x.permute(0, 2, 3, 1), weight, bias, residual, relu).permute(0, 3, 1, 2)


def winograd_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """The specification of :func:`winograd_conv2d`."""
    result = F.conv2d(x, direct_weight(weight), bias, padding=1)
    result = result if residual is None else result + residual
    return result.relu() if relu else result


def winograd_weight(weight: Tensor) -> Tensor:
    """The weights of a 3x3 convolution, [Co, Ci, 3, 3], as :func:`winograd_conv2d` takes them: [Co / T, 36, Ci, T].

    T, the output channels whose weights lie together, is 64, or 32 where 64 do not divide them.

    Raises:
        ValueError: Co is no multiple of 32, Ci none of 16, or these are not 3x3 taps.
    """
    check_shape("weight", weight, ("Co", "Ci", 3, 3))
    if not suits_winograd(*weight.shape[:2]):
        raise ValueError(
            f"weight: expected Co a multiple of {OUTPUTS} and Ci of {INPUTS}, got shape {list(weight.shape)}"
        )
    transform = _interpolation().to(weight.device)
    transform = torch.kron(transform, transform)  # [36, 9]
    together = OUTPUTS if len(weight) % (2 * OUTPUTS) else 2 * OUTPUTS
    result = weight.new_empty(len(weight) // together, POINTS, weight.shape[1], together)
    for points, some in zip(result, weight.split(together), strict=True):  # in float64, a part at a time
        taps = some.double().permute(2, 3, 1, 0).reshape(9, -1)
        points.copy_((transform @ taps).view_as(points))
    return result


def direct_weight(weight: Tensor) -> Tensor:
    """The weights [Co, Ci, 3, 3] that :func:`winograd_weight` made these of."""
    back = torch.linalg.pinv(_interpolation()).to(weight)  # [3, 6]
    points = weight.permute(0, 3, 2, 1).flatten(0, 1).unflatten(2, (6, 6))  # [Co, Ci, 6, 6]
    return back @ points @ back.T


def suits_winograd(outputs: int, inputs: int) -> bool:
    """Whether the kernels take so many channels."""
    return outputs > 0 and inputs > 0 and outputs % OUTPUTS == 0 and inputs % INPUTS == 0


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_shape("x", x, ("B", "Ci", "H", "W"))
    check_shape("weight", weight, ("Co / T", POINTS, x.shape[1], "T"))
    outputs = weight.shape[0] * weight.shape[3]
    if weight.shape[3] not in (OUTPUTS, 2 * OUTPUTS):
        raise ValueError(f"weight: expected one of winograd_weight's, got shape {list(weight.shape)}")
    if not suits_winograd(outputs, x.shape[1]):
        raise ValueError(f"x: expected a multiple of {INPUTS} channels, at least one, got {list(x.shape)}")
    named = {"x": x, "weight": weight}
    if bias is not None:
        check_shape("bias", bias, (outputs,))
        named["bias"] = bias
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], outputs, *x.shape[2:]))
        named["residual"] = residual
    for name, tensor in named.items():
        check_dtype(name, tensor, torch.float32)
    check_same_device(**named)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(*x.shape[:3], weight.shape[0] * weight.shape[3])


_library.declare("winograd_conv2d", fake=_fake)
