"""Which format a data set has, told from its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_rcnn.data.coco import find_coco, read_coco
from sparse_rcnn.data.dataset import DetectionDataset, Records
from sparse_rcnn.data.voc import find_voc, read_voc
from sparse_rcnn.data.yolo import find_yolo, read_yolo

SPLITS = ("train", "valid", "test")


def open_dataset(
    data: str | Path, split: str, class_names: Sequence[str] | None = None, cache_mb: int = 0
) -> DetectionDataset:
    """Open a split of a data set in COCO, YOLO or Pascal VOC format.

    Args:
        data: a COCO JSON file, a YOLO YAML file, or a folder in one of the layouts that :func:`find_coco`,
            :func:`find_yolo` and :func:`find_voc` know, tried in this order. A single file, or a VOC folder that is
            not divided into splits, serves as any split.
        split: one of ``SPLITS``.
        class_names, cache_mb: see :class:`DetectionDataset`.

    Raises:
        ValueError: nothing of the kind is there, or it cannot be used.
    """
    return DetectionDataset(_read(Path(data), split), class_names, cache_mb)


def _read(data: Path, split: str) -> Records:
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if data.is_file():
        if data.suffix.lower() in (".yaml", ".yml"):
            return read_yolo(data, split)
        return read_coco(*find_coco(data, split)[0])
    if not data.is_dir():
        raise ValueError(f"{data}: no such file or folder")
    coco, tried = find_coco(data, split)
    if coco is not None:
        return read_coco(*coco)
    yolo = find_yolo(data)
    if yolo is not None:
        return read_yolo(yolo, split)
    voc, tried_voc = find_voc(data, split)
    if voc is not None:
        return read_voc(voc)
    raise ValueError(
        f"{data}: no {split} split found; looked for COCO ({', '.join(tried)}, and the images that go with them), "
        f"YOLO (data.yaml) and Pascal VOC ({', '.join(tried_voc)})"
    )
