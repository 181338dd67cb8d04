"""How far the AP of two detectors can be told apart by a data set: a paired bootstrap over its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.engine.evaluator import Numbering
from sparse_rcnn.engine.scoring import coco_metrics

METRICS = ("AP", "AP50")


def difference_intervals(
    dataset: DetectionDataset,
    first: Sequence[dict[str, Any]],
    second: Sequence[dict[str, Any]],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """What 95 % of the differences of two detectors lie in, over data sets drawn from this one's images.

    Each draw has as many images as the data set, drawn with replacement, and both detectors are scored on it (by
    hotcoco where it is installed). From Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        dataset: the images and what is in them.
        first, second: COCO results of each detector on it.
        draws: how many data sets.
        seed: of the draws.

    Returns:
        For AP and AP50 the 2.5th and 97.5th percentile of the first's minus the second's, in -1..1.
    """
    numbering = Numbering(dataset)
    truth = numbering.ground_truth()
    annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    detections = [_rows_by_image(numbering, results) for results in (first, second)]
    differences = []
    for drawn in _draws(len(dataset), draws, seed):
        sample = {**truth, "images": [{"id": number} for number in range(1, len(drawn) + 1)]}
        sample["annotations"] = [
            {**annotation, "image_id": number}
            for number, image in enumerate(drawn, start=1)
            for annotation in annotations[image]
        ]
        for number, annotation in enumerate(sample["annotations"], start=1):
            annotation["id"] = number
        scores = [coco_metrics(sample, _drawn_rows(rows, drawn))[0] for rows in detections]
        differences.append([scores[0][metric] - scores[1][metric] for metric in METRICS])
    low, high = np.percentile(differences, [2.5, 97.5], axis=0)
    return {metric: (float(low[i]), float(high[i])) for i, metric in enumerate(METRICS)}


def _draws(images: int, draws: int, seed: int) -> Iterator[list[int]]:
    """Numbers from 1 of the images of each data set."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield generator.integers(1, images + 1, images).tolist()


def _rows_by_image(numbering: Numbering, results: Sequence[dict[str, Any]]) -> dict[int, np.ndarray]:
    """The results of each image as rows for ``coco_metrics``, by the image's number."""
    category = {identifier: number for number, identifier in enumerate(numbering.dataset.category_ids, start=1)}
    rows: dict[int, list[list[float]]] = {number: [] for number in numbering.image_number.values()}
    for result in results:
        image = numbering.image_number[result["image_id"]]
        rows[image].append([image, *result["bbox"], result["score"], category[result["category_id"]]])
    return {image: np.array(each, dtype=np.float64).reshape(-1, 7) for image, each in rows.items()}


def _drawn_rows(rows: dict[int, np.ndarray], drawn: Sequence[int]) -> np.ndarray:
    """The rows of the images drawn, which get the numbers 1, 2, ... in the order they were drawn in."""
    parts = [rows[image].copy() for image in drawn]
    for number, part in enumerate(parts, start=1):
        part[:, 0] = number
    return np.concatenate(parts)
