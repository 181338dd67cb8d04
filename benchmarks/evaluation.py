"""Time of scoring the results of a whole split, by hotcoco and by pycocotools.

    python -m benchmarks.evaluation [--images 5000] [--peer-images 500] [--runs 5] [--json FILE]

The results are synthetic: 80 classes, about 7 objects and 100 detections an image, a third of them near an object. Each
time is from annotations and detections in memory to all metrics. The gate before the timing: both scorers give the same
numbers within 1e-6 on the smaller set, on which pycocotools is timed too (its time grows with the images).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment, write_json
from sparse_rcnn.engine.scoring import coco_metrics

TOLERANCE = 1e-6


def synthetic_results(images: int, classes: int, detections: int, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """Ground truth and detections as :func:`coco_metrics` takes them.

    Objects are of all sizes, one in twenty is a crowd, and scores have two decimals, so that their ties matter.
    """
    rng, annotations, rows = np.random.default_rng(seed), [], []
    for image in range(1, images + 1):
        boxes, labels = _boxes(rng, rng.poisson(7)), rng.integers(1, classes + 1, 100)
        crowd = rng.random(len(boxes)) < 0.05
        for box, label, is_crowd in zip(boxes.tolist(), labels.tolist(), crowd.tolist(), strict=False):
            entry = {"image_id": image, "category_id": label, "bbox": box, "iscrowd": int(is_crowd)}
            annotations.append({"id": len(annotations) + 1, **entry, "area": 0.8 * box[2] * box[3]})
        found, of_class = _boxes(rng, detections), rng.integers(1, classes + 1, detections)
        if len(boxes):
            near = np.flatnonzero(rng.random(detections) < 1 / 3)
            which = rng.integers(len(boxes), size=len(near))
            found[near] = boxes[which] * (1 + 0.08 * rng.standard_normal((len(near), 4)))
            of_class[near] = labels[which]
        scores = rng.random(detections).round(2)
        rows.append(np.column_stack([np.full(detections, image), found, scores, of_class]))
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    truth = {"images": [{"id": i + 1} for i in range(images)], "annotations": annotations, "categories": categories}
    return truth, np.concatenate(rows).astype(np.float64)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.column_stack([rng.uniform(0, 500, (count, 2)), rng.gamma(2, 40, (count, 2)) + 2])


def main() -> int:
    """Measure, print, and write JSON if asked to; returns 1 when the gate is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="of the large set (default 5000)")
    parser.add_argument("--peer-images", type=int, default=500, help="of the set that both score (default 500)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of hotcoco (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    small = synthetic_results(options.peer_images, 80, 100, seed=1)
    peer, (seconds,) = _time(small, "pycocotools", 1)
    fast, times = _time(small, "hotcoco", options.runs)
    difference = max(abs(fast[name] - value) for name, value in peer.items())
    if difference > TOLERANCE:
        print(f"red: hotcoco differs by {difference:g}", file=sys.stderr)
        return 1
    _, large = _time(synthetic_results(options.images, 80, 100), "hotcoco", options.runs)
    report = {
        "images": options.images,
        "hotcoco_s": {"median": statistics.median(large), "low": min(large), "high": max(large)},
        "peer_images": options.peer_images,
        "peer_pycocotools_s": seconds,
        "peer_hotcoco_s": statistics.median(times),
        "times_pycocotools": seconds / statistics.median(times),
        "largest_difference": difference,
    }
    for name, value in report.items():
        print(f"{name:24s} {value}")
    if options.json:
        write_json(options.json, report | environment())
    return 0


def _time(case: tuple[dict[str, Any], np.ndarray], scorer: str, runs: int) -> tuple[dict[str, float], list[float]]:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        metrics, _ = coco_metrics(*case, scorer)
        seconds.append(time.perf_counter() - start)
    return metrics, seconds


if __name__ == "__main__":
    sys.exit(main())
