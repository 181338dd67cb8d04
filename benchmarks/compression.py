"""What the inexact options of ``SparseRCNN.optimize`` cost in output error and gain in time.

    python -m benchmarks.compression [--device cpu|cuda] [--dtype ...] [--weights PATH | --preset r50_300]
                                     [--size 800 1333] [--ranks 32 64 128] [--runs 10] [--json FILE]

Errors are those of the last stage's scores and boxes on one image of noise, against the same detector without the
option; times are of the head alone and of the two layers alone, in turn. The weights are random without ``--weights``;
those of a trained detector lose less to low rank, whose error is in the singular values that are left out: their share
of the whole stands there too. On a CPU FP8 is imitated, so that its time says nothing; its errors do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, write_json
from benchmarks.measure import in_turn, quantiles
from benchmarks.model import make_detector
from sparse_rcnn import SparseRCNN
from sparse_rcnn.inference import OptimizedSparseRCNN
from sparse_rcnn.models.config import PRESETS
from sparse_rcnn.models.proposals import to_pixels

EXACT = "exact"


def main() -> int:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default bfloat16")
    parser.add_argument("--weights", help="a checkpoint; random weights without")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="r50_300", help="of random weights")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--ranks", type=int, nargs="*", default=(32, 64, 128), help="of out_layer (default 32 64 128)")
    parser.add_argument("--runs", type=int, default=10, help="timed runs (default 10)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    model = SparseRCNN.from_pretrained(options.weights) if options.weights else make_detector(options.preset)
    report = {"weights": options.weights or f"random {options.preset}", "size": list(options.size)}
    report |= {"dtype": options.dtype, "environment": environment(options.device)}
    with torch.inference_mode():
        report["forms"] = measure(model.eval(), options)
    print("\n".join(table(report["forms"])))
    if options.json:
        write_json(options.json, report)
    return 0


def forms(ranks: list[int]) -> dict[str, dict[str, Any]]:
    """The options of ``optimize``, by what they are called."""
    low = {f"rank {rank}": {"out_layer_rank": rank} for rank in ranks}
    both = {f"rank {ranks[-1]}, FP8": {"out_layer_rank": ranks[-1], "fp8": True}} if ranks else {}
    return {EXACT: {}, **low, "FP8": {"fp8": True}, **both}


def measure(model: SparseRCNN, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Errors and times of every form."""
    dtype, generator = getattr(torch, options.dtype), torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, *options.size), dtype=torch.uint8, generator=generator)
    detectors = {
        name: model.optimize(options.device, dtype, **form) for name, form in forms(list(options.ranks)).items()
    }
    outputs = {name: detector([image], return_stages=True) for name, detector in detectors.items()}
    calls = {}
    features = _features(detectors[EXACT], image)
    for name, detector in detectors.items():
        calls |= {f"{part} of {name}": call for part, call in _parts(detector, features, options.size).items()}
    times = in_turn(calls, options.device, options.runs, seconds=60.0)
    kept = _kept(model, options.ranks)
    rows: dict[str, dict[str, Any]] = {}
    for name, found in outputs.items():
        scores, exact = (outputs[which].logits[-1].sigmoid() for which in (name, EXACT))
        boxes = (found.boxes[-1] - outputs[EXACT].boxes[-1]).abs()
        errors = {"score_mean": (scores - exact).abs().mean(), "score_max": (scores - exact).abs().max()}
        errors |= {"box_mean_px": boxes.mean(), "box_max_px": boxes.max()}
        rows[name] = {key: float(value) for key, value in errors.items()}
        rows[name] |= {"seconds": {}, "ratio": {}}
        for part in ("layers", "head"):
            mine, theirs = times[f"{part} of {name}"], times[f"{part} of {EXACT}"]
            rows[name]["seconds"][part] = quantiles(mine)
            ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
            rows[name]["ratio"][part] = quantiles(ratios)["median"]
        if name in kept:
            rows[name]["kept"] = kept[name]
    return rows


def _kept(model: SparseRCNN, ranks: list[int]) -> dict[str, float]:
    """Share of ``out_layer``'s squared singular values that each rank keeps, in the stage that loses most."""
    layers = [part for name, part in model.named_modules() if name.endswith("out_layer")]
    squares = [torch.linalg.svdvals(layer.weight.detach().double()).square() for layer in layers]
    return {f"rank {rank}": min(float(s[:rank].sum() / s.sum()) for s in squares) for rank in ranks}


def _features(detector: OptimizedSparseRCNN, image: torch.Tensor) -> list[torch.Tensor]:
    program, size = detector._program, tuple(image.shape[1:])
    sizes = torch.tensor([[*size, *size]], device=detector.device)
    shape = tuple(-(-side // 32) * 32 for side in size)
    return program.backbone(program.normalize([image.to(detector.device)], sizes, shape))


def _parts(detector: OptimizedSparseRCNN, features: list[torch.Tensor], size: tuple[int, int]) -> dict[str, Any]:
    program = detector._program
    boxes = to_pixels(program.proposal_boxes, torch.tensor([size], device=detector.device).float())
    x, stages, proposals = program.head.first_features, program.head.stages, program.head.proposals
    pooled = stages[-1].pool(features, boxes, proposals[-1].generate(x)).flatten(2)

    def layers(_: int) -> None:
        for own in proposals:
            own.generate(x)
        for stage in stages:
            stage.out_layer(pooled)

    return {"layers": layers, "head": lambda _: program.head(features, boxes)}


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines for people."""
    yield f"{'':15s}{'score error':>22s}{'box error, px':>22s}{'layers':>18s}{'head':>18s}"
    for name, row in rows.items():
        errors = (
            f"{row['score_mean']:10.2e} {row['score_max']:9.2e}   {row['box_mean_px']:9.3f} {row['box_max_px']:9.2f}"
        )
        cells = [f"{1e3 * row['seconds'][part]['median']:9.2f} ms {row['ratio'][part]:.2f}x" for part in row["seconds"]]
        kept = f"   keeps {row['kept']:.1%}" if "kept" in row else ""
        yield f"{name:15s}{errors} {' '.join(cells)}{kept}"


if __name__ == "__main__":
    sys.exit(main())
