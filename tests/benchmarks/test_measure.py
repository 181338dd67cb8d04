"""The instruments: order and number of the runs, quantiles, memory, ceilings."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import ceilings, in_turn, peak_memory, quantiles

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls move."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_runs_are_taken_in_turn_and_the_first_changes():
    calls = []
    timed = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    times = in_turn(timed, CPU, runs=4, seconds=60, warmup=1, fill=0)
    assert [name for name, _ in calls] == list("abc" + "abc" + "bca" + "cab" + "abc")
    assert [number for _, number in calls] == list(range(15))
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def taking(clock, *seconds):
    remaining = iter(seconds)

    def call(number):
        clock.now += next(remaining)

    return call


def test_time_is_that_of_each_call(clock):
    calls = {"a": taking(clock, 1, 2, 3), "b": taking(clock, 10, 20, 30)}
    assert in_turn(calls, CPU, runs=2, seconds=1000, warmup=1) == {"a": [2, 3], "b": [20, 30]}


@pytest.mark.parametrize(("least", "expected"), [(2, 3), (5, 5)])
def test_the_budget_ends_the_runs_but_not_before_the_least(clock, least, expected):
    calls = {"a": taking(clock, *[1] * 10), "b": taking(clock, *[1] * 10)}
    times = in_turn(calls, CPU, runs=10, seconds=5, warmup=0, least=least)
    assert len(times["a"]) == len(times["b"]) == expected


@pytest.mark.parametrize(("fill", "expected"), [(0, 3), (5, 3), (20, 10)])
def test_short_calls_get_more_runs(clock, fill, expected):
    calls = {"a": taking(clock, *[1] * 30), "b": taking(clock, *[1] * 30)}
    times = in_turn(calls, CPU, runs=3, seconds=100, warmup=0, fill=fill)
    assert len(times["a"]) == len(times["b"]) == expected


def test_quantiles():
    assert quantiles([float(value) for value in range(11)]) == {"q20": 2, "median": 5, "q80": 8, "runs": 11}
    assert quantiles([3.0, 1.0]) == pytest.approx({"q20": 1.4, "median": 2, "q80": 2.6, "runs": 2})
    assert quantiles([7.0]) == {"q20": 7, "median": 7, "q80": 7, "runs": 1}


@pytest.mark.parametrize("megabytes", [1, 8, 40])
def test_peak_memory_counts_what_is_freed_before_the_end(megabytes):
    size = megabytes * 2**20

    def call():
        scratch = torch.ones(size // 4)  # twice the result, at the same time as it
        result = torch.ones(size // 8)
        return result + scratch[0]

    peak = peak_memory(call, CPU)
    if peak is None and sys.platform != "linux":  # which always tells it
        pytest.skip("the system does not tell the peak of resident memory")
    assert 2 * size - 2**18 <= peak <= 2 * size + 2**18


def test_peak_memory_does_not_count_what_was_held_before():
    held = torch.ones(10 * 2**20)
    peak = peak_memory(lambda: held[:100].sum(), CPU)
    if peak is None and sys.platform != "linux":  # which always tells it
        pytest.skip("the system does not tell the peak of resident memory")
    assert peak < 2**18


def test_ceilings_count_what_the_copy_and_the_product_do(monkeypatch):
    monkeypatch.setattr(measure, "in_turn", lambda calls, *rest, **options: {name: [0.9, 0.5] for name in calls})
    limits = ceilings.__wrapped__(CPU, torch.float32)
    assert limits["gemm_flop_per_s"] == 2 * 8192 * 1024**2 / 0.5
    assert limits["copy_bytes_per_s"] >= 2 * 4 * measure.last_level_cache(CPU) / 0.5


def test_ceilings_are_measured_once_a_process():
    assert ceilings(CPU, torch.float32) is ceilings(CPU, torch.float32)
