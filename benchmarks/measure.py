"""Time, memory and ceilings of one machine: the instruments under benchmarks/harness.py."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.environment import last_level_cache
from sparse_rcnn.onednn import linear

HEAD_START = 200_000  # cycles the GPU sleeps before each run, so that the launches of the run are queued when it starts


def in_turn(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    runs: int,
    seconds: float,
    warmup: int = 2,
    least: int = 5,
    fill: float = 0.3,
) -> dict[str, list[float]]:
    """Seconds of each call, run for run; run k of all of them is taken one after the other.

    A machine whose speed drifts is then the same to all of them, and the ratios of a run stay true. Who comes first
    changes from run to run.

    Args:
        calls: each takes the number of the call, by which it picks a set of inputs that is no longer in the cache.
        runs: timed runs of each, fewer (but at least ``least``) when ``seconds`` are over, and more until ``fill``
            seconds are: of calls that take microseconds.
    """
    names, times, number = list(calls), {name: [] for name in calls}, itertools.count()
    for _ in range(warmup):
        for name in names:
            calls[name](next(number))
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    begin = time.perf_counter()
    for run in itertools.count():
        elapsed = time.perf_counter() - begin
        if run >= runs and elapsed >= fill or run >= least and elapsed > seconds:
            break
        for name in names[run % len(names) :] + names[: run % len(names)]:
            times[name].append(clock(calls[name], next(number)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        times = {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in times.items()}
    return times


def _cpu_seconds(call: Callable[[int], object], number: int) -> float:
    start = time.perf_counter()
    call(number)
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[int], object], number: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START)
    start.record()
    call(number)
    end.record()
    return start, end


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20 %, 50 % and 80 % quantiles, and how many values there were."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"q20": cuts[1], "median": cuts[4], "q80": cuts[7], "runs": len(values)}


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call holds at its peak beyond what was held before it, its result included.

    On a GPU those of torch's allocator; on a processor the process's resident memory, which also sees scratch that a
    kernel allocates by itself. None where the system cannot tell.
    """
    call()  # what is set up once and stays (thread pools, cuBLAS workspaces) is not counted
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best, measured now: bytes a second of a copy, FLOP a second of a matrix product.

    The product is the faster library's: on a CPU PyTorch's own can run at half the speed of oneDNN. There it has many
    rows, for the weights are laid out anew in every call. Of each the fastest call counts: what slows a machine down
    for a moment does not lower what it can do.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    rows = size if cuda else 8 * size
    length = max(4 * last_level_cache(device), 2**30 if cuda else 2**26)
    source, target = (torch.empty(length // 4, dtype=torch.float32, device=device).fill_(1) for _ in range(2))
    left, right = (torch.randn(height, size, device=device).to(dtype) for height in (rows, size))
    calls = {"copy": lambda _: target.copy_(source), "gemm": lambda _: linear(left, right)}
    times = in_turn(calls, device, runs=30, seconds=2.0)
    copy, gemm = min(times["copy"]), min(times["gemm"])
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "gemm_flop_per_s": 2 * rows * size**2 / gemm}
