"""COCO evaluation of a detector on a data set."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.detections import Detections
from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.scoring import coco_metrics, pick_scorer
from sparse_rcnn.engine.shard import Shard
from sparse_rcnn.engine.views import detect_augmented
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.runtime import Predictor


@dataclass
class EvalResult:
    """What :func:`evaluate` found.

    Attributes:
        metrics: the 12 COCO numbers by name (``METRICS``), 0..1, or -1 where there is nothing to find.
        per_class: class name -> ``AP``, ``AP50``, ``APs``, ``APm``, ``APl``, ``AR100``, same range.
        detections: COCO results: ``image_id``, ``category_id``, ``bbox`` xywh in pixels of the file, ``score``.
        failed: one line for each image that could not be read; it counts as an image without detections.
        notes: one line for each thing about the classes that the reader of the numbers should know.
        scorer: ``pycocotools`` or ``hotcoco``.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    detections: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scorer: str = "pycocotools"

    def to_dict(self) -> dict[str, Any]:
        """Metrics, per-class figures, failures and notes, ready for JSON (without the detections)."""
        return {
            "metrics": self.metrics,
            "per_class": self.per_class,
            "num_detections": len(self.detections),
            "failed": self.failed,
            "notes": self.notes,
            "scorer": self.scorer,
        }


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    batch_size: int = 1,
    dtype: str = "float32",
    progress: bool = False,
    scorer: str = "auto",
    tta: bool = False,
    nms: float | None = None,
) -> EvalResult:
    """Run ``model`` over ``dataset`` and score the detections as COCO does (at most 100 an image).

    The model is put in evaluation mode, and back in the mode it came in. Classes are matched by name. Of several
    processes each goes through a part of the data; all return the same, but the detections, which the first one has.

    Args:
        model: a ``SparseRCNN``.
        dataset: what to detect in.
        batch_size: images a forward pass. Padding is seen by the network, so that 1 is the exact protocol.
        dtype: ``float32``, or ``bfloat16`` for autocast.
        progress: show a bar.
        scorer: see :func:`coco_metrics`.
        tta: see every image at three sizes, plain and mirrored, see :func:`detect_augmented`; one at a time.
        nms: as of :class:`Predictor`; without meaning for ``tta``, which suppresses anyway.

    Raises:
        ValueError: model and data set have no class in common, or ``nms`` is out of range.
    """
    scorer = pick_scorer(scorer)
    categories, notes = match_classes(model.config, dataset)
    numbering = Numbering(dataset)
    rows, failed = detect_dataset(model, dataset, categories, batch_size, dtype, progress, tta, nms)
    metrics, per_class = distributed.from_main(lambda: coco_metrics(numbering.ground_truth(), rows, scorer))
    per_class = {dataset.class_names[number - 1]: values for number, values in per_class.items()}
    detections = numbering.to_coco(rows) if distributed.is_main() else []
    return EvalResult(metrics, per_class, detections, failed, notes, scorer)


class Numbering:
    """Small numbers from 1 for the images and categories of a data set, whose ids may be any integers.

    Images are numbered in the order of their ids, in which the scorers go through them.
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset
        self.order = sorted(range(len(dataset)), key=lambda index: dataset.images[index]["id"])
        self.image_number = {dataset.images[index]["id"]: number for number, index in enumerate(self.order, start=1)}

    def rows(self, image_id: int, found: Detections, categories: Sequence[int | None]) -> np.ndarray:
        """The detections of one image as :func:`coco_metrics` takes them, those of classes in the data set."""
        number_of = {category: number for number, category in enumerate(self.dataset.category_ids, start=1)}
        numbers = np.array([number_of.get(category, 0) for category in categories], dtype=np.float64)[found.labels]
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        images = np.full(len(found), self.image_number[image_id], dtype=np.float64)
        return np.column_stack([images, boxes, found.scores.astype(np.float64), numbers])[numbers > 0]

    def to_coco(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Rows as COCO results with the ids of the data set."""
        return [
            {
                "image_id": self.dataset.images[self.order[int(image) - 1]]["id"],
                "category_id": self.dataset.category_ids[int(category) - 1],
                "bbox": box,
                "score": score,
            }
            for image, *box, score, category in rows.tolist()
        ]

    def ground_truth(self) -> dict[str, Any]:
        """The annotations: boxes as their file has them, not clipped; crowds are there, to be ignored."""
        boxes, annotations = self.dataset.boxes, []
        for number, index in enumerate(self.order, start=1):
            for row in range(boxes.offsets[index], boxes.offsets[index + 1]):
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # pycocotools takes a match with id 0 for none
                        "image_id": number,
                        "category_id": int(boxes.labels[row]) + 1,
                        "bbox": boxes.given[row].tolist(),
                        "area": float(boxes.area[row]),
                        "iscrowd": int(boxes.crowd[row]),
                    }
                )
        return {
            "images": [{"id": number} for number in range(1, len(self.order) + 1)],
            "annotations": annotations,
            "categories": [{"id": n, "name": name} for n, name in enumerate(self.dataset.class_names, start=1)],
        }


def match_classes(config: SparseRCNNConfig, dataset: DetectionDataset) -> tuple[list[int | None], list[str]]:
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
    dataset: DetectionDataset,
    categories: Sequence[int | None],
    batch_size: int = 1,
    dtype: str = "float32",
    progress: bool = False,
    tta: bool = False,
    nms: float | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Detections of every image as :func:`coco_metrics` takes them, and a line for each that could not be read.

    Of several processes each detects in its :class:`Shard`, and all return the same.
    """
    numbering, shard = Numbering(dataset), Shard(dataset, batch_size)
    rows: dict[int, np.ndarray] = {}
    waiting: deque[int] = deque()  # indices of the images that are read but not yet through the network

    def readable_images() -> Iterator[Tensor]:
        for index, image in shard.images():
            waiting.append(index)
            yield image

    was_training = model.training
    present = [label for label, category in enumerate(categories) if category is not None]
    predictor = Predictor(model, next(model.parameters()).device, dtype, batch_size, classes=present, nms=nms)
    found = predictor.stream(readable_images())
    if tta:
        found = (detect_augmented(model, image, dtype).filter(classes=present) for image in readable_images())
    try:
        for detections in shard.bar(found, "evaluate", progress):
            index = waiting.popleft()
            rows[index] = numbering.rows(dataset.images[index]["id"], detections, categories)
    finally:
        model.train(was_training)
    return np.concatenate([np.zeros((0, 7)), *shard.gather(rows)]), shard.gather(shard.failed)
