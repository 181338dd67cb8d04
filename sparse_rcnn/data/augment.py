"""A stronger augmentation than the paper's, for data sets of few images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_rcnn.data.transforms import TrainTransform, crop_boxes, flip_boxes, network_size, resize, resize_boxes

_FILL = (124, 116, 104)  # the pixel mean: padding that the network takes for nothing
_ZOOM_OUT = (1.0, 2.0)
_SMALLEST = 16  # pixels of the shorter side, below which nothing is cropped or put together
_MOSAICS = 0.5  # share of the images, where there are any
_CUT = (0.3, 0.7)  # where a mosaic is divided, of its sides
_ZOOM_IN = 2.0
_SEEN = 0.25  # of a box's area, below which a mosaic leaves it out
_THINNEST = 1.0  # pixels of the image as it is stored: torchvision's limit, by which thinner boxes go after a crop


class SmallDataTransform:
    """Zoom-out, crops that keep boxes, flip, multi-scale resize and colour jitter, and if wanted mosaics.

    It is torchvision's recipe for SSD: with probability 0.3 the image is put on a canvas of up to twice its sides
    (objects get smaller); a crop whose IoU with some box is at least 0, 0.1, 0.3, 0.5, 0.7 or 0.9, or none (objects get
    larger; boxes whose centre is cut off go); flip and resize as in :class:`TrainTransform`. At last, since at network
    size it is the cheaper, brightness, contrast, saturation and hue change with probability 0.5 each.

    With ``others`` half of the images become mosaics instead (of YOLOv4, Bochkovskiy et al. 2020, section 3.3), but for
    the colours: the image and three of the others fill the quarters of a canvas that is divided at random, each with a
    window of its own.

    Args:
        min_sizes, max_size, flip: as in :class:`TrainTransform`.
        others: the data set that mosaics take images of; None is no mosaics.
    """

    def __init__(
        self,
        min_sizes: Sequence[int],
        max_size: int,
        flip: float = 0.5,
        others: Dataset | None = None,
    ) -> None:
        from torchvision.transforms import v2

        self.others = others
        self.resize = TrainTransform(min_sizes, max_size, flip)
        # The filter sees a detection target's "labels" beside its boxes and drops both.
        self.shapes = v2.Compose(
            [v2.RandomZoomOut(fill=_FILL, side_range=_ZOOM_OUT, p=0.3), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]
        )
        self.colours = v2.RandomPhotometricDistort(p=0.5)

    def __call__(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Transform one image, see :meth:`TrainTransform.__call__`.

        Raises:
            ImageError: another image, for a mosaic, cannot be decoded.
        """
        size = network_size(*image.shape[1:], max(self.resize.min_sizes), self.resize.max_size)
        if self.others is not None and torch.rand((), generator=generator) < _MOSAICS and min(size) >= _SMALLEST:
            image, target = self._mosaic(image, target, size, generator)
        else:
            image, target = self._single(image, target, generator)
        with _seeded(generator):
            return self.colours(image), target

    def _mosaic(
        self, image: Tensor, target: dict[str, Any], size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """The image and three others in the quarters of a canvas."""
        height, width = size
        canvas = torch.empty(3, height, width, dtype=torch.uint8)
        middle = [round(side * _uniform(*_CUT, generator)) for side in size]
        found = []
        for top, bottom in ((0, middle[0]), (middle[0], height)):
            for left, right in ((0, middle[1]), (middle[1], width)):
                if found:
                    index = int(torch.randint(len(self.others), (), generator=generator))
                    piece, boxes, labels = self._window(*self.others[index], (bottom - top, right - left), generator)
                else:
                    piece, boxes, labels = self._window(image, target, (bottom - top, right - left), generator)
                canvas[:, top:bottom, left:right] = piece
                found.append((boxes + boxes.new_tensor([left, top, left, top]), labels))
        boxes, labels = (torch.cat(each) for each in zip(*found, strict=True))
        return canvas, {**target, "boxes": boxes, "labels": labels}

    def _window(
        self, image: Tensor, target: dict[str, Any], size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A window of the image, resized to ``size``, with what is seen of its boxes, and their labels.

        Its shape is that of ``size``, its sides half to all of the largest such window's.
        """
        boxes, labels = target["boxes"], target["labels"]
        if torch.rand((), generator=generator) < self.resize.flip:
            image, boxes = image.flip(2), flip_boxes(boxes, image.shape[2])
        step = min(have / want for have, want in zip(image.shape[1:], size, strict=True))
        step /= _ZOOM_IN ** _uniform(0, 1, generator)
        sides = [max(1, round(step * want)) for want in size]
        top, left = (
            round((have - cut) * _uniform(0, 1, generator)) for have, cut in zip(image.shape[1:], sides, strict=True)
        )
        seen, keep = crop_boxes(boxes, top, left, *sides)
        keep &= _areas(seen) >= _SEEN * _areas(boxes)
        keep &= (seen[:, 2:] - seen[:, :2] >= _THINNEST).all(dim=1)
        piece = resize(image[:, top : top + sides[0], left : left + sides[1]], size)
        return piece, resize_boxes(seen[keep], tuple(sides), size), labels[keep]

    def _single(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """The image alone, smaller or cropped, mirrored and resized."""
        from torchvision import tv_tensors

        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        with _seeded(generator):
            found = {"image": tv_tensors.Image(image), "boxes": boxes, "labels": target["labels"]}
            # A crop without a box to keep, or of a sliver, would be searched for in vain.
            if len(boxes) and min(image.shape[1:]) >= _SMALLEST:
                found = self.shapes(found)
        boxes = found["boxes"].as_subclass(Tensor)
        target = {**target, "boxes": boxes, "labels": found["labels"]}
        return self.resize(found["image"].as_subclass(Tensor), target, generator)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


@contextlib.contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Let torchvision, which draws from the global generator of the CPU, draw from ``generator``'s next number."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(torch.randint(0, 2**62, (), generator=generator)))
    try:
        yield
    finally:
        torch.set_rng_state(state)
