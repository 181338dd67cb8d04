"""The harness on an operator that takes no time: the gate, the order of the runs, the record that comes out."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import textwrap

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import TOGETHER, names
from benchmarks.environment import ROOT
from benchmarks.harness import Case, main, run_case
from benchmarks.measure import in_turn
from sparse_rcnn.ops import _library

CPU = torch.device("cpu")


def square(x, y):
    """x * y + the sum of x: two inputs, one of them a list."""
    return x * y[0] + x.sum()


def make_case(native=square, peers=None, **changes):
    def inputs(generator):
        return {"x": torch.randn(5, generator=generator), "y": [torch.randn(5, generator=generator)]}

    settings = {"bytes": {"forward": 60.0, "backward": 100.0}, "flops": {"forward": 15.0}, "wrt": ("x", "y")}
    return Case("five", inputs, square, {"native": native, **(peers or {})}, **(settings | changes))


def run(case, dtype=torch.float32, **options):
    return run_case(case, CPU, dtype, quick=True, **options)


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(harness, "MOST_SETS", 3)
    monkeypatch.setattr(harness, "in_turn", functools.partial(in_turn, fill=0))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.tensor([1.0, 1, 1, 1, 1 + 1e-3])


WRONG = {
    "value": lambda x, y: square(x, y) + torch.tensor([0, 0, 0, 0, 1e-3]),
    "not a number": lambda x, y: square(x, y) + torch.tensor([0, torch.nan, 0, 0, 0]),
    "shape": lambda x, y: square(x, y)[:4],
    "outputs": lambda x, y: [],
    "gradient": lambda x, y: square(WrongGradient.apply(x), y),
    "gradient of an item": lambda x, y: square(x, [WrongGradient.apply(y[0])]),
    "exception": lambda x, y: square(x, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_timed_on_a_red_gate(name):
    rows = run(make_case(WRONG[name]))
    assert [(row["passed"], row["mode"], row["implementations"]) for row in rows] == [(False, None, {})]
    gate = rows[0]["gate"]["native"]
    assert gate["passed"] is False
    named = {"gradient": "gradient of x", "gradient of an item": "gradient of y[0]", "value": "output 0"}
    if name in named:
        assert gate["tensor"] == named[name]
        assert gate["share_of_allowed"] > 10
    assert ("TypeError" in gate.get("error", "")) == (name == "exception")


def test_a_red_gate_is_the_exit_status(capsys):
    cases = {True: make_case(), False: make_case(WRONG["gradient"])}
    assert main("square", lambda device, dtype: [cases[True]], ["--quick", "--dtype", "float32"]) == 0
    assert "RED GATE" not in capsys.readouterr().out
    assert main("square", lambda device, dtype: cases.values(), ["--quick", "--dtype", "float32"]) == 1
    captured = capsys.readouterr()
    assert "RED GATE" in captured.out and "gradient of x" in captured.out
    assert "square: the gate is red" in captured.err


def test_a_peer_that_is_wrong_is_not_timed_either():
    rows = run(make_case(peers={"other": WRONG["value"]}))
    assert [row["passed"] for row in rows] == [False]
    assert rows[0]["gate"]["native"]["passed"] and not rows[0]["gate"]["other"]["passed"]


def test_an_ungated_peer_is_timed_and_its_reason_recorded():
    rows = run(make_case(peers={"other": WRONG["value"]}, ungated={"other": "rounds"}))
    assert all(row["passed"] and row["ungated"] == {"other": "rounds"} for row in rows)
    assert "other" in rows[0]["ratios"] and "other" not in rows[0]["gate"]


def test_an_ungated_peer_that_does_not_run_is_left_out_and_says_why():
    rows = run(make_case(peers={"other": WRONG["exception"]}, ungated={"other": "rounds"}))
    assert all(row["passed"] and list(row["ratios"]) == ["reference"] for row in rows)
    assert rows[0]["ungated"]["other"].startswith("rounds; left out: TypeError: 'NoneType'")


@pytest.mark.parametrize(("shift", "passed"), [(0.9e-5, True), (1.2e-5, False)])
def test_float32_tolerance(shift, passed):
    # Values of 1, exact in float32: 1e-5 absolute and 1e-5 relative allow 2e-5.
    case = Case("ones", lambda generator: {"x": torch.ones(3)}, lambda x: 1 * x, {"native": lambda x: x + 2 * shift})
    assert run(case)[0]["passed"] is passed


@pytest.mark.parametrize(("factor", "passed"), [(1.8, True), (2.4, False)])
def test_half_types_are_held_to_twice_eagers_error(factor, passed):
    def reference(x):
        return x * x

    def native(x):
        exact = x.double() * x.double()
        return exact + factor * ((x * x).double() - exact).abs().max()

    def inputs(generator):
        return {"x": torch.randn(64, generator=generator).bfloat16()}

    case = Case("squares", inputs, reference, {"native": native})
    assert run(case, torch.bfloat16)[0]["passed"] is passed


def test_the_gate_sees_the_arguments_that_keep_their_type():
    seen = []

    def reference(x, boxes):
        seen.append((x.dtype, boxes.dtype))
        return x * boxes.to(x.dtype)

    def inputs(generator):
        return {"x": torch.ones(2), "boxes": torch.ones(2)}

    run(Case("kept", inputs, reference, {"native": reference}, keep=("boxes",)))
    assert (torch.float64, torch.float32) in seen
    assert (torch.float64, torch.float64) not in seen


def test_an_implementation_gets_its_inputs_prepared_outside_of_its_time():
    prepared, used = [], []  # the tensors themselves: a freed one's address may be given out again

    def prepare(inputs):
        prepared.append(inputs["x"].clone())
        return {"x": prepared[-1], "y": inputs["y"]}

    def other(x, y):
        used.append(x)
        return square(x, y)

    case = make_case(peers={"other": other}, wrt=(), prepare={"other": prepare})
    assert run(case)[0]["passed"]
    assert len(prepared) == 1 + 3  # in the gate, and once for each of three sets
    addresses = {x.data_ptr() for x in prepared}
    assert len(used) > len(prepared) and {x.data_ptr() for x in used} <= addresses
    wrong = make_case(peers={"other": other}, prepare={"other": lambda inputs: inputs | {"x": inputs["x"] + 1}})
    assert not run(wrong)[0]["gate"]["other"]["passed"]


def test_rows_of_the_three_modes():
    rows = run(make_case(peers={"other": square}))
    assert [row["mode"] for row in rows] == ["forward", "backward", "both"]
    assert [row["bytes"] for row in rows] == [60, 100, 160]
    assert [row["flops"] for row in rows] == [15, None, None]
    for row in rows:
        assert row["dtype"] == "float32" and row["device"] == "cpu" and row["output_bytes"] == 20
        assert list(row["implementations"]) == ["native", "other", "reference"]
        assert list(row["ratios"]) == ["other", "reference"]
        for figures in row["implementations"].values():
            assert 0 < figures["q20_ms"] <= figures["median_ms"] <= figures["q80_ms"]
            assert figures["runs"] == 5
            assert figures["bytes_per_s"] == pytest.approx(row["bytes"] / figures["median_ms"] * 1e3)
            assert ("peak_bytes" in figures) == (row["mode"] != "backward")


def test_without_gradients_only_the_forward():
    assert [row["mode"] for row in run(make_case(wrt=()))] == ["forward"]
    assert [row["mode"] for row in run(make_case(modes=("both",)))] == ["both"]


def test_every_run_takes_the_next_set_of_inputs():
    seen = []

    def recorded(x, y):
        seen.append(x.data_ptr())
        return square(x, y)

    case = make_case(recorded, peers={"other": recorded}, wrt=())
    case = dataclasses.replace(case, reference=recorded)
    assert run(case)[0]["input_sets"] == 3
    timed = seen[-(3 * 7 + 7) : -7]  # two to warm up and five runs of three; then the memory's calls and the outputs
    assert len(set(timed)) == 3
    assert timed == timed[:3] * 7


def test_so_many_sets_that_each_has_left_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "MOST_SETS", 64)
    monkeypatch.setattr(harness, "last_level_cache", lambda device: 300)
    case = make_case(bytes={"forward": 20.0})  # of 40 bytes of inputs the operator touches 20
    assert len(harness._input_sets(case, CPU)) == 2 + 2 * 300 // 20
    assert len(harness._input_sets(make_case(bytes={}), CPU)) == 2 + 2 * 300 // 40


def test_backward_does_not_time_the_forward(monkeypatch):
    calls = []

    def record(timed, *rest):
        calls.append(timed)
        return {name: [1.0] for name in timed}

    monkeypatch.setattr(harness, "in_turn", record)
    forwards = []

    def native(x, y):
        forwards.append(torch.is_grad_enabled())
        return square(x, y)

    run(make_case(native, modes=("backward",)))
    forwards.clear()
    grads = calls[0]["native"](0)
    assert not forwards and [grad.shape for grad in grads] == [(5,), (5,)]
    run(make_case(native, modes=("both",)))
    forwards.clear()
    outputs, grads = calls[1]["native"](0)
    assert forwards == [True] and len(outputs) == 1 and len(grads) == 2
    run(make_case(native, modes=("forward",)))
    forwards.clear()
    calls[2]["native"](0)
    assert forwards == [False]


def test_ratios_are_taken_run_by_run():
    ratios = harness._ratios({"native": [1.0, 2.0, 4.0], "other": [3.0, 6.0, 12.0], "reference": [5.0, 10.0, 4.0]})
    assert ratios["other"] == {"q20": 3, "median": 3, "q80": 3, "runs": 3}
    assert ratios["reference"]["median"] == 5
    assert harness._ratios({"other": [1.0], "reference": [1.0]}) == {}


def test_native_switches_the_backend_for_the_call_only():
    seen = harness.using("reference", lambda: _library.active_backend())
    before = _library.active_backend()
    assert seen() == "reference"
    assert _library.active_backend() == before
    assert harness.native.args == ("native",)


def test_json(tmp_path):
    path = tmp_path / "new" / "figures.json"
    arguments = ["--quick", "--dtype", "float32", "float64", "--json", str(path)]
    assert main("square", lambda device, dtype: [double_if(make_case(), dtype)], arguments) == 0
    report = json.loads(path.read_text())
    assert set(report["operators"]) == {"square"}
    result = report["operators"]["square"]
    assert [(row["dtype"], row["mode"]) for row in result["cases"]] == [
        (dtype, mode) for dtype in ("float32", "float64") for mode in ("forward", "backward", "both")
    ]
    for limits in result["ceilings"].values():
        assert 1e8 < limits["copy_bytes_per_s"] < 1e13
        assert 1e8 < limits["gemm_flop_per_s"] < 1e15
    environment = report["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()


def double_if(case, dtype):
    def inputs(generator):
        values = case.inputs(generator)
        return {"x": values["x"].to(dtype), "y": [values["y"][0].to(dtype)]}

    return Case(case.name, inputs, case.reference, case.implementations, wrt=case.wrt)


def test_case_selects_by_name(capsys):
    assert main("square", lambda device, dtype: [make_case()], ["--quick", "--dtype", "float32", "--case", "six"]) == 0
    assert "five" not in capsys.readouterr().out


def test_the_example_of_the_documentation_is_a_benchmark():
    text = harness.__doc__.split("this is a complete one:\n")[1].split("Every file then has")[0]
    scope = {"__name__": "example"}
    exec(textwrap.dedent(text), scope)
    (case,) = scope["cases"](CPU, torch.bfloat16)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    inspect.signature(case.reference).bind(**inputs)
    assert set(case.wrt) <= set(inputs)
    assert all(tensor.dtype == torch.bfloat16 for tensor in inputs.values())
    assert sum(inputs[name].nbytes for name in case.wrt) + inputs["roi_features"].nbytes == case.bytes["forward"]


def test_every_operator_with_a_schema_has_a_benchmark():
    schemas = (ROOT / "csrc" / "schemas.cpp").read_text()
    declared = set(re.findall(r'"(\w+)\((?:Tensor|Tensor\[\]) ', schemas))
    assert len(declared) > 5
    measured = {*names(), *(operator for together in TOGETHER.values() for operator in together)}
    assert {name for name in declared if not name.endswith("_backward")} <= measured
    assert set(TOGETHER) <= set(names())
