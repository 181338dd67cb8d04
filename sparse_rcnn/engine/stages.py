"""What each stage of the head adds: the stage ablation of the paper, on any data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.detections import Detections
from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.evaluator import Numbering, match_classes
from sparse_rcnn.engine.scoring import coco_metrics
from sparse_rcnn.engine.shard import Shard
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
    numbering, shard = Numbering(dataset), Shard(dataset, batch_size)

    def detected() -> Iterator[tuple[int, list[Detections]]]:
        for indices, images in shard.batches():
            stages = detect(model, images, usual_view(model), dtype, every_stage=True)
            yield from zip(indices, map(list, zip(*stages, strict=True)), strict=True)

    found: dict[int, list[_StageOfImage]] = {}
    was_training = model.training
    model.eval()
    try:
        for index, stages in shard.bar(detected(), "stages", progress):
            objects = len(dataset.targets(index)[0])
            image_id = dataset.images[index]["id"]
            found[index] = [
                _StageOfImage.of(numbering, image_id, detections.filter(classes=present), categories, objects)
                for detections in stages
            ]
    finally:
        model.train(was_training)
    images, truth = shard.gather(found), numbering.ground_truth()
    return distributed.from_main(
        lambda: [
            _score(stage, [of_stages[stage] for of_stages in images], truth, scorer)
            for stage in range(model.config.num_stages)
        ]
    )


class _StageOfImage(NamedTuple):
    """What a stage found in an image: rows for :func:`coco_metrics`, also after the suppression, and its duplicates."""

    plain: np.ndarray
    suppressed: np.ndarray
    removed: int
    objects: int

    @classmethod
    def of(
        cls,
        numbering: Numbering,
        image_id: int,
        found: Detections,
        categories: Sequence[int | None],
        objects: int,
    ) -> _StageOfImage:
        best, rest = found.filter(top_k=objects), found.nms(_DUPLICATE_IOU)
        rows = (numbering.rows(image_id, some, categories) for some in (found, rest))
        return cls(*rows, len(best) - len(best.nms(_DUPLICATE_IOU)), objects)


def _score(stage: int, images: Sequence[_StageOfImage], truth: dict[str, Any], scorer: str) -> StageResult:
    nothing = np.zeros((0, 7))
    plain = np.concatenate([nothing, *(image.plain for image in images)])
    suppressed = np.concatenate([nothing, *(image.suppressed for image in images)])
    return StageResult(
        stage=stage,
        metrics=coco_metrics(truth, plain, scorer)[0],
        ap_with_nms=coco_metrics(truth, suppressed, scorer)[0]["AP"],
        duplicates=sum(image.removed for image in images) / max(sum(image.objects for image in images), 1),
    )
