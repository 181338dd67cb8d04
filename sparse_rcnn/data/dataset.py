"""The data set that training and evaluation read, whatever format its annotations came in."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_rcnn.data.cache import PixelCache
from sparse_rcnn.data.decode import ImageError, decode_image

_SHOWN = 5  # names listed in an error about many
_CLIP_TOLERANCE = 0.01  # pixels; boxes rounded to two decimals end that far outside and are no mistake


class Annotation(NamedTuple):
    """One annotated object, as its file has it.

    Attributes:
        image: index of its image.
        category: category id.
        box: x, y, width, height in pixels, from the image's left upper corner.
        where: what a message calls it, as in ``annotation 7`` or ``labels/a.txt line 3``.
        crowd: not to be trained on, and ignored in evaluation.
        area: of the object's mask, where the file has one; pixels.
    """

    image: int
    category: int
    box: Sequence[float]
    where: str
    crowd: bool = False
    area: float | None = None


@dataclass
class Records:
    """What a reader (``coco``, ``yolo``, ``voc``) found.

    Attributes:
        source: the file or folder that messages name.
        image_dir: what the images' ``file_name`` is relative to.
        images: dicts ``id``, ``file_name``, ``height``, ``width``; no two of an id.
        categories: name -> id, in the order of the labels.
        annotations: those of all images.
        problems: what the reader could mend or had to leave out, one line each.
        left_out: names of the images that are missing or unreadable, and not in ``images``.
        open_classes: the format has no list of classes, so that a class without objects is nowhere mentioned.
    """

    source: Path
    image_dir: Path
    images: list[dict[str, Any]]
    categories: dict[str, int]
    annotations: list[Annotation]
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    open_classes: bool = False


@dataclass
class Boxes:
    """All T boxes of a data set in flat arrays, grouped by image; those of image i are ``offsets[i]:offsets[i + 1]``.

    Forked loader processes share these pages: numbers in arrays have no reference counts to write to.

    Attributes:
        offsets: int64 [I + 1].
        given: float64 [T, 4], x, y, width, height as the file has them; finite, of positive width and height.
        clipped: float32 [T, 4], xyxy inside the image.
        labels: int64 [T].
        area: float64 [T], of the mask where there is one, else of the box.
        crowd: bool [T].
        target: bool [T], whether to train on it: no crowd, and of some area inside the image.
    """

    offsets: np.ndarray
    given: np.ndarray
    clipped: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    target: np.ndarray

    def select(self, images: Sequence[int]) -> Boxes:
        """Those of some of the images, in the order given."""
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        offsets = np.cumsum([0, *map(len, rows)])
        index = np.concatenate([np.zeros(0, np.int64), *rows])
        columns = (self.given, self.clipped, self.labels, self.area, self.crowd, self.target)
        return Boxes(offsets, *(column[index] for column in columns))


class DetectionDataset(Dataset):
    """Images and boxes. :func:`sparse_rcnn.data.formats.open_dataset` makes one from files of any known format.

    Item ``i`` is (image uint8 [3, H, W] RGB, target). The target has boxes [M, 4] float32 xyxy in pixels, labels [M]
    int64 from 0, ``image_id`` int and ``size`` (height, width). Crowds are no targets. An image without boxes stays
    in, as background. ``ds[i]`` raises ImageError when the file cannot be decoded.

    What can be mended is, and stands in ``problems``, one line each: boxes that reach outside the image are clipped,
    boxes without area, or with numbers that are not finite, are dropped.

    Args:
        records: what a reader found.
        class_names: give label ``i`` to the category named ``class_names[i]``. By default, the order of the records.
        cache_mb: megabytes (10^6 bytes) of decoded images to keep in memory, see :class:`PixelCache`.

    Attributes:
        class_names: tuple of str, label -> name.
        category_ids: tuple of int, label -> category id.
        images: list of dicts ``id``, ``file_name``, ``height``, ``width``.
        boxes: :class:`Boxes`.
        problems: list of str.
        left_out: names of images that are listed but missing or unreadable; they are in ``problems`` too.
        source, image_dir: Path.

    Raises:
        ValueError: ``class_names`` and the categories do not fit, or the cache cannot be had.
    """

    def __init__(self, records: Records, class_names: Sequence[str] | None = None, cache_mb: int = 0) -> None:
        self.source, self.image_dir, self.images = records.source, records.image_dir, records.images
        self.problems, self.left_out = list(records.problems), list(records.left_out)
        self.class_names, self.category_ids = self._labels(records, class_names)
        self.boxes = self._collect(records.annotations)
        self._cache = PixelCache([(i["height"], i["width"]) for i in self.images], cache_mb * 10**6)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.images[index]
        pixels = self._cache.get(index)
        if pixels is None:
            pixels = _decode(self.image_path(index), (record["height"], record["width"]))
            self._cache.put(index, pixels)
        boxes, labels = self.targets(index)
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "image_id": record["id"],
            "size": (record["height"], record["width"]),
        }
        # A view: resizing, which comes next, wants the channels last.
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What to find in image ``index``: boxes [M, 4] float32 xyxy and labels [M] int64, copies."""
        rows = slice(self.boxes.offsets[index], self.boxes.offsets[index + 1])
        chosen = self.boxes.target[rows]
        return self.boxes.clipped[rows][chosen], self.boxes.labels[rows][chosen]

    def image_path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.image_dir / self.images[index]["file_name"]

    def without(self, indices: Iterable[int]) -> DetectionDataset:
        """The data set less some images; they are among ``left_out`` there."""
        gone = set(indices)
        if not gone:
            return self
        kept = [index for index in range(len(self)) if index not in gone]
        other = copy.copy(self)
        other.images = [self.images[index] for index in kept]
        other.boxes = self.boxes.select(kept)
        other.left_out = self.left_out + [self.images[index]["file_name"] for index in sorted(gone)]
        other._cache = PixelCache([(i["height"], i["width"]) for i in other.images], self._cache.limit)
        return other

    def _labels(self, records: Records, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names = records.categories
        if class_names is None:
            return tuple(names), tuple(names.values())
        missing = [name for name in class_names if name not in names]
        if missing and not records.open_classes:
            raise ValueError(
                f"{self.source}: class_names: no category is named {some(missing)}; there are {some(list(names))}"
            )
        used = {annotation.category for annotation in records.annotations}
        surplus = [name for name, category in names.items() if category in used and name not in class_names]
        if surplus:
            raise ValueError(f"{self.source}: annotations of categories that are not in class_names: {some(surplus)}")
        unused = iter(set(range(1, len(names) + len(missing) + 1)) - set(names.values()))
        return tuple(class_names), tuple(names[name] if name in names else next(unused) for name in class_names)

    def _collect(self, annotations: list[Annotation]) -> Boxes:
        """All boxes with area, clipped to their images; what is mended or dropped is noted."""
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        given = np.array([a.box for a in annotations], dtype=np.float64).reshape(-1, 4)
        image = np.array([a.image for a in annotations], dtype=np.int64)
        sizes = np.array([[i["width"], i["height"]] for i in self.images], dtype=np.float64).reshape(-1, 2)
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.isfinite(given).all(1)
            real = finite & (given[:, 2:] > 0).all(1)
            corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
            exact = np.clip(corners, 0, np.tile(sizes, 2)[image])
            moved = np.abs(corners - exact).max(1, initial=0) > _CLIP_TOLERANCE
        clipped = exact.astype(np.float32)  # in which a sliver can vanish in the rounding
        inside = real & (clipped[:, 2:] > clipped[:, :2]).all(1)
        for row in np.flatnonzero(~inside | moved):
            size = "the {width} x {height} image".format(**self.images[image[row]])
            area = f"has no area inside {size}, dropped" if real[row] else "has no area, dropped"
            mended = f"reaches outside {size}, clipped" if inside[row] else area
            self._note(annotations[row], mended if finite[row] else "is not finite, dropped")
        kept = np.flatnonzero(real)
        kept = kept[np.argsort(image[kept], kind="stable")]
        chosen = [annotations[row] for row in kept]
        area = np.array([a.area or math.nan for a in chosen], dtype=np.float64)
        crowd = np.array([a.crowd for a in chosen], dtype=bool)
        return Boxes(
            offsets=np.concatenate([[0], np.cumsum(np.bincount(image[kept], minlength=len(self.images)))]),
            given=given[kept],
            clipped=clipped[kept],
            labels=np.array([label_of[a.category] for a in chosen], dtype=np.int64),
            area=np.where(np.isnan(area), given[kept, 2] * given[kept, 3], area),
            crowd=crowd,
            target=inside[kept] & ~crowd,
        )

    def _note(self, annotation: Annotation, what: str) -> None:
        image = self.images[annotation.image]["file_name"]
        self.problems.append(f"{annotation.where} ({image}): bbox {list(annotation.box)} {what}")


def some(values: Sequence[Any], shown: int = _SHOWN) -> str:
    """The first few of many values, for a message."""
    return ", ".join(str(value) for value in values[:shown]) + (", ..." if len(values) > shown else "")


def _decode(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Pixels [H, W, 3] turned the way they were annotated, which the recorded size tells."""
    pixels = decode_image(path)
    if pixels.shape[:2] == size[::-1] and size[0] != size[1]:
        pixels = decode_image(path, apply_exif=False)
    if pixels.shape[:2] != size:
        height, width = pixels.shape[:2]
        raise ImageError(f"{path}: {width} x {height} pixels, but annotated as {size[1]} x {size[0]}")
    return pixels
