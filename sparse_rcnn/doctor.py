"""``python -m sparse_rcnn.doctor [--json]``: what is installed, which kernels serve which operator, do they work."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sparse_rcnn
from sparse_rcnn import ops
from sparse_rcnn.ops import _library
from sparse_rcnn.self_test import has_self_test, self_test

LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}
START_SECONDS = 120.0  # to start a process that imports torch, on a busy machine
TEST_SECONDS = 60.0  # without an answer: several times what a self-test allows itself
_LEVELS = {
    "x86-64-v2": "ssse3 sse4_1 sse4_2 popcnt cx16",
    "x86-64-v3": "avx avx2 fma f16c bmi1 bmi2 movbe",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}
_EXTRAS = ("avx512_bf16", "avx512_fp16", "amx_bf16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 when a self-test failed."""
    parser = argparse.ArgumentParser(
        prog="sparse_rcnn.doctor", description="Versions, native libraries, and a self-test of every operator."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else "\n".join(as_text(report)))
    return int(not report["passed"])


def examine() -> dict[str, Any]:
    """The whole report; runs the self-tests."""
    rows = serving()
    tested = [row for row in rows if has_self_test(row["operator"]) and _present(row["device"])]
    results = run_self_tests([(row["operator"], row["device"]) for row in tested])
    for row in rows:
        row["self_test"] = None
    for row, result in zip(tested, results, strict=True):
        row["self_test"] = result
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": {**processor(), "threads": torch.get_num_threads()},
        "gpus": gpus(),
        "libraries": libraries(),
        "backend": _library.active_backend(),
        "operators": rows,
        "passed": all(result["passed"] for result in results),
    }


def versions() -> dict[str, str | None]:
    """Of what the operators stand on; None is not installed, or not there."""
    return {
        "sparse_rcnn": sparse_rcnn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("torchvision", "triton", "numpy", "scipy")},
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def processor() -> dict[str, Any]:
    """Name and instruction set levels of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set((re.findall(r"^flags\s*:\s*(.+)$", text, re.MULTILINE) or [""])[0].split())
    levels = [level for level, needed in _LEVELS.items() if set(needed.split()) <= flags]
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "isa": levels + [extra for extra in _EXTRAS if extra in flags],
    }


def gpus() -> list[dict[str, Any]]:
    """The CUDA devices that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    return found


def libraries() -> dict[str, dict[str, Any]]:
    """For each native library: its file, why it is not loaded, and what it was built for or uses here."""
    loaded = {Path(path).stem: path for path in torch.ops.loaded_libraries}
    problems = _library.problems()
    report: dict[str, dict[str, Any]] = {}
    for name in LIBRARIES.values():
        report[name] = {"file": loaded.get(name), "problem": problems.get(name)}
        if name in loaded and name not in problems:
            about = "cpu_capability" if name == "_C" else "cuda_architectures"
            report[name][about] = getattr(torch.ops.sparse_rcnn, about)()
    return report


def serving() -> list[dict[str, Any]]:
    """One row an operator and device type: which implementation serves it there, and why."""
    native = _library.operators()
    others = sorted({name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")})
    rows = []
    for operator in sorted({*native, *others}):
        for device_type, library in LIBRARIES.items():
            implementation = _library.serving(operator, device_type) if operator in native else _library.REFERENCE
            if implementation == _library.TRITON:
                why = f"kernels/{operator}.py"
            elif implementation != _library.REFERENCE:
                why = f"{library} has the kernel"
            elif operator not in native:
                why = "it has no kernels"
            elif _library.is_reference():
                why = "SPARSE_RCNN_BACKEND asks for it"
            else:
                why = _library.why_not(operator, device_type)
            rows.append({"operator": operator, "device": device_type, "implementation": implementation, "why": why})
    return rows


def run_self_tests(jobs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The record of each (operator, device type), made in another process: a kernel may break or hang it."""
    results, worker = [], None
    for operator, device_type in jobs:
        worker = worker or Worker()
        results.append(worker.run(operator, device_type))
        if "died" in results[-1]:
            worker = worker.stop()
    if worker is not None:
        worker.stop()
    return results


class Worker:
    """A process that runs self-tests one after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process ends the connection

    def run(self, operator: str, device_type: str, start: float = START_SECONDS, test: float = TEST_SECONDS) -> dict:
        """The record of one self-test; it has ``died`` when the process is of no more use."""
        try:
            self._connection.send((operator, device_type))
            for seconds in (start, test):  # one message that it begins, one with the record
                if not self._connection.poll(seconds):
                    return {"passed": False, "died": True, "error": f"no answer in {seconds:.0f} s"}
                message = self._connection.recv()
            return message
        except (EOFError, OSError):
            self._process.join(10)
            return {"passed": False, "died": True, "error": f"its process ended with {self._process.exitcode}"}

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(connection: Any) -> None:
    while True:
        try:
            operator, device_type = connection.recv()
        except EOFError:
            return
        connection.send("begun")
        try:
            record = self_test(operator, torch.device(device_type))
        except Exception as error:  # the report says so
            record = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        connection.send(record)


def as_text(report: dict[str, Any]) -> list[str]:
    """The report as lines, the worst news last."""
    found, cpu = report["versions"], report["processor"]
    packages = [f"{name} {found[name]}" for name in ("sparse_rcnn", "python", "torch", "torchvision", "triton")]
    cuda = f"CUDA {found['cuda']}" if found["cuda"] else "a build without CUDA"
    lines = [
        f"versions   {', '.join(packages)}; torch is {cuda}, driver {found['driver'] or 'none'}",
        f"platform   {report['platform']}",
        f"processor  {cpu['name']}, {cpu['threads']} threads, {' '.join(cpu['isa']) or cpu['machine']}",
    ]
    for gpu in report["gpus"] or [None]:
        text = f"{gpu['name']}, {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else "none"
        lines.append(f"GPU        {text}")
    for name, library in report["libraries"].items():
        about = library.get("cpu_capability") or library.get("cuda_architectures")
        state = library["problem"] or f"{library['file']} ({about})"
        lines.append(f"library    {name}: {state}")
    lines += [f"backend    {report['backend']}", ""]
    lines.append(f"{'operator':22s}{'device':8s}{'served by':11s}{'self-test':11s}why, and how well")
    untested = sorted({row["operator"] for row in report["operators"] if not has_self_test(row["operator"])})
    for row in report["operators"]:
        if row["operator"] not in untested:
            verdict, detail = _verdict(row["self_test"])
            detail = f"{row['why']}; {detail}" if detail else row["why"]
            served = f"{row['implementation']:11s}{verdict:11s}"
            lines.append(f"{row['operator']:22s}{row['device']:8s}{served}{detail}")
    lines.append("")
    if untested:
        lines.append(f"in plain PyTorch everywhere: {', '.join(untested)}")
    failed = [row for row in report["operators"] if row["self_test"] and not row["self_test"]["passed"]]
    lines.append(f"{len(failed)} self-tests FAILED" if failed else "all self-tests passed")
    return lines


def _verdict(test: dict[str, Any] | None) -> tuple[str, str]:
    if test is None:
        return "no device", ""
    if "error" in test:
        return "FAILED", test["error"]
    share = "exact"
    if test["tensor"] is not None:
        share = f"{test['share_of_allowed']:.2f} of the allowed error ({test['tensor']}, {test['dtype']})"
    return "ok" if test["passed"] else "FAILED", f"{test['problems']} problems in {test['seconds']:.1f} s, {share}"


def _present(device_type: str) -> bool:
    return device_type == "cpu" or torch.cuda.is_available()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


if __name__ == "__main__":
    sys.exit(main())
