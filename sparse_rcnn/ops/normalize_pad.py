"""From 8-bit images to the network's input: antialiased resize, normalisation, padding, layout and cast in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_dtype, check_integral, check_same_device, check_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIDE = 2**20 - 1  # pixels; sums of 32 bits would not hold the weights of a longer side
_BITS = 22  # of a weight


def normalize_pad(
    images: Sequence[Tensor],
    sizes: Tensor,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Resize 8-bit images, subtract ``mean``, divide by ``std``, and pad them with zeros to one batch.

    The resize is Pillow's antialiased bilinear filter in its own arithmetic of 22-bit weights, horizontal pass first,
    each pass rounded to 8 bits: what ``data.transforms.resize`` gives. (Pillow 13 begins with the vertical pass where
    the height shrinks by more than twice as many pixels as the width; a tenth of the pixels then differ by one grey
    level.) What follows is computed in float32 and rounded once. An image that keeps its size is not changed.

    Source: ``ResizeShortestEdge`` and ``preprocess_image`` of detectron2; ``Resample.c`` of Pillow.

    A captured CUDA graph reads the images and ``sizes`` anew at every replay: give it fixed buffers as ``images``,
    and write other images and sizes into them.

    Args:
        images: B uint8 tensors. [3, h, w] in any memory order, views too, of which the upper left part that ``sizes``
            names is used; or flat, [bytes], which holds the rows of interleaved pixels [height, width, 3] one after
            the other from its beginning on, whatever ``sizes`` says these are, so that one copy fills it.
        sizes: int64 [B, 4]: height and width in pixels of each image, and those that it is resized to. Four zeros
            mark an image that is not there: its place in the batch is all padding.
        shape: (height, width) of the batch. An image's padding is at its right and its bottom.
        mean, std: of the three channels, on the scale 0..255.
        dtype: of the result, float32, bfloat16 or float16.

    Returns:
        [B, 3, height, width] of ``dtype``, channels_last in memory.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; and if ``sizes`` is on the CPU,
            a size beyond the image or ``shape``. On a GPU, where the host would have to wait for it to know, such an
            image counts as not there.
    """
    _check(images, sizes, shape, mean, std, dtype)
    device = images[0].device
    if sizes.device.type == "cpu":
        _check_sizes(images, sizes, shape)
        if device.type == "cuda":
            sizes = sizes.pin_memory().to(device, non_blocking=True)
    native = _library.kernels("normalize_pad", device)
    if native is None:
        return normalize_pad_reference(images, sizes, shape, mean, std, dtype)
    batch = native.normalize_pad(list(images), sizes, *shape, [*map(float, mean)], [*map(float, std)], dtype)
    return batch.permute(0, 3, 1, 2)


def normalize_pad_reference(
    images: Sequence[Tensor],
    sizes: Tensor,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The specification of :func:`normalize_pad`."""
    batch = torch.zeros(len(images), 3, *shape, device=images[0].device)
    mean, std = (batch.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    for slot, image, size in zip(batch, images, sizes.tolist(), strict=True):
        if not _fits(image, size, shape):
            continue
        height, width, new_height, new_width = size
        pixels = image
        if image.dim() == 1:
            pixels = image[: 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        pixels = _resize_rows(pixels[:, :height, :width], new_width)
        pixels = _resize_rows(pixels.transpose(1, 2), new_height).transpose(1, 2)
        slot[:, :new_height, :new_width] = (pixels - mean) / std
    return batch.to(dtype).contiguous(memory_format=torch.channels_last)


def _resize_rows(pixels: Tensor, to: int) -> Tensor:
    """uint8 [..., from] -> [..., to]."""
    taps, weights = (tensor.to(pixels.device) for tensor in _resize_weights(pixels.shape[-1], to))
    sums = torch.full((*pixels.shape[:-1], to), 2 ** (_BITS - 1), dtype=torch.int32, device=pixels.device)
    for tap, weight in zip(taps, weights, strict=True):
        sums += pixels[..., tap] * weight
    return (sums >> _BITS).clamp(max=255).to(torch.uint8)


def _resize_weights(size: int, to: int) -> tuple[Tensor, Tensor]:
    """The input pixels that each output pixel sees, [taps, to] int64, and their weights, int32."""
    scale = size / to
    support = max(scale, 1.0)
    center = (torch.arange(to, dtype=torch.float64) + 0.5) * scale
    begin = (center - support + 0.5).long().clamp(min=0)
    end = (center + support + 0.5).long().clamp(max=size)
    taps = begin + torch.arange(int((end - begin).max()))[:, None]
    weights = 1 - ((taps - center + 0.5) * (1 / support)).abs()
    weights = torch.where(taps < end, weights.clamp(min=0), 0)
    # Added one after the other: another order could round another way.
    shares = weights / weights.cumsum(0)[-1]
    return taps.clamp(max=size - 1), (0.5 + shares * 2**_BITS).to(torch.int32)


def _fits(image: Tensor, size: Sequence[int], shape: tuple[int, int]) -> bool:
    height, width, new_height, new_width = size
    most = image.shape[1:] if image.dim() == 3 else (MAX_SIDE, MAX_SIDE)
    inside = 1 <= height <= most[0] and 1 <= width <= most[1]
    packed = image.dim() == 3 or 3 * height * width <= image.numel()
    return inside and packed and 1 <= new_height <= shape[0] and 1 <= new_width <= shape[1]


def _check_sizes(images: Sequence[Tensor], sizes: Tensor, shape: tuple[int, int]) -> None:
    for index, (image, size) in enumerate(zip(images, sizes.tolist(), strict=True)):
        if any(size) and not _fits(image, size, shape):
            raise ValueError(
                f"sizes[{index}]: expected a size within images[{index}], of shape {list(image.shape)}, and one "
                f"within shape, {tuple(shape)}, or four zeros, got {size}"
            )


def _check(
    images: Sequence[Tensor],
    sizes: Tensor,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    if isinstance(images, Tensor) or len(images) == 0:
        raise ValueError("images: expected a list of at least one image")
    for index, image in enumerate(images):
        name = f"images[{index}]"
        check_dtype(name, image, torch.uint8)
        if image.dim() == 1 and not image.is_contiguous():
            raise ValueError(f"{name}: expected the bytes of a flat image in a row, got the stride {image.stride(0)}")
        if image.dim() != 1:
            if image.dim() != 3 or image.shape[0] != 3:
                raise ValueError(f"{name}: expected shape [3, h, w] or [bytes], got {list(image.shape)}")
            if max(image.shape) > MAX_SIDE:
                raise ValueError(f"{name}: expected sides of at most {MAX_SIDE} pixels, got {list(image.shape)}")
        check_same_device(**{"images[0]": images[0], name: image})
    check_shape("sizes", sizes, (len(images), 4))
    check_integral("sizes", sizes)
    if sizes.device.type != "cpu":
        check_same_device(**{"images[0]": images[0], "sizes": sizes})
    if len(shape) != 2 or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in shape):
        raise ValueError(f"shape: expected (height, width) of 1 to {MAX_SIDE} pixels, got {shape}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name}: expected three finite numbers, got {list(values)}")
    if 0 in std:
        raise ValueError(f"std: expected numbers other than zero, got {list(std)}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")


def _fake(images: Sequence[Tensor], sizes: Tensor, height: int, width: int, mean: Any, std: Any, dtype: Any) -> Tensor:
    return images[0].new_empty(len(images), height, width, 3, dtype=dtype)


_library.declare("normalize_pad", fake=_fake)
