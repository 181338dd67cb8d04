"""Images of several sizes, and their targets, as tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_rcnn.losses import PackedTargets
from sparse_rcnn.losses.denoising import NoisyProposals

# Pixels: the largest stride, so that every level of the pyramid has whole cells.
SIZE_MULTIPLE = 32


class PaddedShape(NamedTuple):
    """What a batch is padded to: pixels a side, multiples of ``SIZE_MULTIPLE``, and columns M of its targets."""

    height: int
    width: int
    boxes: int


@dataclass
class Batch:
    """The input of one training step.

    Attributes:
        pixels: [B, 3, H, W] RGB 0..255, uint8 or float32; the images are at the top left.
        sizes: [B, 2] (height, width) of the images in it, of the dtype that boxes have.
        targets: of the B images, the boxes of the dtype of ``sizes``.
        noisy: further proposals made of the targets, or None.
    """

    pixels: Tensor
    sizes: Tensor
    targets: PackedTargets
    noisy: NoisyProposals | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; from pinned memory without a wait."""
        pixels, sizes = (tensor.to(device, non_blocking=True) for tensor in (self.pixels, self.sizes))
        noisy = None if self.noisy is None else self.noisy.to(device)
        return Batch(pixels, sizes, self.targets.to(device), noisy)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in one order."""
        targets = self.targets.labels, self.targets.boxes, self.targets.counts
        return self.pixels, self.sizes, *targets, *(() if self.noisy is None else self.noisy.tensors())


def pad_images(
    images: Sequence[Tensor], dtype: torch.dtype, shape: tuple[int, int] | None = None, pin_memory: bool = False
) -> tuple[Tensor, Tensor]:
    """Check and pad the images of a batch, on the device of the first.

    Args:
        images: CHW tensors, uint8 0..255 or floating 0..1.
        dtype: of the sizes.
        shape: (height, width) to pad to, multiples of 32; None is the least that holds every image.
        pin_memory: make them in memory that a GPU reads without the host waiting for it.

    Returns:
        ``pixels`` and ``sizes`` of :class:`Batch`; the pixels are 0 in padding, and uint8 if all images are.

    Raises:
        TypeError, ValueError: naming the image and what is wrong.
    """
    if isinstance(images, Tensor) and images.dim() == 3 or len(images) == 0:
        raise ValueError("images: expected a list of at least one CHW tensor")
    for index, image in enumerate(images):
        _check_image(f"images[{index}]", image)
    largest = tuple(max(image.shape[axis] for image in images) for axis in (1, 2))
    height, width = shape or (round_up(size, SIZE_MULTIPLE) for size in largest)
    if height < largest[0] or width < largest[1]:
        raise ValueError(f"shape: expected at least {largest[0]} x {largest[1]} for the images, got {height} x {width}")
    whole = all(image.dtype == torch.uint8 for image in images)
    device = images[0].device
    pixels = torch.zeros(
        *(len(images), 3, height, width),
        dtype=torch.uint8 if whole else torch.float32,
        device=device,
        pin_memory=pin_memory and device.type == "cpu",
    )
    for slot, image in zip(pixels, images, strict=True):
        window = slot[:, : image.shape[1], : image.shape[2]]
        window.copy_(image if image.dtype == torch.uint8 else image.to(window) * 255.0)
    sizes = [tuple(image.shape[1:]) for image in images]
    return pixels, torch.tensor(sizes, dtype=dtype, pin_memory=pin_memory)


def normalize_pixels(pixels: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(pixels - mean) / std`` in float32 inside the images, 0 in padding.

    Args:
        pixels, sizes: of :class:`Batch`.
        mean, std: of the three channels, 0..255.
    """
    mean, std = (_constant(values, pixels.device).view(3, 1, 1) for values in (mean, std))
    rows, columns = (torch.arange(size, device=pixels.device) for size in pixels.shape[2:])
    heights, widths = sizes.view(-1, 2, 1, 1, 1).unbind(1)  # [B, 1, 1, 1]
    padding = (rows.view(-1, 1) >= heights) | (columns >= widths)  # [B, 1, H, W]
    return pixels.sub(mean).div_(std).masked_fill_(padding, 0.0)


def _constant(values: Sequence[float], device: torch.device) -> Tensor:
    """float32 made on the device, since the host would wait for a copy of its own."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def _check_image(name: str, image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"{name}: expected shape [3, H, W], got {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"{name}: expected uint8 0..255 or floating point 0..1, got {image.dtype}")
