"""The COCO metrics: pycocotools is the authority, hotcoco the fast path with the same numbers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from typing import Any

import numpy as np

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SCORERS = ("auto", "pycocotools", "hotcoco")


def coco_metrics(
    ground_truth: dict[str, Any], detections: np.ndarray, scorer: str = "auto"
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """The 12 COCO numbers, and some of them for each class.

    Args:
        ground_truth: COCO ``images``, ``annotations`` (with ``area`` and ``iscrowd``, numbered from 1) and
            ``categories`` (with names).
        detections: float64 [D, 7], rows of image id, x, y, width, height, score, category id; D may be 0.
        scorer: ``pycocotools``, ``hotcoco``, or ``auto``: hotcoco where it is installed.

    Returns:
        ``METRICS`` by name, and for each category id ``AP``, ``AP50``, ``APs``, ``APm``, ``APl`` and ``AR100``; each
        0..1, or -1 where there is nothing to find.

    Raises:
        ValueError: the scorer is unknown or not installed.
    """
    score = {"pycocotools": _pycocotools, "hotcoco": _hotcoco}[pick_scorer(scorer)]
    with contextlib.redirect_stdout(io.StringIO()):  # both print their progress
        stats, precision, recall, categories = score(ground_truth, detections)
    metrics = dict(zip(METRICS, (float(value) for value in stats), strict=True))
    # [IoU thresholds T, recalls R, categories K, area ranges A, detection limits M]; A 0 is all, M -1 is 100.
    per_class = {}
    for k, category in enumerate(categories):
        of_class, found = precision[:, :, k, :, -1], recall[:, k, 0, -1]
        values = {"AP": _mean(of_class[:, :, 0]), "AP50": _mean(of_class[0, :, 0])}
        values |= {f"AP{size}": _mean(of_class[:, :, a]) for a, size in enumerate("sml", start=1)}
        per_class[int(category)] = {**values, "AR100": _mean(found)}
    return metrics, per_class


def pick_scorer(scorer: str) -> str:
    """``pycocotools`` or ``hotcoco``; see :func:`coco_metrics`."""
    if scorer not in SCORERS:
        raise ValueError(f"scorer: expected one of {', '.join(SCORERS)}, got {scorer!r}")
    installed = importlib.util.find_spec("hotcoco") is not None
    if scorer == "hotcoco" and not installed:
        raise ValueError("scorer: hotcoco is not installed (pip install hotcoco)")
    return ("hotcoco" if installed else "pycocotools") if scorer == "auto" else scorer


def _pycocotools(ground_truth: dict[str, Any], detections: np.ndarray) -> tuple:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(annotations: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {**ground_truth, "annotations": annotations}
        coco.createIndex()
        return coco

    found = [
        {
            **{"id": number, "image_id": int(image_id), "category_id": int(category_id)},
            **{"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0, "score": score},
        }
        for number, (image_id, x, y, width, height, score, category_id) in enumerate(detections.tolist(), start=1)
    ]
    evaluation = COCOeval(index(ground_truth["annotations"]), index(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = evaluation.eval
    return evaluation.stats, values["precision"], values["recall"], evaluation.params.catIds


def _hotcoco(ground_truth: dict[str, Any], detections: np.ndarray) -> tuple:
    import hotcoco

    truth = hotcoco.COCO(ground_truth)
    evaluation = hotcoco.COCOeval(truth, truth.load_res(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = evaluation.eval
    return evaluation.stats, values["precision"], values["recall"], evaluation.params.cat_ids


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
