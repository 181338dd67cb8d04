"""A stronger augmentation than the paper's, for data sets of few images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.data.transforms import TrainTransform

_FILL = (124, 116, 104)  # the pixel mean: padding that the network takes for nothing
_ZOOM_OUT = (1.0, 2.0)
_SMALLEST = 16  # pixels of the shorter side


class SmallDataTransform:
    """Zoom-out, crops that keep boxes, flip, multi-scale resize and colour jitter: torchvision's recipe for SSD.

    In this order, so that colours change at network size, which is the cheaper: with probability 0.3 the image is put
    on a canvas of up to twice its sides (objects get smaller); a crop whose IoU with some box is at least 0, 0.1, 0.3,
    0.5, 0.7 or 0.9, or none (objects get larger; boxes whose centre is cut off go); flip and resize as in
    :class:`TrainTransform`; brightness, contrast, saturation and hue change with probability 0.5 each.

    Args:
        min_sizes, max_size, flip: as in :class:`TrainTransform`.
    """

    def __init__(self, min_sizes: Sequence[int], max_size: int, flip: float = 0.5) -> None:
        from torchvision.transforms import v2

        self.resize = TrainTransform(min_sizes, max_size, flip)
        # The filter sees a detection target's "labels" beside its boxes and drops both.
        self.shapes = v2.Compose(
            [v2.RandomZoomOut(fill=_FILL, side_range=_ZOOM_OUT, p=0.3), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]
        )
        self.colours = v2.RandomPhotometricDistort(p=0.5)

    def __call__(
        self, image: Tensor, target: dict[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Any]]:
        """Transform one image, see :meth:`TrainTransform.__call__`."""
        from torchvision import tv_tensors

        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        with _seeded(generator):
            found = {"image": tv_tensors.Image(image), "boxes": boxes, "labels": target["labels"]}
            # A crop without a box to keep, or of a sliver, would be searched for in vain.
            if len(boxes) and min(image.shape[1:]) >= _SMALLEST:
                found = self.shapes(found)
            image = found["image"].as_subclass(Tensor)
            boxes = found["boxes"].as_subclass(Tensor)
            image, target = self.resize(image, {**target, "boxes": boxes, "labels": found["labels"]}, generator)
            return self.colours(image), target


@contextlib.contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Let torchvision, which draws from the global generator of the CPU, draw from ``generator``'s next number."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(torch.randint(0, 2**62, (), generator=generator)))
    try:
        yield
    finally:
        torch.set_rng_state(state)
