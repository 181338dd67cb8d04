"""COCO evaluation of a detector on a data set, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from tqdm import tqdm

from sparse_rcnn.data.coco import CocoDataset
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.runtime import Predictor

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class EvalResult:
    """What :func:`evaluate` found.

    Attributes:
        metrics: the 12 COCO numbers by name (``METRICS``), 0..1, or -1 where there is nothing to find.
        per_class: class name -> ``{"AP": ..., "AP50": ...}``, same range.
        detections: COCO results: ``image_id``, ``category_id``, ``bbox`` xywh in pixels of the file, ``score``.
        failed: one line for each image that could not be read; it counts as an image without detections.
        notes: one line for each thing about the classes that the reader of the numbers should know.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    detections: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Metrics, per-class figures, failures and notes, ready for JSON (without the detections)."""
        return {
            "metrics": self.metrics,
            "per_class": self.per_class,
            "num_detections": len(self.detections),
            "failed": self.failed,
            "notes": self.notes,
        }


def evaluate(
    model: nn.Module, dataset: CocoDataset, batch_size: int = 1, dtype: str = "float32", progress: bool = False
) -> EvalResult:
    """Run ``model`` over ``dataset`` and score the detections with pycocotools (at most 100 an image).

    The model is put in evaluation mode, and back in the mode it came in. Classes are matched by name.

    Args:
        model: a ``SparseRCNN``.
        dataset: a ``CocoDataset``.
        batch_size: images a forward pass. Padding is seen by the network, so that 1 is the exact protocol.
        dtype: ``float32``, or ``bfloat16`` for autocast.
        progress: show a bar.

    Raises:
        ValueError: model and data set have no class in common.
    """
    categories, notes = match_classes(model.config, dataset)
    detections, failed = detect_dataset(model, dataset, categories, batch_size, dtype, progress)
    metrics, per_class = coco_metrics(ground_truth(dataset), detections)
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    per_class = {names[category]: values for category, values in per_class.items()}
    return EvalResult(metrics, per_class, detections, failed, notes)


def match_classes(config: SparseRCNNConfig, dataset: CocoDataset) -> tuple[list[int | None], list[str]]:
    """COCO category id of each label of the model (None: not in the data), and notes on what did not match.

    Raises:
        ValueError: no class in common, or a model without class names and with another number of classes.
    """
    category_of = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    names = config.class_names
    if names is None:
        if config.num_classes != len(category_of):
            raise ValueError(
                f"weights: the model has no class names and {config.num_classes} classes, the data set has "
                f"{len(category_of)}; expected equal numbers"
            )
        note = "the model has no class names: its labels are taken in the order of the data set's category ids"
        return list(dataset.category_ids), [note]
    categories = [category_of.get(name) for name in names]
    absent = [name for name in category_of if name not in names]
    if len(absent) == len(category_of):
        raise ValueError(f"weights: no class of the model ({_some(names)}) is in the data set ({_some(category_of)})")
    notes = [f"classes unknown to the model, nothing of them can be found: {_some(absent)}"] if absent else []
    unused = [name for name in names if name not in category_of]
    if unused:
        notes.append(f"classes that the data set lacks, their detections are dropped: {_some(unused)}")
    return categories, notes


def _some(names: Sequence[str], limit: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def detect_dataset(
    model: nn.Module,
    dataset: CocoDataset,
    categories: Sequence[int | None],
    batch_size: int = 1,
    dtype: str = "float32",
    progress: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Detections of every image as COCO results, and a line for each image that could not be read."""
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    image_ids: deque[int] = deque()  # of the images that are read but not yet through the network

    def readable_images() -> Iterator[Tensor]:
        for index in range(len(dataset)):
            try:
                image, target = dataset[index]
            except ImageError as error:
                failed.append(str(error))
                continue
            image_ids.append(target["image_id"])
            yield image

    was_training = model.training
    present = [label for label, category in enumerate(categories) if category is not None]
    predictor = Predictor(model, next(model.parameters()).device, dtype, batch_size, classes=present)
    # Predictor leaves out the labels without a category, whose number is therefore never used.
    numbers = [-1 if category is None else category for category in categories]
    found = predictor.stream(readable_images())
    try:
        for detections in tqdm(found, "evaluate", len(dataset), leave=False, disable=None if progress else True):
            results += detections.to_coco(image_ids.popleft(), numbers)
    finally:
        model.train(was_training)
    return results, failed


def ground_truth(dataset: CocoDataset) -> dict[str, Any]:
    """The annotation file of ``dataset`` as pycocotools wants it.

    The file itself is used, so that crowds are ignored as the COCO protocol has it. ``area`` and ``iscrowd`` get their
    defaults, boxes without area go, and annotations are numbered from 1: pycocotools takes a match with id 0 for none.
    """
    with open(dataset.coco_json_path, encoding="utf-8") as file:
        raw = json.load(file)
    image_ids = {image["id"] for image in dataset.images}
    category_ids = set(dataset.category_ids)
    annotations = []
    for annotation in raw["annotations"]:
        box = annotation["bbox"]
        if not all(math.isfinite(value) for value in box) or box[2] <= 0 or box[3] <= 0:
            continue
        if annotation["image_id"] not in image_ids or annotation["category_id"] not in category_ids:
            continue
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": box,
                "area": _area(annotation),
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    return {
        "images": [{"id": image["id"]} for image in dataset.images],
        "annotations": annotations,
        "categories": [{"id": category} for category in dataset.category_ids],
    }


def _area(annotation: dict[str, Any]) -> float:
    """Of the object's mask where the file has one (COCO's small, medium and large go by it), else of the box."""
    area = annotation.get("area")
    usable = isinstance(area, int | float) and math.isfinite(area) and area > 0
    return area if usable else annotation["bbox"][2] * annotation["bbox"][3]


def coco_metrics(
    ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """The 12 COCO numbers, and AP and AP50 of each category id.

    Args:
        ground_truth: as :func:`ground_truth` returns it.
        detections: COCO results; may be empty.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        scorer = COCOeval(_index(ground_truth), _index({**ground_truth, "annotations": _areas(detections)}), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = dict(zip(METRICS, (float(value) for value in scorer.stats), strict=True))
    # [IoU thresholds T, recalls R, categories K, area ranges A, detection limits M]; A 0 is all, M -1 is 100.
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    per_class = {
        int(category): {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
        for k, category in enumerate(scorer.params.catIds)
    }
    return metrics, per_class


def _index(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _areas(detections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**detection, "id": number, "iscrowd": 0, "area": detection["bbox"][2] * detection["bbox"][3]}
        for number, detection in enumerate(detections, start=1)
    ]


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0
