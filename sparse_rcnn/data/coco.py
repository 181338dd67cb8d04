"""COCO annotations: finding the files of a split, checking them, reading them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from sparse_rcnn.data.dataset import Annotation, Records, some

_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


def find_coco(data: Path, split: str) -> tuple[tuple[Path, Path] | None, list[str]]:
    """Find the annotations and the images of a split.

    Args:
        data: a folder laid out as ``<split>.json`` + ``<split>/``, as Roboflow's ``<split>/_annotations.coco.json``
            with the images beside it, or as COCO's ``annotations/instances_<split>2017.json`` + ``<split>2017/``; or
            a JSON file, whose images are in the folder of the same stem (or of COCO's name), else beside it.
        split: ``train``, ``valid`` (folders may say ``val``) or ``test``.

    Returns:
        (JSON file, image folder) or None, and the places that were tried.
    """
    if data.is_file():
        folders = [data.parent / data.stem]
        if data.stem.startswith("instances_"):
            folders.append(data.parent.parent / data.stem.removeprefix("instances_"))
        return (data, next((folder for folder in folders if folder.is_dir()), data.parent)), []
    tried = []
    for name in _SPLIT_NAMES[split]:
        for json_path, images in (
            (data / f"{name}.json", data / name),
            (data / name / "_annotations.coco.json", data / name),
            (data / "annotations" / f"instances_{name}2017.json", data / f"{name}2017"),
        ):
            if json_path.is_file() and images.is_dir():
                return (json_path, images), tried
            tried.append(str(json_path.relative_to(data)))
    return None, tried


def read_coco(json_path: str | Path, image_dir: str | Path) -> Records:
    """Read a COCO JSON.

    Labels follow the order of the category ids. Images that are not on the disk are left out.

    Raises:
        ValueError: the file is not COCO JSON, an id occurs twice, a category is unknown, or all images are missing.
    """
    return _Reader(Path(json_path), Path(image_dir)).read()


class _Reader:
    def __init__(self, path: Path, image_dir: Path) -> None:
        self.path, self.image_dir = path, image_dir
        self.problems: list[str] = []

    def read(self) -> Records:
        raw = _read_json(self.path)
        images = [self._checked_image(entry) for entry in raw["images"]]
        self._require_unique("image", [image["id"] for image in images])
        used = self._check_annotations(raw["annotations"], raw["categories"])
        categories = self._categories(raw["categories"], used)
        present, missing = self._on_disk(images)
        annotations = self._annotations(raw["annotations"], present, {image["id"] for image in missing})
        left_out = [image["file_name"] for image in missing]
        return Records(self.path, self.image_dir, present, categories, annotations, self.problems, left_out)

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def _checked_image(self, entry: Any) -> dict[str, Any]:
        if not isinstance(entry, dict) or not _is_int(entry.get("id")):
            raise self._error(f"images: expected entries with an integer id, got {_short(entry)}")
        name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
        if not isinstance(name, str) or not name:
            raise self._error(f"image {entry['id']}: expected a file_name, got {_short(name)}")
        if not all(_is_int(side) and _is_number(side) and side > 0 for side in (height, width)):
            raise self._error(
                f"image {entry['id']} ({name}): expected positive integers as height and width, "
                f"got {_short(height)} and {_short(width)}"
            )
        return {"id": entry["id"], "file_name": name, "height": height, "width": width}

    def _require_unique(self, what: str, values: list[Any]) -> None:
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise self._error(f"{what} ids or names that occur more than once: {some(twice)}")

    def _on_disk(self, images: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The images whose files are there, and those whose are not."""
        there = [(self.image_dir / image["file_name"]).is_file() for image in images]
        present = [image for image, here in zip(images, there, strict=True) if here]
        missing = [image for image, here in zip(images, there, strict=True) if not here]
        if missing and not present:
            names = some([image["file_name"] for image in missing])
            raise self._error(f"all {len(images)} image files are missing in {self.image_dir}: {names}")
        self.problems += [f"{image['file_name']}: no such file, left out" for image in missing]
        return present, missing

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

    def _annotations(
        self, entries: list[dict[str, Any]], images: list[dict[str, Any]], missing: set[int]
    ) -> list[Annotation]:
        index_of = {image["id"]: index for index, image in enumerate(images)}
        annotations = []
        for entry in entries:
            index, where = index_of.get(entry["image_id"]), f"annotation {entry['id']}"
            if index is not None:
                box, crowd = entry["bbox"], bool(entry.get("iscrowd", 0))
                annotations.append(Annotation(index, entry["category_id"], box, where, crowd, _area(entry)))
            elif entry["image_id"] not in missing:
                self.problems.append(f"{where}: image_id {entry['image_id']} is not listed, dropped")
        return annotations


def _area(entry: dict[str, Any]) -> float | None:
    """Of the object's mask where the file has one: COCO's small, medium and large go by it."""
    area = entry.get("area")
    return float(area) if _is_number(area) and math.isfinite(area) and area > 0 else None


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
