"""From image files to a JSON file of detections: images a second, against the forward pass alone and a plain loop.

    python -m benchmarks.pipeline [--weights DIR | --preset NAME] [--images 500] [--size 256 320] [--batch-size 8]
                                  [--workers 1] [--json FILE]

Three ways, round by round: ``forward`` has the pixels in memory and does nothing with what it finds, ``loop`` reads,
detects and writes one image after the other, ``pipeline`` is what ``python -m sparse_rcnn.infer`` does, with workers
that have begun before, as they do there while the model is loaded. The images are scenes of the demo kind, in JPEG.
``--preset`` is a detector of random weights that takes them at their own size.

The gate before the timing: the pipeline finds what the model itself does in each image alone, boxes within 0.02 pixels
(in a half type: what the loop finds, within 2).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.environment import environment, write_json
from benchmarks.measure import quantiles
from benchmarks.model import make_detector
from sparse_rcnn import SparseRCNN
from sparse_rcnn.data.synthetic import make_scene
from sparse_rcnn.data.transforms import network_size
from sparse_rcnn.detections import Detections
from sparse_rcnn.models.config import PRESETS
from sparse_rcnn.results import CocoWriter
from sparse_rcnn.runtime import FILES_PER_WORKER, Predictor, Timings, default_weights, read_image

SCENES = 50  # different ones; the others are copies
SCORE_THRESHOLD = 0.3
CLASS_BIAS = -3.6  # of random weights, by which R50-300 finds some twenty objects an image


def main() -> int:
    """Measure, print, and write JSON if asked to; returns 1 when the gate is red."""
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_scenes(Path(folder), options.images, tuple(options.size))
        report = measure(options, files, Path(folder) / "found.json")
    for name, value in report.items():
        print(f"{name:22s} {value}")
    if options.json:
        write_json(options.json, report | {"environment": environment(torch.device(options.device))})
    return int(not report["passed"])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", help="model directory or checkpoint (default: the bundled demo model)")
    add("--preset", choices=tuple(PRESETS), help="random weights of this size instead")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--images", type=int, default=500, help="files (default %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=(256, 320), help="of the files")
    add("--batch-size", type=int, default=8)
    add("--workers", type=int, default=1, help="processes that read (default %(default)s)")
    add("--rounds", type=int, default=1, help="timed rounds (default %(default)s)")
    add("--json", type=Path, help="write the figures here too")
    return parser


def write_scenes(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """The files, named by their numbers."""
    files = []
    for number in range(count):
        files.append(str(folder / f"{number:05d}.jpg"))
        if number < SCENES:
            Image.fromarray(make_scene(number, size)[0]).save(files[-1], quality=90)
        else:
            Path(files[-1]).write_bytes(Path(files[number % SCENES]).read_bytes())
    return files


def measure(options: argparse.Namespace, files: Sequence[str], target: Path) -> dict[str, Any]:
    """The figures as they stand in the JSON; without times when the gate is red."""
    weights = make_small(options) if options.preset else options.weights or default_weights()
    common = {"device": options.device, "dtype": options.dtype, "score_threshold": SCORE_THRESHOLD}
    single = Predictor(weights, **common)

    def make() -> Predictor:
        """One whose workers wait for its first stream; whatever comes first to a device or a shape is done."""
        predictor = Predictor(single.model, **common, batch_size=options.batch_size, workers=options.workers)
        predictor.predict(files[: FILES_PER_WORKER - 1])  # too few for them
        predictor.timings = Timings()
        return predictor

    many = make()
    report: dict[str, Any] = {
        **{
            "detector": options.preset or Path(weights).name,
            "images": len(files),
            "size": list(options.size),
            "batch_size": options.batch_size,
        },
        **{"workers": options.workers, "dtype": str(many.dtype).removeprefix("torch.")},
    }
    exact = many.dtype == torch.float32
    some = files[: max(SCENES, FILES_PER_WORKER * options.workers)]
    peer = Predictor(single.model, **common, optimize=False) if exact else single
    report["largest_difference"] = difference(many.predict(some), peer.predict(some))
    report["passed"] = report["largest_difference"] <= (0.02 if exact else 2)
    if not report["passed"]:
        return report
    pixels = [read_image(file) for file in files[:SCENES]]
    ways: dict[str, Callable[[Predictor], object]] = {
        "forward": lambda predictor: run_forward(predictor, pixels, len(files), options.batch_size),
        "loop": lambda predictor: write((single.predict(file) for file in files), target),
        "pipeline": lambda predictor: write(predictor.stream(files), target),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    used: list[Predictor] = []
    for turn in range(options.rounds):
        names = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in names:
            predictor = make()
            begin = time.perf_counter()
            ways[name](predictor)
            rates[name].append(len(files) / (time.perf_counter() - begin))
            used += [predictor] * (name == "pipeline")
    for name, values in rates.items():
        report[f"{name}_images_per_s"] = quantiles(values)
    for peer_name in ("forward", "loop"):
        ratios = [ours / theirs for ours, theirs in zip(rates["pipeline"], rates[peer_name], strict=True)]
        report[f"pipeline_to_{peer_name}"] = statistics.median(ratios)
    # Of the pipeline's own time: not disturbed by a machine that slows down between the ways.
    seconds = sum(len(files) / rate for rate in rates["pipeline"])
    report["forward_busy"] = sum(one.timings.preprocess + one.timings.forward for one in used) / seconds
    return report | {"alone": used[-1].throughput()._asdict(), "ms_per_image": used[-1].timings.per_image()}


def make_small(options: argparse.Namespace) -> SparseRCNN:
    """A detector of the preset, for images of the files' size, that finds something in them."""
    detector = make_detector(options.preset).eval()
    torch.nn.init.constant_(detector.head.stages[-1].class_logits.bias, CLASS_BIAS)
    low, high = sorted(options.size)
    detector.config = dataclasses.replace(detector.config, min_size=low, max_size=high)
    return detector


def difference(found: Iterable[Detections], expected: Iterable[Detections]) -> float:
    """Largest distance of two boxes' sides, in pixels; infinite where something else was found.

    A detection that one of them has to itself counts only if its score is not just at the threshold.
    """
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (one.filter(SCORE_THRESHOLD + 0.01) for one in (ours, theirs))
        if sorted(ours.labels) != sorted(theirs.labels):
            return float("inf")
        order, order_ = (np.lexsort((*one.boxes.round().T, one.labels)) for one in (ours, theirs))
        largest = max(largest, float(np.abs(ours.boxes[order] - theirs.boxes[order_]).max(initial=0)))
    return largest


def run_forward(predictor: Predictor, pixels: Sequence[np.ndarray], count: int, batch_size: int) -> None:
    """Detect in so many images that are in memory, two batches under way."""
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]
    config, running = predictor.model.config, deque()
    for start in range(0, count, batch_size):
        batch = [images[number % len(images)] for number in range(start, min(start + batch_size, count))]
        sizes = [network_size(*image.shape[1:], config.min_size, config.max_size) for image in batch]
        running.append(predictor.optimized.submit(batch, sizes))
        if len(running) == 2:
            running.popleft().results()
    while running:
        running.popleft().results()


def write(found: Iterable[Detections], target: Path) -> None:
    """Detections to COCO JSON, as the command does."""
    writer = CocoWriter(target)
    for number, detections in enumerate(found):
        writer.add(detections, detections.source, number)
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
