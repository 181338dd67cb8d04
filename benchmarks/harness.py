"""The one way to measure an operator: gate, warm-up, runs in turn on cold caches, quantiles, ceilings, memory, JSON.

A benchmark file ``benchmarks/<op>.py`` declares its cases and hands them to :func:`main`; this is a complete one:

    \"""dynamic_conv: 300 proposals, as a stage of the head calls it.\"""

    import sys
    from collections.abc import Iterator

    import torch

    from benchmarks.harness import Case, main, native
    from sparse_rcnn.ops import dynamic_conv, dynamic_conv_reference
    from sparse_rcnn.self_test import steady_norm


    def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
        R, P, C, D = 300, 49, 256, 64

        def inputs(generator: torch.Generator) -> dict[str, object]:  # called for every set of inputs; random data
            def random(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, generator=generator)

            tensors = {"roi_features": random(R, P, C), "parameters": random(R, 2 * C * D) / 16}
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
            norms = [tensor.to(device, dtype) for size in (D, C) for tensor in steady_norm(size, generator)]
            names = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
            return tensors | dict(zip(names, norms, strict=True))

        moved = (2 * R * P * C + 2 * R * C * D) * dtype.itemsize  # read once, written once
        flops = 2 * 2 * R * P * C * D
        yield Case(
            name="300 proposals",
            inputs=inputs,
            reference=dynamic_conv_reference,  # the gate, in float64; timed as "reference" too
            implementations={"native": native(dynamic_conv)},  # ours first; then peers, if any
            bytes={"forward": moved, "backward": 2 * moved},
            flops={"forward": flops, "backward": 3 * flops},
            wrt=("roi_features", "parameters"),  # inputs whose gradients are compared and timed; () is forward only
            headline=True,  # a row of the README
        )


    if __name__ == "__main__":
        sys.exit(main("dynamic_conv", cases))

Every file then has the same command line:

    python -m benchmarks.<op> [--device cpu|cuda] [--dtype float32 bfloat16] [--quick] [--case TEXT] [--compile]
                              [--json FILE]

The gate: values, and gradients where there are any, of every implementation against the float64 reference on the same
inputs, by the rules of ``sparse_rcnn.self_test.Specification``. On a red gate the case is not timed and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, last_level_cache, write_json
from benchmarks.measure import ceilings, in_turn, peak_memory, quantiles
from benchmarks.report import print_case, show_ceilings
from sparse_rcnn import ops
from sparse_rcnn.inference.memory import keep_freed_memory
from sparse_rcnn.self_test import Specification, leaves, tensors_in

MODES = ("forward", "backward", "both")
OURS, REFERENCE, COMPILED = "native", "reference", "compiled"
PEER_SLACK = 5.0  # a peer has to compute the same thing, not as exactly
MOST_SETS = 64  # of inputs: what is smaller than a 64th of the cache is bound by launches, not by memory


@dataclass(frozen=True)
class Case:
    """One problem, and the implementations that solve it.

    Args:
        name: sizes in words; with the dtype and the mode it names the row.
        inputs: makes one set of keyword arguments from a CPU generator, on the device and in the dtype of the case.
            (What is large is better drawn on the GPU itself; torch's own generators are seeded too.)
        reference: the specification, for the gate (in float64) and as the eager peer.
        implementations: name -> callable with the same arguments; ``native`` is ours, the others are peers.
        bytes, flops: by mode, what the problem itself must move and compute; ``both`` defaults to the sum. A mode that
            is not named shows no share of a ceiling.
        wrt: the inputs (tensors or lists of them) whose gradients the backward gives.
        keep: inputs that stay in their dtype in the float64 gate, since the specification computes in it (boxes).
        prepare: name -> what is done to the inputs before that implementation gets them, outside of its time: a peer
            may have the memory layout that suits it best.
        ungated: peers that compute something slightly different by design, with the reason; shown, not compared.
        modes: by default forward, and backward and both where ``wrt`` names something.
        headline: a row of the README's table.
    """

    name: str
    inputs: Callable[[torch.Generator], dict[str, Any]]
    reference: Callable[..., Any]
    implementations: Mapping[str, Callable[..., Any]]
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    wrt: Sequence[str] = ()
    keep: Sequence[str] = ()
    prepare: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    ungated: Mapping[str, str] = field(default_factory=dict)
    modes: Sequence[str] | None = None
    headline: bool = False


Cases = Callable[[torch.device, torch.dtype], Iterable[Case]]


def using(backend: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` under ``ops.backend(backend)``."""

    @functools.wraps(op)
    def call(**inputs: Any) -> Any:
        with ops.backend(backend):
            return op(**inputs)

    return call


native = functools.partial(using, OURS)


def main(operator: str, cases: Cases, arguments: Sequence[str] | None = None) -> int:
    """Gate and time the cases of one operator, print a table, write JSON; returns 0, or 1 when a gate is red."""
    options = build_parser(f"benchmarks.{operator}").parse_args(arguments)
    keep_freed_memory()
    device = torch.device(options.device)
    report: dict[str, Any] = {"environment": environment(device), "operators": {}}
    load = report["environment"]["load"]
    if device.type == "cpu" and load is not None and load > 1.5 * torch.get_num_threads():
        print(f"others are using this machine (load {load}): do not quote the figures of this run", file=sys.stderr)
    rows, limits, red = [], {}, False
    for name in options.dtype:
        dtype = getattr(torch, name)
        limits[name] = ceilings(device, dtype)
        show_ceilings(name, limits[name])
        for case in cases(device, dtype):
            if options.case not in case.name:
                continue
            case_rows = run_case(case, device, dtype, quick=options.quick, compiled=options.compile)
            for row in case_rows:
                red |= not row["passed"]
                print_case(operator, row, limits[name])
            rows += case_rows
    report["operators"][operator] = {"ceilings": limits, "cases": rows}
    if options.json:
        write_json(options.json, report)
    if red:
        print(f"{operator}: the gate is red, see above", file=sys.stderr)
    return int(red)


def build_parser(program: str) -> argparse.ArgumentParser:
    """The flags that every benchmark file has."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description="Gate and time one operator.")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="a few runs: does it work, and about how fast")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference as a further peer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser


def run_case(
    case: Case, device: torch.device, dtype: torch.dtype, quick: bool = False, compiled: bool = False
) -> list[dict[str, Any]]:
    """One row a mode, as it stands in the JSON; rows of a red gate have no times."""
    implementations = {**case.implementations, REFERENCE: case.reference}
    if compiled:
        implementations[COMPILED] = _compile(case.reference)
    specification = Specification(case.reference, _inputs(case, 0), case.wrt, case.keep)
    gate = {
        name: specification.compare(_prepared(case, name, implementation), 1.0 if name == OURS else PEER_SLACK)
        for name, implementation in implementations.items()
        if name != REFERENCE and name not in case.ungated
    }
    ungated = dict(case.ungated)
    for name in case.ungated:
        problem = specification.problem(_prepared(case, name, implementations[name]))
        if problem is not None:  # a peer without a kernel for this type, say; the others are timed
            ungated[name] += f"; left out: {problem}"
            del implementations[name]
    del specification  # and its float64 tensors
    passed = all(result["passed"] for result in gate.values())
    head = {"case": case.name, "device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    head |= {"headline": case.headline, "passed": passed, "gate": gate, "ungated": ungated}
    if not passed:
        return [{**head, "mode": None, "implementations": {}, "ratios": {}}]
    modes = case.modes or (MODES if case.wrt else MODES[:1])
    sets = _input_sets(case, device)
    return [head | _time_mode(case, implementations, sets, mode, device, quick) for mode in modes]


def _prepared(case: Case, name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: implementation(**_prepare(case, name, inputs))


def _prepare(case: Case, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return case.prepare[name](inputs) if name in case.prepare else inputs


def _compile(reference: Callable[..., Any]) -> Callable[..., Any]:
    import torch._functorch.config

    torch._dynamo.reset()  # each case is compiled for its own sizes
    torch._functorch.config.donated_buffer = False  # a timed backward keeps its graph for the next run
    return torch.compile(reference, dynamic=False)


def _time_mode(
    case: Case,
    implementations: Mapping[str, Callable[..., Any]],
    sets: list[dict[str, Any]],
    mode: str,
    device: torch.device,
    quick: bool,
) -> dict[str, Any]:
    moved, flops = _cost(case.bytes, mode), _cost(case.flops, mode)
    own_sets = {name: [_prepare(case, name, inputs) for inputs in sets] for name in implementations}
    calls = {name: _calls(case, call, own_sets[name], mode) for name, call in implementations.items()}
    if device.type == "cuda":
        runs, seconds = (20, 5.0) if quick else (100, 30.0)
    else:
        runs, seconds = (5, 2.0) if quick else (50, 10.0)
    times = in_turn(calls, device, runs, seconds)
    rows = {name: _row(times[name], moved, flops) for name in calls}
    del calls
    if mode != "backward":  # its memory is that of "both"
        for name, call in implementations.items():
            once = _calls(case, call, own_sets[name][:1], mode)
            rows[name]["peak_bytes"] = peak_memory(lambda once=once: once(0), device)
    with torch.no_grad():
        output_bytes = sum(tensor.nbytes for tensor in tensors_in(case.reference(**sets[0])))
    result = {"mode": mode, "bytes": moved, "flops": flops, "output_bytes": output_bytes, "input_sets": len(sets)}
    return result | {"implementations": rows, "ratios": _ratios(times)}


def _cost(by_mode: Mapping[str, float], mode: str) -> float | None:
    if mode == "both" and mode not in by_mode and {"forward", "backward"} <= by_mode.keys():
        return by_mode["forward"] + by_mode["backward"]
    return by_mode.get(mode)


def _inputs(case: Case, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)  # for what a case draws on the GPU
    return case.inputs(torch.Generator().manual_seed(seed))


def _input_sets(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """So many sets of inputs that one is out of the last-level cache when its turn comes again."""
    first = _inputs(case, 0)
    touched = sum(tensor.nbytes for tensor in tensors_in(first))
    touched = max(1, min(touched, case.bytes.get("forward", touched)))
    count = min(MOST_SETS, 2 + int(2 * last_level_cache(device) / touched))
    return [first, *(_inputs(case, seed) for seed in range(1, count))]


def _calls(
    case: Case, implementation: Callable[..., Any], sets: list[dict[str, Any]], mode: str
) -> Callable[[int], object]:
    """What is timed: a call with the number of the set it works on."""
    if mode == "forward":

        def forward(number: int) -> object:
            with torch.no_grad():
                return implementation(**sets[number % len(sets)])

        return forward

    prepared = [leaves(inputs, case.wrt) for inputs in sets]
    graphs = [list(tensors_in(implementation(**inputs))) for inputs, _ in prepared]
    grads = [[torch.randn_like(output) for output in outputs] for outputs in graphs]
    if mode == "backward":

        def backward(number: int) -> object:
            index = number % len(sets)
            return torch.autograd.grad(graphs[index], prepared[index][1], grads[index], retain_graph=True)

        return backward

    graphs.clear()

    def both(number: int) -> object:
        inputs, wanted = prepared[number % len(sets)]
        outputs = list(tensors_in(implementation(**inputs)))
        return outputs, torch.autograd.grad(outputs, wanted, grads[number % len(sets)])

    return both


def _row(times: list[float], moved: float | None, flops: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {key: value if key == "runs" else 1e3 * value for key, value in quantiles(times).items()}
    row = {f"{key}_ms" if key != "runs" else key: value for key, value in row.items()}
    seconds = row["median_ms"] / 1e3
    row["bytes_per_s"] = moved / seconds if moved else None
    row["flop_per_s"] = flops / seconds if flops else None
    return row


def _ratios(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times the time of ours each peer took, run by run, so that drift cancels."""
    if OURS not in times:
        return {}
    return {
        name: quantiles([theirs / ours for theirs, ours in zip(values, times[OURS], strict=True)])
        for name, values in times.items()
        if name != OURS
    }
