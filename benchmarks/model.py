"""Time and memory of whole-image inference, split into backbone, FPN and head.

    python -m benchmarks.model [--preset r50_300] [--size 800 1333] [--runs 5] [--json FILE]

The weights are random: no step of the detector depends on their values for its time. The peer of the ratio is
torchvision's Faster R-CNN R50-FPN on the same image in the same run. The gate before the timing: the parts put
together give the same as the model called whole, and the native operators the same as the references.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

from benchmarks.environment import environment, write_json
from benchmarks.harness import using
from benchmarks.measure import in_turn
from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.models.config import PRESETS
from sparse_rcnn.models.proposals import to_pixels

PEER = "torchvision fasterrcnn_resnet50_fpn"


def main() -> int:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="r50_300")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--runs", type=int, default=5, help="timed runs after two to warm up (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, *options.size), dtype=torch.uint8)
    with torch.inference_mode():
        model = SparseRCNN(SparseRCNNConfig.preset(options.preset)).to(memory_format=torch.channels_last).eval()
        model([image])
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of the detector alone
        parts = _sparse_rcnn(model, image)
        rows = _time(parts | {PEER: _peer(image)}, options.runs)
    total = rows["whole"]["median_s"]
    for name, row in rows.items():
        print(f"{name:38s} {row['median_s']:8.3f} s   {row['low_s']:.3f} .. {row['high_s']:.3f}")
    ratio = total / rows[PEER]["median_s"]
    print(f"ratio to torchvision Faster R-CNN      {ratio:8.2f}")
    print(f"peak resident memory                   {memory:8.2f} GiB")
    if options.json:
        report = {"preset": options.preset, "size": list(options.size), "runs": options.runs, "rows": rows}
        report |= {"ratio_to_torchvision_fasterrcnn": ratio, "peak_rss_gib": memory, **environment()}
        write_json(options.json, report)
    return 0


def _sparse_rcnn(model: SparseRCNN, image: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The detector's parts and the whole of it, as calls to be timed; the gate has passed."""
    batch, sizes = model._normalize([image])
    batch = batch.contiguous(memory_format=torch.channels_last)
    boxes = to_pixels(model.init_proposal_boxes.weight, sizes)
    features = model.init_proposal_features.weight.unsqueeze(0)
    body = model.backbone.body(batch)
    if not isinstance(body, dict):
        body = OrderedDict((str(level), feature) for level, feature in enumerate(body))
    maps = list(model.backbone.fpn(body).values())

    head = using("reference", lambda: model.head(maps, boxes, features))
    whole = model([image], return_stages=True)
    for logits, stage_boxes in (model.head(maps, boxes, features), head()):
        torch.testing.assert_close(logits, whole.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stage_boxes, whole.boxes, rtol=1e-4, atol=1e-2)
    return {
        "backbone": lambda: model.backbone.body(batch),
        "FPN": lambda: model.backbone.fpn(body),
        "head": lambda: model.head(maps, boxes, features),
        "head, reference operators": head,
        "whole": lambda: model([image]),
    }


def _peer(image: torch.Tensor) -> Callable[[], object]:
    height, width = image.shape[1:]
    peer = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=min(height, width), max_size=max(height, width)
    ).eval()
    return lambda: peer([image / 255.0])


def _time(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, dict[str, float]]:
    numbered = {name: lambda _, call=call: call() for name, call in calls.items()}
    seconds = in_turn(numbered, torch.device("cpu"), runs, float("inf"))
    return {
        name: {"median_s": statistics.median(values), "low_s": min(values), "high_s": max(values)}
        for name, values in seconds.items()
    }


if __name__ == "__main__":
    sys.exit(main())
