"""python -m sparse_rcnn.doctor: what it reports, and what it says when an operator is broken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sparse_rcnn import doctor, ops
from sparse_rcnn.ops import _library
from sparse_rcnn.self_test import Specification, has_self_test, make_problem, self_test, steady_norm

CPU = torch.device("cpu")
PASSED = {
    **{"passed": True, "dtype": "float32", "tensor": "output 0", "max_error": 0.0, "share_of_allowed": 0.25},
    **{"problems": 6, "seconds": 0.1},
}


@pytest.fixture(scope="module")
def report():
    """The report of this installation, made by the command itself."""
    command = [sys.executable, "-m", "sparse_rcnn.doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_versions(report):
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["cuda"] == torch.version.cuda
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["versions"]["scipy"]
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["processor"]["name"]


def test_every_operator_on_every_device_is_served_and_the_present_ones_tested(report):
    rows = {(row["operator"], row["device"]): row for row in report["operators"]}
    references = {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")}
    assert set(rows) == {(operator, device) for operator in references for device in ("cpu", "cuda")}
    for (operator, device), row in rows.items():
        assert row["implementation"] == _library.serving(operator, device)
        assert row["why"]
        present = device == "cpu" or torch.cuda.is_available()
        assert (row["self_test"] is not None) == (has_self_test(operator) and present)
        if row["self_test"] is not None:
            assert row["self_test"]["passed"] and row["self_test"]["problems"] >= 1
    assert report["passed"] is True


def test_libraries(report):
    for name, library in report["libraries"].items():
        assert (library["problem"] is None) == (name not in _library.problems())
        assert (library["file"] is None) == (name in _library.problems())
    if report["libraries"]["_C"]["file"]:
        assert report["libraries"]["_C"]["cpu_capability"] == torch.ops.sparse_rcnn.cpu_capability()


def test_every_native_operator_has_a_self_test():
    assert all(has_self_test(operator) for operator in _library.operators())


def test_text_has_one_line_an_operator_and_device(report):
    lines = doctor.as_text(report)
    for row in report["operators"]:
        found = [line for line in lines if line.split()[:2] == [row["operator"], row["device"]]]
        assert len(found) == has_self_test(row["operator"])
    assert lines[-1] == "all self-tests passed"
    assert torch.__version__ in lines[0]


def test_text_of_a_failure(report, capsys, monkeypatch):
    row = {"operator": "apply_deltas", "device": "cpu", "implementation": "native", "why": "_C has the kernel"}
    failing = PASSED | {"passed": False, "share_of_allowed": 31.0}
    broken = {"passed": False, "died": True, "error": "its process ended with -11"}
    rows = [{**row, "self_test": failing}, {**row, "device": "cuda", "self_test": broken}]
    lines = doctor.as_text(report | {"operators": rows})
    assert "FAILED" in lines[-4] and "31.00 of the allowed error (output 0, float32)" in lines[-4]
    assert "FAILED" in lines[-3] and "its process ended with -11" in lines[-3]
    assert lines[-1] == "2 self-tests FAILED"


def test_a_failed_self_test_is_the_exit_status(capsys, monkeypatch):
    def results(jobs):
        return [PASSED | {"passed": operator != "dynamic_conv"} for operator, _ in jobs]

    monkeypatch.setattr(doctor, "run_self_tests", results)
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    failed = {row["operator"] for row in report["operators"] if row["self_test"] and not row["self_test"]["passed"]}
    assert failed == {"dynamic_conv"}
    monkeypatch.setattr(doctor, "run_self_tests", lambda jobs: [PASSED for _ in jobs])
    assert doctor.main([]) == 0
    assert "all self-tests passed" in capsys.readouterr().out


def test_serving_names_the_reason(monkeypatch):
    with ops.backend("reference"):
        rows = {(row["operator"], row["device"]): row for row in doctor.serving()}
    assert rows["dynamic_conv", "cpu"]["implementation"] == "reference"
    assert rows["dynamic_conv", "cpu"]["why"] == "SPARSE_RCNN_BACKEND asks for it"
    monkeypatch.setattr(_library, "_served", {("native", "apply_deltas", "cpu")})
    monkeypatch.setattr(_library, "_triton_operators", {"matching_cost"})
    monkeypatch.setattr(_library, "_has_triton", lambda: True)
    monkeypatch.setattr(_library, "_problems", {"_C_cuda": "no driver"})
    rows = {(row["operator"], row["device"]): row for row in doctor.serving()}
    expected = {
        ("apply_deltas", "cpu"): ("native", "_C has the kernel"),
        ("apply_deltas", "cuda"): ("reference", "no driver"),
        ("dynamic_conv", "cpu"): ("reference", "_C has no kernel of it for cpu tensors"),
        ("matching_cost", "cpu"): ("reference", "_C has no kernel of it for cpu tensors"),
        ("matching_cost", "cuda"): ("triton", "kernels/matching_cost.py"),
        ("set_box_loss", "cpu"): ("reference", "_C has no kernel of it for cpu tensors"),
    }
    assert {key: (rows[key]["implementation"], rows[key]["why"]) for key in expected} == expected


def test_a_worker_that_does_not_answer_is_given_up():
    worker = doctor.Worker()
    try:
        record = worker.run("apply_deltas", "cpu", start=0.0)
    finally:
        worker.stop()
    assert record == {"passed": False, "died": True, "error": "no answer in 0 s"}


def test_the_others_are_tested_when_one_ends_its_process(monkeypatch):
    started = []

    class Fragile(doctor.Worker):
        def __init__(self):
            super().__init__()
            started.append(self)

        def run(self, operator, device_type):
            if operator == "dynamic_conv":
                self._process.kill()
            return super().run(operator, device_type)

    monkeypatch.setattr(doctor, "Worker", Fragile)
    records = doctor.run_self_tests([("dynamic_conv", "cpu"), ("apply_deltas", "cpu"), ("no_such", "cpu")])
    assert records[0] == {"passed": False, "died": True, "error": "its process ended with -9"}
    assert records[1]["passed"] is True
    assert records[2]["passed"] is False and "no_such" in records[2]["error"]
    assert len(started) == 2
    assert not any(worker._process.is_alive() for worker in started)


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@pytest.mark.parametrize("operator", ["apply_deltas", "dynamic_conv", "multiscale_roi_align", "roi_dynamic_conv"])
@pytest.mark.parametrize("broken", ["value", "gradient", "exception"])
def test_self_test_finds_what_is_wrong(monkeypatch, operator, broken):
    right = getattr(ops, f"{operator}_reference")

    def wrong(**inputs):
        if broken == "exception":
            raise RuntimeError("no such kernel")
        result = right(**inputs)
        return HalfGradient.apply(result) if broken == "gradient" else result * 1.1

    monkeypatch.setattr(ops, operator, wrong)
    record = self_test(operator, CPU)
    assert record["passed"] is False and record["problems"] == 1
    if broken == "exception":
        assert record["error"] == "RuntimeError: no such kernel"
    else:
        assert record["share_of_allowed"] > 5
        assert record["tensor"].startswith("gradient" if broken == "gradient" else ("output", "gradient"))


def test_self_test_ends_with_its_time(monkeypatch):
    from sparse_rcnn import self_test as module

    monkeypatch.setattr(module, "SECONDS", 0.0)
    record = module.self_test("apply_deltas", CPU)
    assert record["passed"] and record["problems"] == 1


def test_steady_norms_keep_values_away_from_where_relu_bends():
    generator = torch.Generator().manual_seed(0)
    for size in (16, 64, 256):
        weight, bias = steady_norm(size, generator)
        assert (bias > 0).any() and (bias < 0).any() and (weight > 0).any() and (weight < 0).any()
        assert weight.unique().numel() == size
        x = torch.nn.functional.layer_norm(torch.randn(2000, size, generator=generator), (size,), weight, bias)
        assert x.abs().min() > 0.2


def test_problems_are_awkward_and_their_gradients_are_not_zero():
    for operator in ("multiscale_roi_align", "roi_dynamic_conv"):
        problem = make_problem(operator, 0, torch.float32, CPU)
        boxes = problem.inputs["boxes"]
        sizes = boxes[..., 2:] - boxes[..., :2]
        assert boxes.isnan().any() and (sizes < 0).any() and (boxes > 160).any()
    for operator in _library.operators():
        problem = make_problem(operator, 1, torch.float32, CPU)
        specification = Specification(getattr(ops, f"{operator}_reference"), problem.inputs, problem.wrt, problem.keep)
        assert all(exact.abs().max() > 0 for exact in specification._exact.values())
