"""Detection data sets with COCO annotations: finding them, checking them, reading them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_rcnn.data.decode import ImageError, decode_image

_SHOWN = 5  # names listed in an error about many


def find_split(data: str | Path, split: str) -> tuple[Path, Path]:
    """Find the annotations and the images of a split.

    Args:
        data: a folder laid out as ``<split>.json`` + ``<split>/``, as Roboflow's ``<split>/_annotations.coco.json``
            with the images beside it, or as COCO's ``annotations/instances_<split>2017.json`` + ``<split>2017/``; or
            a JSON file, whose images are in the folder of the same stem (or of COCO's name), else beside it.
        split: ``train`` or ``valid``; folders may say ``val`` for ``valid``.

    Returns:
        (JSON file, image folder).

    Raises:
        ValueError: nothing of the kind is there.
    """
    data = Path(data)
    if split not in ("train", "valid"):
        raise ValueError(f"split: expected train or valid, got {split!r}")
    if data.is_file():
        folders = [data.parent / data.stem]
        if data.stem.startswith("instances_"):
            folders.append(data.parent.parent / data.stem.removeprefix("instances_"))
        return data, next((folder for folder in folders if folder.is_dir()), data.parent)
    if not data.is_dir():
        raise ValueError(f"{data}: no such file or folder")
    tried = []
    for name in ("train",) if split == "train" else ("valid", "val"):
        for json_path, images in (
            (data / f"{name}.json", data / name),
            (data / name / "_annotations.coco.json", data / name),
            (data / "annotations" / f"instances_{name}2017.json", data / f"{name}2017"),
        ):
            if json_path.is_file() and images.is_dir():
                return json_path, images
            tried.append(str(json_path.relative_to(data)))
    raise ValueError(f"{data}: no {split} split found; looked for {', '.join(tried)} and the images that go with them")


class CocoDataset(Dataset):
    """Images and boxes of a COCO JSON, checked when it is opened.

    Item ``i`` is (image uint8 [3, H, W] RGB, target). The target has boxes [M, 4] float32 xyxy in pixels, labels [M]
    int64 from 0, ``image_id`` int and ``size`` (height, width). Crowds (``iscrowd``) are no targets. An image without
    boxes stays in, as background. ``ds[i]`` raises ImageError when the file cannot be decoded.

    What can be mended is, and stands in ``problems``, one line each: boxes that reach outside the image are clipped,
    boxes without area, with numbers that are not finite, or of images that are not listed, are dropped.

    Args:
        json_path: the annotations.
        image_dir: folder of the images; by default as :func:`find_split` finds it for the file.
        class_names: give label ``i`` to the category named ``class_names[i]``. By default, all categories are labelled
            in the order of their ids.

    Attributes:
        class_names: tuple of str, label -> name.
        category_ids: tuple of int, label -> category id of the file.
        images: list of dicts ``id``, ``file_name``, ``height``, ``width``.
        problems: list of str.
        coco_json_path, image_dir: Path.

    Raises:
        ValueError: the file is not COCO JSON, an id occurs twice, a category is unknown, images are missing on the
            disk, or ``class_names`` and the categories do not fit.
    """

    def __init__(
        self, json_path: str | Path, image_dir: str | Path | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self.coco_json_path = Path(json_path)
        raw = _read_json(self.coco_json_path)
        self.image_dir = Path(image_dir) if image_dir is not None else find_split(self.coco_json_path, "train")[1]
        self.problems: list[str] = []
        self.images = [self._checked_image(entry) for entry in raw["images"]]
        self._require_unique("image", [image["id"] for image in self.images])
        self._require_files()
        used = self._check_annotations(raw["annotations"], raw["categories"])
        names = self._categories(raw["categories"], used)
        self.class_names, self.category_ids = self._labels(names, used, class_names)
        self._collect_boxes(raw["annotations"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self.images[index]
        size = record["height"], record["width"]
        target = {
            "boxes": torch.from_numpy(self._boxes[index].copy()),
            "labels": torch.from_numpy(self._labels_of[index].copy()),
            "image_id": record["id"],
            "size": size,
        }
        pixels = self._pixels(self.image_path(index), size)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), target

    def image_path(self, index: int) -> Path:
        """The file of image ``index``."""
        return self.image_dir / self.images[index]["file_name"]

    @staticmethod
    def _pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
        """Pixels [H, W, 3] turned the way they were annotated, which the recorded size tells."""
        pixels = decode_image(path)
        if pixels.shape[:2] == size[::-1] and size[0] != size[1]:
            pixels = decode_image(path, apply_exif=False)
        if pixels.shape[:2] != size:
            height, width = pixels.shape[:2]
            raise ImageError(f"{path}: {width} x {height} pixels, but annotated as {size[1]} x {size[0]}")
        return pixels

    # ------------------------------------------------------------------------------------------------- checking

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.coco_json_path}: {message}")

    def _checked_image(self, entry: Any) -> dict[str, Any]:
        if not isinstance(entry, dict) or not _is_int(entry.get("id")):
            raise self._error(f"images: expected entries with an integer id, got {_short(entry)}")
        name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
        if not isinstance(name, str) or not name:
            raise self._error(f"image {entry['id']}: expected a file_name, got {_short(name)}")
        if not (_is_int(height) and _is_int(width) and height > 0 and width > 0):
            raise self._error(
                f"image {entry['id']} ({name}): expected positive integers as height and width, "
                f"got {_short(height)} and {_short(width)}"
            )
        return {"id": entry["id"], "file_name": name, "height": height, "width": width}

    def _require_unique(self, what: str, values: list[Any]) -> None:
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise self._error(f"{what} ids or names that occur more than once: {_some(twice)}")

    def _require_files(self) -> None:
        missing = [image["file_name"] for i, image in enumerate(self.images) if not self.image_path(i).is_file()]
        if missing:
            raise self._error(
                f"{len(missing)} of {len(self.images)} image files are missing in {self.image_dir}: {_some(missing)}"
            )

    def _check_annotations(self, annotations: list[Any], categories: list[Any]) -> set[int]:
        """Check the structure of all annotations; returns the category ids that occur."""
        for entry in categories:
            if not (isinstance(entry, dict) and _is_int(entry.get("id")) and isinstance(entry.get("name"), str)):
                raise self._error(f"categories: expected entries with an integer id and a name, got {_short(entry)}")
        self._require_unique("category", [entry["id"] for entry in categories])
        known, used = {entry["id"] for entry in categories}, set()
        for entry in annotations:
            if not isinstance(entry, dict) or not _is_int(entry.get("id")):
                raise self._error(f"annotations: expected entries with an integer id, got {_short(entry)}")
            if not _is_int(entry.get("image_id")):
                raise self._error(f"annotation {entry['id']}: expected an integer image_id, got {_short(entry)}")
            category = entry.get("category_id")
            if not _is_int(category) or category not in known:
                raise self._error(f"annotation {entry['id']}: unknown category_id {_short(category)}")
            box = entry.get("bbox")
            if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
                raise self._error(f"annotation {entry['id']}: expected bbox [x, y, w, h], got {_short(box)}")
            if entry.get("iscrowd", 0) not in (0, 1):
                raise self._error(f"annotation {entry['id']}: expected iscrowd 0 or 1, got {_short(entry['iscrowd'])}")
            used.add(category)
        self._require_unique("annotation", [entry["id"] for entry in annotations])
        return used

    def _categories(self, categories: list[dict[str, Any]], used: set[int]) -> dict[str, int]:
        """Category name -> id, in the order of the ids."""
        categories = sorted(categories, key=lambda entry: entry["id"])
        count = Counter(entry["name"] for entry in categories)
        kept = []
        for entry in categories:
            # Roboflow adds an unused category 0 that can bear the name of a real one.
            if count[entry["name"]] > 1 and entry["id"] not in used:
                self.problems.append(f"category {entry['id']} ({entry['name']}): repeats a name and is unused, dropped")
                count[entry["name"]] -= 1
            else:
                kept.append(entry)
        self._require_unique("category", [entry["name"] for entry in kept])
        if not kept:
            raise self._error("categories: expected at least one, got none")
        return {entry["name"]: entry["id"] for entry in kept}

    def _labels(
        self, names: dict[str, int], used: set[int], class_names: Sequence[str] | None
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        if class_names is None:
            return tuple(names), tuple(names.values())
        missing = [name for name in class_names if name not in names]
        if missing:
            raise self._error(f"class_names: no category is named {_some(missing)}; there are {_some(list(names))}")
        surplus = [name for name, category in names.items() if category in used and name not in class_names]
        if surplus:
            raise self._error(f"annotations of categories that are not in class_names: {_some(surplus)}")
        return tuple(class_names), tuple(names[name] for name in class_names)

    # -------------------------------------------------------------------------------------------------- reading

    def _collect_boxes(self, annotations: list[dict[str, Any]]) -> None:
        index_of = {image["id"]: i for i, image in enumerate(self.images)}
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        boxes: list[list[list[float]]] = [[] for _ in self.images]
        labels: list[list[int]] = [[] for _ in self.images]
        for entry in annotations:
            index = index_of.get(entry["image_id"])
            if index is None:
                self.problems.append(f"annotation {entry['id']}: image_id {entry['image_id']} is not listed, dropped")
                continue
            box = self._usable_box(entry, self.images[index])
            if box is not None and not entry.get("iscrowd", 0):
                boxes[index].append(box)
                labels[index].append(label_of[entry["category_id"]])
        self._boxes = [np.array(image_boxes, dtype=np.float32).reshape(-1, 4) for image_boxes in boxes]
        self._labels_of = [np.array(image_labels, dtype=np.int64) for image_labels in labels]

    def _usable_box(self, entry: dict[str, Any], image: dict[str, Any]) -> list[float] | None:
        """The box as xyxy inside the image, or None if nothing is left; both mendings are noted."""
        x, y, width, height = entry["bbox"]
        note = f"annotation {entry['id']} ({image['file_name']}): bbox {entry['bbox']}"
        if not all(math.isfinite(value) for value in entry["bbox"]):
            self.problems.append(f"{note} is not finite, dropped")
            return None
        if width <= 0 or height <= 0:
            self.problems.append(f"{note} has no area, dropped")
            return None
        box = [x, y, x + width, y + height]
        limits = [image["width"], image["height"]] * 2
        clipped = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits, strict=True)]
        size = f"the {image['width']} x {image['height']} image"
        # In float32, as the boxes are kept: a sliver can vanish in the rounding.
        x0, y0, x1, y1 = np.float32(clipped)
        if x1 <= x0 or y1 <= y0:
            self.problems.append(f"{note} has no area inside {size}, dropped")
            return None
        if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > _CLIP_TOLERANCE:
            self.problems.append(f"{note} reaches outside {size}, clipped")
        return clipped


_CLIP_TOLERANCE = 0.01  # pixels; boxes rounded to two decimals end that far outside and are no mistake


def _read_json(path: Path) -> dict[str, list[Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot read the annotations: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and bytes that are not UTF-8
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object with images, annotations and categories, got {_short(raw)}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw.get(key), list):
            raise ValueError(f"{path}: expected a list under {key!r}, got {_short(raw.get(key))}")
    return raw


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_int(value) and abs(value) < 2**53)  # larger integers overflow a float


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _some(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "")
