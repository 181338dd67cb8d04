"""Image sizes and training augmentation. Images are uint8 CHW tensors, boxes xyxy in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def network_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Size to resize to: shorter side ``min_size``, unless the longer one would exceed ``max_size``.

    The rounding is that of detectron2's ``ResizeShortestEdge``. No side gets below one pixel.
    """
    if min(height, width) < 1:
        raise ValueError(f"height, width: expected at least one pixel each, got {height} and {width}")
    scale = min_size / min(height, width)
    new_height, new_width = (min_size, scale * width) if height < width else (scale * height, min_size)
    longest = max(new_height, new_width)
    if longest > max_size:
        scale = max_size / longest
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Pillow's antialiased bilinear filter, as detectron2 does; equal size gives the image itself.

    First along the rows, then along the columns: Pillow's own order, which its version 13 reverses for some sizes.

    Args:
        image: uint8 [3, H, W].
        size: (height, width).

    Returns:
        uint8 [3, height, width].
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected uint8 of shape [3, H, W], got {image.dtype} of shape {list(image.shape)}")
    if tuple(image.shape[1:]) == tuple(size):
        return image
    pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    for width, height in ((size[1], pixels.height), (size[1], size[0])):
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def resize_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Boxes [M, 4] of an image of size ``old`` (h, w) after it was resized to ``new``."""
    ratio_y, ratio_x = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes [M, 4] after the image of that width was mirrored left to right."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def crop_boxes(boxes: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes [M, 4] seen through a window, clipped to it, and a mask [M] of those with area left.

    All M boxes are returned, so that the mask can select labels too.
    """
    limit = boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum((boxes - boxes.new_tensor([left, top, left, top])).clamp(min=0), limit)
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


class TrainTransform:
    """Flip, optional random crop, and multi-scale resize: the training augmentation of DETR and Sparse R-CNN.

    With ``crop``, an image is first cropped with probability ``crop_probability``: resized so that its shorter side is
    2/3, 5/6 or 1 of ``crop[1]`` (400, 500 or 600 for the paper's 600), then cut to a window whose sides are drawn
    from ``crop[0]..crop[1]`` each (never beyond the image). The final resize follows either way.

    Args:
        min_sizes: shorter sides to choose from, pixels.
        max_size: limit of the longer side, pixels.
        flip: probability of mirroring.
        crop: smallest and largest side of the window, (384, 600) in the paper; None for no cropping.
        crop_probability: of cropping an image.
    """

    def __init__(
        self,
        min_sizes: Sequence[int],
        max_size: int,
        flip: float = 0.5,
        crop: tuple[int, int] | None = None,
        crop_probability: float = 0.5,
    ) -> None:
        if not min_sizes or min(min_sizes) < 1:
            raise ValueError(f"min_sizes: expected one or more positive sizes, got {list(min_sizes)}")
        if max_size < 1:
            raise ValueError(f"max_size: expected at least 1, got {max_size}")
        if crop is not None and not 1 <= crop[0] <= crop[1]:
            raise ValueError(f"crop: expected (smallest, largest) of at least 1 pixel, got {tuple(crop)}")
        for name, value in (("flip", flip), ("crop_probability", crop_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability, 0..1, got {value}")
        self.min_sizes, self.max_size = tuple(min_sizes), max_size
        self.flip, self.crop, self.crop_probability = flip, crop, crop_probability

    def __call__(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Transform one image.

        Args:
            image: uint8 [3, H, W].
            target: boxes [M, 4] float32, labels [M] int64; other entries are passed on.
            generator: the only source of randomness.

        Returns:
            the image at network size and a new target. Boxes of which a crop leaves nothing are gone.
        """
        boxes, labels = target["boxes"], target["labels"]
        if torch.rand((), generator=generator) < self.flip:
            image, boxes = image.flip(2), flip_boxes(boxes, image.shape[2])
        if self.crop is not None and torch.rand((), generator=generator) < self.crop_probability:
            image, boxes, labels = self._random_crop(image, boxes, labels, generator)
        min_size = self.min_sizes[_randint(0, len(self.min_sizes) - 1, generator)]
        image, boxes = _resize_both(image, boxes, network_size(*image.shape[1:], min_size, self.max_size))
        return image.contiguous(), {**target, "boxes": boxes, "labels": labels}

    def _random_crop(self, image, boxes, labels, generator):
        smallest, largest = self.crop
        shorter = round(largest * (4 + _randint(0, 2, generator)) / 6)
        # The papers set no limit to the longer side here; one keeps a panorama from filling the memory.
        image, boxes = _resize_both(image, boxes, network_size(*image.shape[1:], shorter, 4 * largest))
        sides = [_randint(min(side, smallest), min(side, largest), generator) for side in image.shape[1:]]
        top, left = (_randint(0, side - cut, generator) for side, cut in zip(image.shape[1:], sides, strict=True))
        boxes, keep = crop_boxes(boxes, top, left, *sides)
        return image[:, top : top + sides[0], left : left + sides[1]], boxes[keep], labels[keep]


def _resize_both(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return resize(image, size), resize_boxes(boxes, tuple(image.shape[1:]), size)


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    """An integer of low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
