"""Quality on a data set of one's own: this package's detector against torchvision's Faster R-CNN-FPN.

    python -m benchmarks.quality train-peer --data DIR --val DIR --output PEER --images N --min-sizes N [N ...]
                                            --max-size N --test-size N N [--time-limit MINUTES]
    python -m benchmarks.quality table --ours RUN|FILE --peer PEER --val DIR [--json FILE] [--curve FILE] [--readme]

``train-peer`` trains the peer (see ``faster_rcnn.py``) on N images, an image counted each time; the same command
continues a run that was stopped. Ours is the output folder of ``python -m sparse_rcnn.train``, or a file of weights
with the log of all its runs beside it (``NAME.jsonl``, in which ``images`` counts on from run to run). ``table`` scores
the best model of each on the validation split with pycocotools, says how far that split can tell them apart (see
``bootstrap.py``), and times both in this run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bootstrap import difference_intervals
from benchmarks.environment import ROOT, environment, write_json
from benchmarks.faster_rcnn import PeerTrainer, load_peer, peer_batch_size
from benchmarks.report import made_by, update_readme
from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.engine.charts import as_file, line_chart
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.logging import read_records
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import Predictor
from sparse_rcnn.weights.atomic import atomic_write

FIGURES = "benchmarks/results/quality_cpu.json"
OURS, PEER = "Sparse R-CNN", "Faster R-CNN-FPN"
_WARM_UP, _TIMED_IMAGES = 3, 30
_DRAWS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 3 when a run was stopped before its end."""
    options = build_parser().parse_args(arguments)
    return options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    peer = commands.add_parser("train-peer", help="train torchvision's Faster R-CNN-FPN")
    peer.set_defaults(run=train_peer)
    peer.add_argument("--data", required=True, help="data set to train on")
    peer.add_argument("--val", required=True, help="data set to evaluate on")
    peer.add_argument("--output", required=True, help="folder for checkpoints and the log; a run in it is continued")
    peer.add_argument("--images", type=int, required=True, help="images to train on, an image counted each time")
    peer.add_argument("--batch-size", type=int, default=4)
    peer.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    peer.add_argument("--lr", type=float, default=0.01)
    peer.add_argument("--channels", type=int, default=128, help="of the FPN (default 128)")
    augmentations = ("paper", "small", "mosaic")
    peer.add_argument("--augment", choices=augmentations, default="paper", help="as of sparse_rcnn.train")
    peer.add_argument("--min-sizes", type=int, nargs="+", required=True, help="as of sparse_rcnn.train")
    peer.add_argument("--max-size", type=int, required=True, help="as of sparse_rcnn.train")
    peer.add_argument("--test-size", type=int, nargs=2, required=True, help="shorter and longest side")
    peer.add_argument("--frozen-stages", type=int, default=0, help="of the backbone, as of the configuration")
    peer.add_argument("--group-shapes", action="store_true", help="as of sparse_rcnn.train")
    peer.add_argument("--cache-mb", type=int, default=0, help="as of sparse_rcnn.train")
    peer.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="as of sparse_rcnn.train")
    peer.add_argument("--seed", type=int, default=0)
    peer.add_argument("--time-limit", type=float, help="minutes after which to stop with a checkpoint")
    peer.add_argument("--eval-every", type=int, default=500, help="steps")
    peer.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    peer.add_argument("--log-every", type=int, default=25, help="steps")
    table = commands.add_parser("table", help="compare the two")
    table.set_defaults(run=compare)
    table.add_argument("--ours", required=True, type=Path, help="output folder of sparse_rcnn.train, or weights")
    table.add_argument("--peer", required=True, help="output folder of train-peer")
    table.add_argument("--val", required=True, help="data set to score both on")
    table.add_argument("--json", type=Path, help="write the figures here too")
    table.add_argument("--curve", type=Path, help="write the AP against the images seen here, as SVG")
    table.add_argument("--readme", action="store_true", help="put the table into README.md")
    return parser


def train_peer(options: argparse.Namespace) -> int:
    """Train until all images were seen or the time is over."""
    settings = {name: getattr(options, name) for name in ("images", "batch_size", "lr", "optimizer", "channels")}
    settings |= {name: getattr(options, name) for name in ("augment", "group_shapes", "seed", "frozen_stages", "dtype")}
    settings |= {
        "min_size": options.test_size[0],
        "max_size": options.test_size[1],
        "train_min_sizes": options.min_sizes,
        "train_max_size": options.max_size,
    }
    trainer = PeerTrainer(options.data, options.val, options.output, settings, options.cache_mb)
    done = trainer.run(options.time_limit, options.eval_every, options.checkpoint_every, options.log_every)
    return 0 if done else 3


def compare(options: argparse.Namespace) -> int:
    """Score and time both, and print the table."""
    torch.set_num_threads(2)
    dataset = open_dataset(options.val, "valid")
    ours, our_records = load_ours(options.ours)
    peer = load_peer(options.peer, dataset.class_names)
    peer_records = _with_images(read_records(options.peer), peer_batch_size(options.peer))
    env = environment()  # before the machine is busy
    figures, found = _measure(ours, dataset, our_records)
    peer_figures, peer_found = _measure(peer, dataset, peer_records)
    report = {
        "environment": env,
        "val": {"images": len(dataset), "boxes": int(dataset.boxes.target.sum())},
        "detectors": {
            OURS: figures | {"nms": ours.config.nms, "votes": ours.config.votes},
            PEER: peer_figures | {"nms": peer.detector.roi_heads.nms_thresh, "votes": False},
        },
        "difference": {"draws": _DRAWS, **difference_intervals(dataset, found, peer_found, _DRAWS)},
    }
    table = quality_table(report)
    print(table)
    if options.json:
        write_json(options.json, report)
    if options.curve:
        with atomic_write(options.curve) as temporary:
            temporary.write_text(as_file(curves(report)), encoding="utf-8")
    if options.readme:
        update_readme(ROOT / "README.md", table, "quality")
    return 0


def load_ours(path: Path) -> tuple[SparseRCNN, list[dict[str, Any]]]:
    """The best model of a run of ``sparse_rcnn.train``, or that of a file; and the log, each record with ``images``."""
    if path.is_dir():
        batch_size = load_checkpoint(path / "last.pt")["train_config"]["batch_size"]
        return SparseRCNN.from_pretrained(path / "best"), _with_images(read_records(path), batch_size)
    lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return SparseRCNN.from_pretrained(path), [json.loads(line) for line in lines]


def _with_images(records: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    return [{**record, "images": record["step"] * batch_size} for record in records]


def _measure(
    model: nn.Module, dataset: DetectionDataset, records: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of one detector, and what it found as COCO results."""
    result = evaluate(model, dataset, scorer="pycocotools", progress=True)
    curve = [[record["images"], record["AP"], record["AP50"]] for record in records if record["kind"] == "val"]
    figures = {
        "metrics": result.metrics,
        "per_class": result.per_class,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_images": max((record["images"] for record in records), default=0),
        "images_per_second": _speed(model, dataset),
        "curve": curve,
    }
    return figures, result.detections


def _speed(model: nn.Module, dataset: DetectionDataset) -> float:
    """Images a second, one at a time, from decoded pixels to detections."""
    predictor = Predictor(model)
    images = [dataset[index % len(dataset)][0] for index in range(_WARM_UP + _TIMED_IMAGES)]
    predictor.predict(images[:_WARM_UP])
    start = time.perf_counter()
    predictor.predict(images[_WARM_UP:])
    return _TIMED_IMAGES / (time.perf_counter() - start)


def quality_table(report: Mapping[str, Any]) -> str:
    """The comparison as Markdown: what both find, class by class, and what they cost."""
    detectors = report["detectors"]
    rows = [(name, [f"{each['metrics'][name]:.3f}" for each in detectors.values()]) for name in ("AP", "AP50", "AP75")]
    for size, name in (("APs", "AP of small objects"), ("APm", "of medium ones"), ("APl", "of large ones")):
        rows.append((name, [_ap(each["metrics"][size]) for each in detectors.values()]))
    classes = next(iter(detectors.values()))["per_class"]
    for name in classes:
        cells = [
            f"{_ap(each['per_class'][name]['AP'])} / {_ap(each['per_class'][name]['AP50'])}"
            for each in detectors.values()
        ]
        rows.append((f"{name}: AP / AP50", cells))
    nms = [str(each["nms"] or "none") + (", with votes" if each["votes"] else "") for each in detectors.values()]
    rows.append(("suppression of duplicates at IoU", nms))
    rows.append(("images trained on", [f"{each['trained_images']:,}" for each in detectors.values()]))
    rows.append(("parameters", [f"{each['parameters'] / 1e6:.1f} M" for each in detectors.values()]))
    slowest = min(each["images_per_second"] for each in detectors.values())
    rows.append(("speed of inference", [f"{each['images_per_second'] / slowest:.2f}x" for each in detectors.values()]))
    lines = [f"| | {' | '.join(detectors)} |", "|---|" + "---|" * len(detectors)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    val = report["val"]
    command = f"python -m benchmarks.quality table --ours FILE --peer PEER --val DIR --json {FIGURES} --readme"
    note = made_by(report["environment"], command)
    note[0] = f"{val['images']} validation images with {val['boxes']} boxes, scored by pycocotools. {note[0]}"
    return "\n".join([*lines, "", *_difference(report["difference"]), *note])


def _difference(difference: Mapping[str, Any]) -> list[str]:
    """What the validation split leaves open, in words."""
    (low, high), (low50, high50) = (difference[name] for name in ("AP", "AP50"))
    return [
        f"In 95 % of {difference['draws']:,} draws of the images with replacement, the first's AP less the second's is",
        f"{low:+.3f} to {high:+.3f}, that of AP50 {low50:+.3f} to {high50:+.3f}.",
    ]


def _ap(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "–"


def curves(report: Mapping[str, Any]) -> str:
    """AP and AP50 of both against the images they were trained on, as an SVG element."""
    lines = {
        f"{name}, {metric}": [(point[0], point[column]) for point in each["curve"]]
        for name, each in report["detectors"].items()
        for column, metric in ((1, "AP"), (2, "AP50"))
    }
    return line_chart("Validation AP", lines, x_label="images trained on")


if __name__ == "__main__":
    sys.exit(main())
