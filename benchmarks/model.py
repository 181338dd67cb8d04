"""Whole-image inference: latency, throughput, parts and their floors, start-up and memory, against the plain detector.

    python -m benchmarks.model [--device cpu|cuda] [--preset r50_300] [--size 800 1333] [--batches 1 4] [--runs 5]
                               [--compile] [--json FILE] [--picture FILE] [--readme]

Every implementation runs in a process of its own, as a user would have it (an optimized detector changes what its
process does with memory), and the processes take turns: ratios are those of one round, to ``reference``, the detector
as it is built with the references of all operators, and to the other peers. The weights are random.

On a CPU the start-up is the median of three processes, and batches of more than 4 images are timed after the rest, of
five implementations one after the other: its memory does not hold all of them (the reference's alone, kept, is 20 GiB
of 32 images).

The gate before the timing: in float32 every stage's logits within 1e-3 and boxes within 0.02 pixels of the reference's;
in bfloat16 no more than twice the error of the reference under autocast.

``--compile`` adds a reference that waits for nothing, by ``torch.compile(mode="max-autotune")``, which takes minutes.
``--picture`` draws where the time goes, as SVG. ``--readme`` puts the table of FILE into README.md; without ``--json``
that of the committed figures, measuring nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import model_worker
from benchmarks.environment import ROOT, environment, write_sections
from benchmarks.measure import quantiles
from benchmarks.measured_process import MeasuredProcess, start
from benchmarks.picture import draw
from benchmarks.report import COMMAND_MODEL, MODEL, model_table, update_readme
from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.models.config import PRESETS

FIGURES = ROOT / "benchmarks" / "results" / "cpu.json"
REFERENCE = "reference"
OTHERS = (model_worker.KEPT, model_worker.AUTOCAST)  # that ratios are given to as well
EXACT = (model_worker.KEPT, "native kernels", "optimized, float32")  # the others are held to the error of bfloat16
PEERS = {
    "cpu": tuple(model_worker.IMPLEMENTATIONS),
    "cuda": tuple(name for name in model_worker.IMPLEMENTATIONS if name not in (model_worker.KEPT, model_worker.PEER)),
}
STARTS = 3  # of each implementation on a CPU: one alone is at the mercy of what else runs
SIDE_BY_SIDE = 4  # images at once, of which a CPU's memory holds the tensors of all implementations
LARGE = (REFERENCE, model_worker.AUTOCAST, model_worker.COMPILED, "optimized, float32", "optimized, bfloat16")
LOGIT_TOLERANCE, BOX_TOLERANCE = 1e-3, 0.02


def main() -> int:
    """Measure, print a table, and write JSON and README if asked to; returns 1 when the gate is red."""
    options = build_parser().parse_args()
    report = None
    if options.json or not options.readme:
        batches = sorted({1, *(options.batches or ((1, 4, 16, 32) if options.device.type == "cuda" else (1, 4)))})
        names = [name for name in PEERS[options.device.type] if options.compile or name != model_worker.COMPILED]
        report = measure(options.preset, options.device, tuple(options.size), batches, options.runs, names)
        print("\n".join(terminal_table(report)))
        if options.json:
            write_sections(options.json, model=report)
        if options.picture and report["passed"]:
            options.picture.write_text(draw(report))
        if not report["passed"]:
            print("the gate is red, see above", file=sys.stderr)
            return 1
    if options.readme:
        report = report or json.loads(FIGURES.read_text())["model"]
        update_readme(ROOT / "README.md", model_table(report), MODEL)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="r50_300")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=(800, 1333))
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="1 and these (default 1 4, or 1 4 16 32)")
    parser.add_argument("--compile", action="store_true", help="against torch.compile(mode='max-autotune') too")
    parser.add_argument("--picture", type=Path, help="draw where the time goes here")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds after one to warm up (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here too, as the entry `model`")
    parser.add_argument("--readme", action="store_true", help=f"put the table into README.md ({COMMAND_MODEL})")
    return parser


def measure(
    preset: str, device: torch.device, size: tuple[int, int], batches: list[int], runs: int, names: list[str]
) -> dict[str, Any]:
    """The report, as it stands in the JSON; without times when the gate is red."""
    report: dict[str, Any] = {"preset": preset, "device": device.type, "size": list(size), "batches": batches}
    report |= {"runs": runs, "environment": environment(device)}
    alone = [count for count in batches if device.type == "cpu" and count > SIDE_BY_SIDE]
    together = [count for count in batches if count not in alone]
    with tempfile.TemporaryDirectory() as folder:
        make_detector(preset).save_pretrained(folder)
        flags = [folder, "--device", device, "--size", *size, "--batches"]
        start_ups = _start_ups(names, [*flags, *together]) if device.type == "cpu" else {}
        with contextlib.ExitStack() as stack:
            workers = {n: stack.enter_context(start(model_worker.__name__, n, *flags, *together)) for n in names}
            peaks = {name: worker.ask("peak") for name, worker in workers.items()}
            for name, worker in workers.items():
                start_ups.setdefault(name, []).append(worker.start_up)
            report["gate"] = gate({name: worker.gate() or {} for name, worker in workers.items()})
            report["passed"] = all(row["passed"] for row in report["gate"].values())
            if not report["passed"]:
                return report
            seconds = _in_rounds(workers, runs)
            floors = {name: worker.ask("floors") for name, worker in workers.items()}
        for name in [name for name in names if alone and name in LARGE]:
            with start(model_worker.__name__, name, *flags, 1, *alone) as worker:
                seconds[name] |= _by_itself(worker, [f"whole x{count}" for count in alone], runs)
    report["implementations"] = _figures(seconds)
    for name, figures in report["implementations"].items():
        figures |= {"start_up_s": statistics.median(start_ups[name]), "peak_rss_gib": peaks[name]}
        figures["components"] = _components(figures["parts"], floors[name])
    return report


def _components(parts: dict[str, Any], floors: dict[str, Any]) -> dict[str, Any]:
    """Those of ``parts`` that have a floor, taken out of it, with the floor."""
    return {name: {"seconds": parts.pop(name), **floor} for name, floor in floors.items()}


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
        if name == model_worker.COMPILED:
            row["passed"] = True  # a peer rounds as it likes
        elif name not in EXACT:
            limits = {key: 2 * float(value.mean()) for key, value in errors[model_worker.AUTOCAST].items()}
            row["passed"] = all(row[f"{key}_mean"] <= limit for key, limit in limits.items())
        else:
            row["passed"] = row["logits_max"] <= LOGIT_TOLERANCE and row["boxes_max"] <= BOX_TOLERANCE
        rows[name] = row
    return rows


def _start_ups(names: list[str], arguments: list[Any]) -> dict[str, list[float]]:
    """Seconds of some starts of each implementation, round by round, besides that of the process which is then timed;
    not of the one that is compiled first, for minutes."""
    seconds: dict[str, list[float]] = {}
    for _ in range(STARTS - 1):
        for name in names:
            if name != model_worker.COMPILED:
                with start(model_worker.__name__, name, *arguments) as worker:
                    seconds.setdefault(name, []).append(worker.start_up)
    return seconds


def _in_rounds(workers: dict[str, MeasuredProcess], runs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every part of every implementation, round by round."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in worker.ask("parts")} for name, worker in workers.items()
    }
    names = list(workers)
    for run in range(runs + 1):
        turn = run % len(names)
        for name in names[turn:] + names[:turn]:
            for part, values in seconds[name].items():
                taken = workers[name].ask(part)
                if run > 0:  # the first round warms up
                    values.append(taken)
    return seconds


def _by_itself(worker: MeasuredProcess, parts: list[str], runs: int) -> dict[str, list[float]]:
    """Seconds of these parts of one implementation while no other runs, up to one that the memory is too small for."""
    seconds = {}
    for part in parts:
        try:
            seconds[part] = [worker.ask(part) for _ in range(runs + 1)][1:]
        except RuntimeError as error:
            print(f"{part} ended a process: {error}", file=sys.stderr)
            break
    return seconds


def _figures(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Quantiles of what was timed, and the ratios to each peer's."""
    figures: dict[str, Any] = {}
    for name, parts in seconds.items():
        figures[name] = {"parts": {part: quantiles(values) for part, values in parts.items()}}
        figures[name]["ratios"] = {} if name == REFERENCE else _ratios(seconds[REFERENCE], parts)
        others = [peer for peer in (*OTHERS, model_worker.COMPILED) if peer in seconds and peer != name]
        figures[name]["ratios_to"] = {peer: _ratios(seconds[peer], parts) for peer in others}
    return figures


def _ratios(peer: dict[str, list[float]], ours: dict[str, list[float]]) -> dict[str, float]:
    """How many times as fast, by part, those that both have."""
    return {
        part: statistics.median(theirs / mine for theirs, mine in zip(peer[part], values, strict=True))
        for part, values in ours.items()
        if part in peer
    }


def terminal_table(report: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    for name, row in report["gate"].items():
        yield f"gate {name}: {'passed' if row['passed'] else 'RED'}; errors {json.dumps(row)}"
    for name, figures in report.get("implementations", {}).items():
        yield f"\n{name}: start-up {figures['start_up_s']:.1f} s, peak resident {figures['peak_rss_gib']:.2f} GiB"
        for part, quantile in figures["parts"].items():
            low, median, high = (1e3 * quantile[key] for key in ("q20", "median", "q80"))
            images = int(part.partition(" x")[2] or 1)
            rate = f"{images / quantile['median']:8.1f} images/s"
            peers = {REFERENCE: figures["ratios"], **figures["ratios_to"]}
            speeds = [f"{ratios[part]:.2f}x {peer}" for peer, ratios in peers.items() if part in ratios]
            yield f"  {part:18s}{median:10.2f} ms  {low:8.2f} .. {high:8.2f} {rate}  {', '.join(speeds)}"
        for step, row in figures["components"].items():
            median = row["seconds"]["median"]
            share = f"{row['floor_s'] / median:6.0%} of it the floor" if row["floor_s"] else ""
            yield f"    {step:20s}{1e3 * median:9.3f} ms {row['gflop']:8.2f} GFLOP {share}"


if __name__ == "__main__":
    sys.exit(main())
