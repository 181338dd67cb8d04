"""YOLO data sets: a YAML file that says where the images are, and a text file of normalised boxes for each image."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_rcnn.data.dataset import Annotation, Records, some
from sparse_rcnn.data.decode import ImageError, image_size
from sparse_rcnn.sources import IMAGE_SUFFIXES

_KEYS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}


def find_yolo(data: Path) -> Path | None:
    """The YAML file of a folder: ``data.yaml``, ``dataset.yaml`` (or ``.yml``), or the only one with class names."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (data / name).is_file():
            return data / name
    others = [path for path in data.iterdir() if path.suffix.lower() in (".yaml", ".yml") and _names_classes(path)]
    return others[0] if len(others) == 1 else None


def _names_classes(path: Path) -> bool:
    try:
        return not {"names", "nc"}.isdisjoint(_read_yaml(path))
    except ValueError:
        return False


def read_yolo(yaml_path: str | Path, split: str) -> Records:
    """Read a split of a YOLO data set, by the rules of Ultralytics.

    ``names`` is a list or a dict from 0 on, or ``nc`` the number of classes. ``path`` is the root, by default the
    YAML file's folder; a relative one is looked for in the working directory, then beside the file. ``train`` and
    ``val`` are relative to the root (a leading ``../`` that leads nowhere is ignored, for Roboflow's exports): a
    folder, searched to any depth, a text file with an image a line (``./`` is its own folder), or a list of these.
    The labels of ``.../images/a/b.jpg`` are in ``.../labels/a/b.txt``, or beside an image that is in no ``images``; an
    image without such a file is background. A line is ``class x y w h`` or ``class x1 y1 x2 y2 x3 y3 ...``, all in
    parts of the upright image's size; a polygon becomes the box around it, and its area stays that of the box.

    Images come in the order of their paths and are numbered from 1; so are the categories in the order of their
    labels, as in COCO files.

    Args:
        yaml_path: the YAML file.
        split: ``train``, ``valid`` or ``test``.

    Raises:
        ValueError: the YAML file or a label cannot be understood, or there are no images.
    """
    yaml_path = Path(yaml_path)
    config = _read_yaml(yaml_path)
    names = _class_names(yaml_path, config)
    root, sources = _sources(yaml_path, config, split)
    paths = sorted({path for source in sources for path in _images(yaml_path, source)})
    records = Records(yaml_path, root, [], {name: label + 1 for label, name in enumerate(names)}, [])
    bad: list[str] = []
    for path in paths:
        _read_image(path, len(names), records, bad)
    if bad:
        raise ValueError(f"{yaml_path}: {len(bad)} lines of labels cannot be read: {some(bad)}")
    if not records.images:
        lost = f"; these are missing or unreadable: {some(records.left_out)}" if records.left_out else ""
        raise ValueError(f"{yaml_path}: {split}: no images in {some(list(map(str, sources)))}{lost}")
    _note_orphans(paths, records)
    return records


# ---------------------------------------------------------------------------------------------------- the YAML file


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are not UTF-8
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected train, val and names, got {config!r:.80}")
    return config


def _class_names(path: Path, config: dict[str, Any]) -> list[str]:
    names, count = config.get("names"), config.get("nc")
    if isinstance(names, dict):
        by_label = {str(label): name for label, name in names.items()}  # keys may be quoted
        if by_label.keys() != set(map(str, range(len(names)))):
            raise ValueError(f"{path}: names: expected the keys 0 to {len(names) - 1}, got {some(list(names))}")
        names = [by_label[str(label)] for label in range(len(names))]
    if names is None and isinstance(count, int):
        names = [f"class_{label}" for label in range(count)]
    if not isinstance(names, list) or not names or any(isinstance(name, list | dict) for name in names):
        raise ValueError(f"{path}: names: expected a list of class names, or a dict from 0 on, got {names!r:.80}")
    names = [str(name) for name in names]
    if count is not None and count != len(names):
        raise ValueError(f"{path}: nc is {count!r}, but there are {len(names)} names")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: names that occur more than once: {some(twice)}")
    return names


def _sources(path: Path, config: dict[str, Any], split: str) -> tuple[Path, list[Path]]:
    """The root, and the folders and lists of a split, which are there."""
    key = next((key for key in _KEYS[split] if config.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{path}: no {' or '.join(_KEYS[split])}; there are {some(list(config))}")
    entries = config[key] if isinstance(config[key], list) else [config[key]]
    given = config.get("path")
    if not all(isinstance(entry, str) for entry in entries) or not isinstance(given, str | None):
        raise ValueError(f"{path}: {key}: expected a path or a list of paths, got {config[key]!r:.80}")
    # A root written on another machine is not here; the files are then where the YAML file is.
    roots = [Path(given), path.parent / given] if given else []
    root = next((root for root in roots if root.is_dir()), path.parent)
    found = []
    for entry in entries:
        places = [root / entry] + ([root / entry[3:]] if entry.startswith("../") else [])
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise ValueError(f"{path}: {key}: no such file or folder: {', '.join(map(str, places))}")
        found.append(place)
    return root, found


# --------------------------------------------------------------------------------------------------- images, labels


def _images(yaml_path: Path, source: Path) -> Iterator[Path]:
    if source.is_dir():
        found = map(Path, glob.iglob(os.path.join(glob.escape(str(source)), "**"), recursive=True))  # follows links
        yield from (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
        return
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{yaml_path}: {source}: cannot read the list of images: {error}") from None
    for line in map(str.strip, lines):
        if line:
            beside = source.parent / line
            yield beside if line.startswith("./") or beside.exists() else Path(line)


def label_path(image: Path) -> Path:
    """The label file of an image: the last ``images`` of its path is ``labels`` there."""
    parts = list(image.parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_image(path: Path, num_classes: int, records: Records, bad: list[str]) -> None:
    """Append an image and its boxes to the records; lines that cannot be read go to ``bad``."""
    name = str(path.relative_to(records.image_dir) if path.is_relative_to(records.image_dir) else path.absolute())
    try:
        height, width = image_size(path)
    except ImageError as error:
        records.left_out.append(name)
        records.problems.append(f"{name}: {str(error).removeprefix(f'{path}: ')}, left out")
        return
    index = len(records.images)
    records.images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
    labels = label_path(path)
    try:
        text = labels.read_text(encoding="utf-8") if labels.is_file() else ""
    except (OSError, ValueError) as error:
        bad.append(f"{labels}: {error}")
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{labels.name} line {number}"
        try:
            label, (x0, y0, x1, y1) = _parse(line, num_classes)
        except ValueError as error:
            bad.append(f"{labels} line {number}: {error}")
            continue
        box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
        records.annotations.append(Annotation(index, label + 1, box, where))


def _parse(line: str, num_classes: int) -> tuple[int, tuple[float, float, float, float]]:
    """Label and normalised xyxy box of a line."""
    fields = line.split()
    try:
        label, *numbers = map(float, fields)
    except ValueError:
        raise ValueError(f"expected numbers, got {line!r:.60}") from None
    if not (math.isfinite(label) and label == int(label) and 0 <= label < num_classes):
        raise ValueError(f"expected a class within 0..{num_classes - 1}, got {fields[0]}")
    if len(numbers) == 4:
        x, y, width, height = numbers
        return int(label), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        xs, ys = numbers[0::2], numbers[1::2]
        return int(label), (min(xs), min(ys), max(xs), max(ys))
    raise ValueError(f"expected class x y w h, or a class and at least three points, got {len(fields)} numbers")


def _note_orphans(images: list[Path], records: Records) -> None:
    """Label files that no image goes with are a mistake of whoever moved one of the two."""
    expected = {label_path(image) for image in images}
    for folder in sorted({path.parent for path in expected if path.parent.name != "images"}):
        # Beside the images there are other texts, such as READMEs; in a folder of their own there are not.
        if folder.is_dir() and not any(image.parent == folder for image in images):
            orphans = sorted(path for path in folder.glob("*.txt") if path not in expected and path.stem != "classes")
            records.problems += [f"{orphan}: labels without an image" for orphan in orphans]
