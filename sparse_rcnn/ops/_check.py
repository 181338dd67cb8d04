"""Argument checks that the operators share: name the argument, what was wanted and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Raise unless ``tensor`` has ``shape``; a string stands for any size and names it in the message.

    Raises:
        TypeError: not a tensor.
        ValueError: another rank or another size.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=False)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is of a floating dtype."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a tensor of ``dtype``."""
    got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    if got != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {got}")


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise ``TypeError`` unless all tensors have the dtype of the first; autocast makes them equal by itself."""
    (first, head), *rest = tensors.items()
    if torch.is_autocast_enabled(head.device.type):
        return
    for name, tensor in rest:
        if tensor.dtype != head.dtype:
            raise TypeError(f"{name}: expected {head.dtype} like {first}, got {tensor.dtype}")


def check_integral(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is int64, the dtype of labels, counts and indices."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {tensor.dtype}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all tensors are on the device of the first."""
    (first, head), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != head.device:
            raise ValueError(f"{name}: expected it on {head.device} like {first}, got {tensor.device}")


def nan_unless_finite(tensor: Tensor) -> Tensor:
    """0 for each of the stages of a tensor [S, ...], NaN for those in which a number is not finite."""
    values = tensor.detach().flatten(1)
    return (values - values).sum(1)
