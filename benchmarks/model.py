"""Whole-image inference on the CPU: latency, its parts, start-up and memory, against the plain detector.

    python -m benchmarks.model [--preset r50_300] [--size 800 1333] [--runs 5] [--json FILE] [--readme]

Every implementation runs in a process of its own, as a user would have it (an optimized detector changes what its
process does with memory), and the processes take turns: ratios are those of one round, to ``reference``, the detector
as it is built with the references of all operators. The weights are random.

The gate before the timing: in float32 every stage's logits within 1e-3 and boxes within 0.02 pixels of the reference's;
in bfloat16 no more than twice the error of the reference under autocast.

``--readme`` puts the table of FILE into README.md; without ``--json`` that of the committed figures, measuring nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import model_worker
from benchmarks.environment import ROOT, environment, write_json
from benchmarks.measure import quantiles
from benchmarks.report import COMMAND_MODEL, MODEL, model_table, update_readme
from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.models.config import PRESETS

FIGURES = ROOT / "benchmarks" / "results" / "model_cpu.json"
REFERENCE = "reference"
LOGIT_TOLERANCE, BOX_TOLERANCE = 1e-3, 0.02


def main() -> int:
    """Measure, print a table, and write JSON and README if asked to; returns 1 when the gate is red."""
    options = build_parser().parse_args()
    report = None
    if options.json or not options.readme:
        report = measure(options.preset, tuple(options.size), options.runs)
        print("\n".join(terminal_table(report)))
        if options.json:
            write_json(options.json, report)
        if not report["passed"]:
            print("the gate is red, see above", file=sys.stderr)
            return 1
    if options.readme:
        report = report or json.loads(FIGURES.read_text())
        update_readme(ROOT / "README.md", model_table(report), MODEL)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="r50_300")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--runs", type=int, default=5, help="timed rounds after one to warm up (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--readme", action="store_true", help=f"put the table into README.md ({COMMAND_MODEL})")
    return parser


def measure(preset: str, size: tuple[int, int], runs: int) -> dict[str, Any]:
    """The report, as it stands in the JSON; without times when the gate is red."""
    report: dict[str, Any] = {"preset": preset, "size": list(size), "runs": runs, "environment": environment()}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        make_detector(preset).save_pretrained(folder)
        workers = {}
        for name in model_worker.IMPLEMENTATIONS:
            workers[name] = stack.enter_context(_worker(name, folder, size))
        report["gate"] = gate({name: worker.gate() for name, worker in workers.items()})
        report["passed"] = all(row["passed"] for row in report["gate"].values())
        if not report["passed"]:
            return report
        peaks = {name: worker.ask("peak") for name, worker in workers.items()}
        del workers[model_worker.AUTOCAST]
        report["implementations"] = _time(workers, runs)
        for name, worker in workers.items():
            report["implementations"][name] |= {"start_up_s": worker.start_up, "peak_rss_gib": peaks[name]}
        return report


def make_detector(preset: str) -> SparseRCNN:
    """Random weights, but boxes of all sizes that stay in the image, as trained ones do: how far apart the samples of a
    RoIAlign lie is a matter of time, and of values outside of everything nothing can be said."""
    torch.manual_seed(0)
    model = SparseRCNN(SparseRCNNConfig.preset(preset))
    with torch.no_grad():
        sizes = 2 ** (-5 * torch.rand(model.config.num_proposals, 2))
        model.init_proposal_boxes.weight.copy_(torch.cat([torch.rand(sizes.shape), sizes], dim=1))
        for stage in model.head.stages:
            stage.bboxes_delta.weight.mul_(0.02)
    return model


def gate(outputs: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Errors of all stages' logits and boxes against the reference, and whether they pass."""
    exact = outputs[REFERENCE]
    errors = {
        name: {key: (found[key] - exact[key]).abs() for key in ("logits", "boxes")}
        for name, found in outputs.items()
        if found
    }
    rows = {}
    for name, error in errors.items():
        if name in (REFERENCE, model_worker.AUTOCAST):
            continue
        row = {f"{key}_max": float(value.max()) for key, value in error.items()}
        row |= {f"{key}_mean": float(value.mean()) for key, value in error.items()}
        if "bfloat16" in name:
            limits = {key: 2 * float(value.mean()) for key, value in errors[model_worker.AUTOCAST].items()}
            row["passed"] = all(row[f"{key}_mean"] <= limit for key, limit in limits.items())
        else:
            row["passed"] = row["logits_max"] <= LOGIT_TOLERANCE and row["boxes_max"] <= BOX_TOLERANCE
        rows[name] = row
    return rows


class _Worker:
    """The parent's end of a process of :mod:`benchmarks.model_worker`."""

    def __init__(self, process: subprocess.Popen, folder: str) -> None:
        self.process, self.folder = process, folder
        begin = time.perf_counter()
        self.parts = self._receive()  # comes after its first result
        self.start_up = time.perf_counter() - begin

    def ask(self, message: str) -> Any:
        """Send one line, get one back."""
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()
        return self._receive()

    def gate(self) -> dict[str, torch.Tensor]:
        """All stages' logits and boxes; of a peer nothing."""
        path = Path(self.folder) / "outputs.pt"
        return torch.load(path) if self.ask(f"gate {path}") else {}

    def _receive(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker broke: {self.process.args}")
        return json.loads(line)


@contextlib.contextmanager
def _worker(name: str, folder: str, size: tuple[int, int]) -> Iterator[_Worker]:
    command = [sys.executable, "-m", "benchmarks.model_worker", name, folder, *map(str, size)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield _Worker(process, folder)
    finally:
        process.stdin.close()
        process.wait()


def _time(workers: dict[str, _Worker], runs: int) -> dict[str, Any]:
    """Seconds of every part of every implementation, round by round, and their ratios to the reference's."""
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in w.parts} for name, w in workers.items()}
    names = list(workers)
    for run in range(runs + 1):
        turn = run % len(names)
        for name in names[turn:] + names[:turn]:
            for part in workers[name].parts:
                taken = workers[name].ask(part)
                if run > 0:  # the first round warms up
                    seconds[name][part].append(taken)
    figures: dict[str, Any] = {}
    for name, parts in seconds.items():
        figures[name] = {"parts": {part: quantiles(values) for part, values in parts.items()}, "ratios": {}}
        for part, values in parts.items():
            against = seconds[REFERENCE].get(part)
            if against and name != REFERENCE:
                ratios = [reference / ours for reference, ours in zip(against, values, strict=True)]
                figures[name]["ratios"][part] = statistics.median(ratios)
    return figures


def terminal_table(report: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    for name, row in report["gate"].items():
        yield f"gate {name}: {'passed' if row['passed'] else 'RED'}; errors {json.dumps(row)}"
    for name, figures in report.get("implementations", {}).items():
        yield f"\n{name}: start-up {figures['start_up_s']:.1f} s, peak resident {figures['peak_rss_gib']:.2f} GiB"
        for part, quantile in figures["parts"].items():
            ratio = figures["ratios"].get(part)
            speed = f"{ratio:6.2f}x reference" if ratio else ""
            low, median, high = (1e3 * quantile[key] for key in ("q20", "median", "q80"))
            yield f"  {part:13s}{median:9.1f} ms  {low:8.1f} .. {high:8.1f}  {speed}"


if __name__ == "__main__":
    sys.exit(main())
