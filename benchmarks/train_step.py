"""The training step: its time, its parts and its memory, against the references of all operators.

    python -m benchmarks.train_step [--preset r50_300] [--size 800 1333] [--batch-size 1] [--device cpu|cuda]
        [--runs 3] [--only TEXT ...] [--compile] [--json FILE]

Every implementation is a process of its own, for its memory; it and the reference take turns, and ratios are those of
one round. The weights are random. ``torch.compile`` of the reference is measured on a GPU, and on a CPU with
``--compile``; the CUDA graph on a GPU. There the parts are of a step that waits after each of them, the whole is not;
a compiled or captured step has no parts.

The gate before the timing compares the gradients of the first step, as vectors. In float64 the kernels' equal the
reference's to 1e-9. In the other types the measure is how far from float64 they are: in bfloat16 no more than twice as
far as the reference's under autocast; in float32 no more than twice as far as those of the operators' references among
the same convolutions and linear layers. There nearly all of the difference, some 1e-3 of random weights, comes of the
few ReLUs that another rounding flips, most of them by oneDNN's products and the folded BatchNorm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_step_worker as worker
from benchmarks.environment import environment, write_json
from benchmarks.measure import quantiles
from benchmarks.measured_process import MeasuredProcess, start
from benchmarks.model import make_detector
from sparse_rcnn.models.config import PRESETS

AUTOCAST, KEPT = "reference, bfloat16", "reference, memory kept, float32"
UNTIMED = (worker.REFERENCE, worker.EXACT, worker.NATIVE_EXACT, worker.OWN_LAYERS)
EXACT_LIMIT = 1e-9  # of a gradient in float64, as a share of its length


def main() -> int:
    """Measure, print a table, and write JSON if asked to; returns 1 when a gate is red."""
    options = build_parser().parse_args()
    report = measure(options)
    print("\n".join(terminal_table(report)))
    if options.json:
        write_json(options.json, report)
    if not report["passed"]:
        print("a gate is red, see above", file=sys.stderr)
    return int(not report["passed"])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="r50_300")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="timed rounds after two steps to warm up (default 3)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="implementations with this in the name")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference on a CPU too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser


def names(device: str, compiled: bool, only: list[str]) -> list[str]:
    """The implementations to measure beside the reference; that under autocast, which the gate needs, first."""
    possible = [
        name
        for name, how in worker.IMPLEMENTATIONS.items()
        if (device == "cuda" or not how.graphed) and (device == "cuda" or compiled or not how.compiled)
        if device == "cpu" or name != KEPT
    ]
    chosen = [name for name in possible if any(text in name for text in only) and name not in UNTIMED]
    needs_autocast = any(worker.IMPLEMENTATIONS[name].bfloat16 for name in chosen)
    return [AUTOCAST] * (needs_autocast and AUTOCAST not in chosen) + chosen


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report, as it stands in the JSON; an implementation with a red gate has no times."""
    report: dict[str, Any] = {
        **{"preset": options.preset, "size": list(options.size), "batch_size": options.batch_size},
        **{"runs": options.runs, "environment": environment(torch.device(options.device))},
        **{"gate": {}, "implementations": {}},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        make_detector(options.preset).save_pretrained(folder)
        arguments = [folder, options.device, options.batch_size, *options.size]
        gradients = {}
        for name in (worker.EXACT, worker.NATIVE_EXACT, worker.OWN_LAYERS):
            with start(worker.__name__, name, *arguments) as other:
                gradients[name] = other.gate()
        exact = gradients[worker.EXACT]
        report["gate"] = {
            worker.NATIVE_EXACT: _gate(gradients[worker.NATIVE_EXACT], exact, EXACT_LIMIT),
            worker.OWN_LAYERS: (own_layers := _gate(gradients[worker.OWN_LAYERS], exact, None)),
        }
        reference = stack.enter_context(start(worker.__name__, worker.REFERENCE, *arguments))
        report["gate"][worker.REFERENCE] = _gate(reference.gate(), exact, None)
        limits = {False: 2 * own_layers["error"], True: None}  # by whether it is under autocast
        for name in names(options.device, options.compile, options.only):
            with start(
                worker.__name__, name, *arguments
            ) as other:  # two at a time: four would not fit into a small machine
                bfloat16 = worker.IMPLEMENTATIONS[name].bfloat16
                row = _gate(other.gate(), exact, limits[bfloat16])
                report["gate"][name] = row
                if name == AUTOCAST:
                    limits[True] = 2 * row["error"]
                if row["passed"]:
                    report["implementations"][name] = _compare(reference, other, options.runs)
    report["passed"] = all(row["passed"] for row in report["gate"].values())
    return report


def _gate(gradients: list[torch.Tensor] | None, exact: list[torch.Tensor], limit: float | None) -> dict[str, Any]:
    """How far the gradient is from the exact one, as a share of its length; a graph is that of a gated step.

    Without a limit it is a reference's, which sets the limit of the others.
    """
    if gradients is None:
        return {"error": None, "passed": True}
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(gradients, exact, strict=True)]
    error = float((sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt())
    return {"error": error, "allowed": limit, "passed": error <= (math.inf if limit is None else limit)}


def _compare(reference: MeasuredProcess, other: MeasuredProcess, runs: int) -> dict[str, Any]:
    """Seconds of both, round by round, and what one is of the other."""
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for run in range(runs + 1):
        first, second = (reference, other) if run % 2 else (other, reference)
        seconds = {first: first.ask("step"), second: second.ask("step")}
        if run > 0:  # the first round warms up
            rounds.append((seconds[reference], seconds[other]))
    parts = {part for _, ours in rounds for part in ours}
    order = [part for part in ("whole", *worker.PARTS) if part in parts]
    return {
        "parts": {part: quantiles([ours[part] for _, ours in rounds]) for part in order},
        "reference_parts": {part: quantiles([theirs[part] for theirs, _ in rounds]) for part in order},
        "ratios": {part: statistics.median(theirs[part] / ours[part] for theirs, ours in rounds) for part in order},
        "peak_gib": other.ask("peak"),
        "reference_peak_gib": reference.ask("peak"),
    }


def terminal_table(report: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    for name, row in report["gate"].items():
        yield f"gate {name}: {'passed' if row['passed'] else 'RED'}; gradient {json.dumps(row)}"
    for name, figures in report["implementations"].items():
        peaks = figures["peak_gib"], figures["reference_peak_gib"]
        yield f"\n{name}: peak memory {peaks[0]:.2f} GiB, of {worker.REFERENCE} {peaks[1]:.2f}"
        for part, quantile in figures["parts"].items():
            ours, theirs = (1e3 * row["median"] for row in (quantile, figures["reference_parts"][part]))
            yield f"  {part:18s}{ours:9.1f} ms  {theirs:9.1f} ms  {figures['ratios'][part]:6.2f}x"


if __name__ == "__main__":
    sys.exit(main())
