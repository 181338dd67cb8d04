"""What a run sees of a data set, kept so that a resumed run finds the same, or is told what has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sparse_rcnn.data.dataset import DetectionDataset, some

_DIGITS = 16  # hexadecimal, of an image's digest


def fingerprint(dataset: DetectionDataset) -> dict[str, Any]:
    """Class names and, image by image in their order, the file name and a digest of size, boxes and labels.

    Where the folder is does not matter, and nor do the pixels. The order does, because the images of a step follow
    from it.

    Returns:
        Plain values, equal for equal data: ``class_names`` a tuple, ``names`` joined by NUL, and ``digests``, 16
        characters an image. A data set as large as COCO's has 4 MB.
    """
    names, digests = [], []
    for index, image in enumerate(dataset.images):
        boxes, labels = dataset.targets(index)
        digest = hashlib.sha256(json.dumps([image["height"], image["width"], len(boxes)]).encode())
        digest.update(boxes.astype("<f4").tobytes() + labels.astype("<i8").tobytes())
        names.append(image["file_name"])
        digests.append(digest.hexdigest()[:_DIGITS])
    return {"class_names": tuple(dataset.class_names), "names": "\0".join(names), "digests": "".join(digests)}


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two results of :func:`fingerprint`, in words; nothing where they are equal."""
    found = []
    if then["class_names"] != now["class_names"]:
        found.append(f"classes {some(now['class_names'])} instead of {some(then['class_names'])}")
    before, after = _by_name(then), _by_name(now)
    for what, names in (
        ("gone", [name for name in before if name not in after]),
        ("new", [name for name in after if name not in before]),
        ("of another size or with other boxes", [n for n in after if n in before and before[n] != after[n]]),
    ):
        if names:
            found.append(f"{len(names)} {'image' if len(names) == 1 else 'images'} {what} ({some(names)})")
    if not found and then != now:
        found.append("the same images in another order")
    return found


def _by_name(values: dict[str, Any]) -> dict[str, list[str]]:
    """File name -> the digests of its images; only a faulty data set has several."""
    digests: Sequence[str] = values["digests"]
    result: dict[str, list[str]] = {}
    for number, name in enumerate(values["names"].split("\0") if digests else []):
        result.setdefault(name, []).append(digests[number * _DIGITS : (number + 1) * _DIGITS])
    return {name: sorted(given) for name, given in result.items()}
