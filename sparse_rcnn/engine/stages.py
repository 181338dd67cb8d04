"""What each stage of the head adds: the stage ablation of the paper, on any data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.engine.evaluator import Numbering, match_classes
from sparse_rcnn.engine.scoring import coco_metrics
from sparse_rcnn.engine.views import detect, usual_view

_DUPLICATE_IOU = 0.7


@dataclass
class StageResult:
    """How good the detections would be if a stage were the last one.

    Attributes:
        stage: from 0.
        metrics: the 12 COCO numbers.
        ap_with_nms: AP after class-wise suppression at IoU 0.7; what it gains tells how much the duplicates cost.
        duplicates: of the M best detections of an image with M objects, the part that this suppression removes; over
            all images. Without a threshold it means the same for the low scores of early stages and the high ones of
            late stages.
    """

    stage: int
    metrics: dict[str, float]
    ap_with_nms: float
    duplicates: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def evaluate_stages(
    model: nn.Module,
    dataset: DetectionDataset,
    batch_size: int = 1,
    dtype: str = "float32",
    progress: bool = False,
    scorer: str = "auto",
) -> list[StageResult]:
    """Score the detections of every stage; see :func:`sparse_rcnn.engine.evaluator.evaluate` for the arguments."""
    categories, _ = match_classes(model.config, dataset)
    present = [label for label, category in enumerate(categories) if category is not None]
    numbering, stages = Numbering(dataset), range(model.config.num_stages)
    plain, suppressed = ([[np.zeros((0, 7))] for _ in stages] for _ in range(2))
    removed, objects = np.zeros(len(stages)), 0
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(dataset), desc="stages", leave=False, disable=None if progress else True) as bar:
            for indices, images in _batches(dataset, batch_size):
                objects += sum(len(dataset.targets(index)[0]) for index in indices)
                for stage, of_stage in enumerate(detect(model, images, usual_view(model), dtype, every_stage=True)):
                    for index, found in zip(indices, of_stage, strict=True):
                        image_id, found = dataset.images[index]["id"], found.filter(classes=present)
                        best = found.filter(top_k=len(dataset.targets(index)[0]))
                        removed[stage] += len(best) - len(best.nms(_DUPLICATE_IOU))
                        plain[stage].append(numbering.rows(image_id, found, categories))
                        suppressed[stage].append(numbering.rows(image_id, found.nms(_DUPLICATE_IOU), categories))
                bar.update(len(images))
    finally:
        model.train(was_training)
    truth = numbering.ground_truth()
    return [
        StageResult(
            stage=stage,
            metrics=coco_metrics(truth, np.concatenate(plain[stage]), scorer)[0],
            ap_with_nms=coco_metrics(truth, np.concatenate(suppressed[stage]), scorer)[0]["AP"],
            duplicates=float(removed[stage] / max(objects, 1)),
        )
        for stage in stages
    ]


def _batches(dataset: DetectionDataset, batch_size: int) -> Iterator[tuple[list[int], list[Tensor]]]:
    """(indices, images); an image that cannot be read counts as one without detections."""
    indices, images = [], []
    for index in range(len(dataset)):
        try:
            images.append(dataset[index][0])
        except ImageError:
            continue
        indices.append(index)
        if len(images) == batch_size:
            yield indices, images
            indices, images = [], []
    if images:
        yield indices, images
