"""The dynamic interaction of a proposal with its RoI features (Sparse R-CNN, section 3.2, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops._check import check_floating, check_same_device, check_shape


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

    Source: Sparse R-CNN, algorithm 1: bmm, LayerNorm(D), ReLU, bmm, LayerNorm(C), ReLU.

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
    check_same_device(roi_features=roi_features, parameters=parameters, norm1_weight=norm1_weight)
    return dynamic_conv_reference(roi_features, parameters, norm1_weight, norm1_bias, norm2_weight, norm2_bias, eps)


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
