"""The CUDA kernels compile for every architecture, spill nothing and keep the budgets that their headers state."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

CSRC = ROOT / "csrc"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
CUDA_SOURCES = [line for line in (CSRC / "sources.txt").read_text().splitlines() if line.startswith("cuda/")]
MAX_SHARED_BYTES = 99 * 1024  # what a block may have on sm_86, sm_89 and sm_120

BUDGET = re.compile(r"// budget: (\w+): (\d+) registers, (\d+) bytes shared, (\d+) threads")
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\w+)'"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


def _budgets() -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted((CSRC / "cuda").glob("*.cu*")):
        for name, *numbers in BUDGET.findall(path.read_text()):
            found[name] = tuple(int(number) for number in numbers)
    return found


def _compile(source: str, output: Path) -> str:
    torch_root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    command = ["nvcc", "-c", str(CSRC / source), "-o", str(output), "-std=c++20", "-O3", "-DUSE_CUDA", "-Xptxas", "-v"]
    command += [f"-I{CSRC}", f"-I{torch_root / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"--threads={min(os.cpu_count() or 1, 8)}"]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-gencode", f"arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA toolkit (nvcc) on this machine")
@pytest.mark.parametrize("source", CUDA_SOURCES)
def test_kernels_compile_without_spills_and_within_their_budgets(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--cuda-build"):
        pytest.skip("takes minutes: make test-cuda-build")
    budgets = _budgets()
    architectures: dict[str, set[str]] = {}
    for mangled, architecture, stack, stores, loads, registers, static_shared in _entries(source, tmp_path):
        # The longest name: those of two kernels can start alike.
        names = [name for name in budgets if f"{len(name)}{name}" in mangled]
        assert names, f"{mangled}: no budget in csrc/cuda"
        budget = budgets[max(names, key=len)]
        where = f"{mangled} on {architecture}"
        assert (stack, stores, loads) == (0, 0, 0), f"{where}: {stack} bytes stack, {stores} and {loads} bytes spilled"
        assert registers <= budget[0], f"{where}: {registers} registers, budget {budget[0]}"
        assert static_shared <= budget[1], f"{where}: {static_shared} bytes of static shared memory"
        architectures.setdefault(mangled, set()).add(architecture)
    wanted = {f"sm_{architecture}" for architecture in ARCHITECTURES}
    assert all(compiled == wanted for compiled in architectures.values()), architectures
    assert architectures or "__global__" not in (CSRC / source).read_text()


def _entries(source: str, folder: Path) -> list[tuple]:
    """(mangled name, architecture, stack, spill stores, spill loads, registers, static shared bytes) of each kernel."""
    report = _compile(source, folder / "kernels.o")
    entries = ENTRY.findall(report)
    assert len(entries) == report.count("Compiling entry function"), report
    return [(name, architecture, *(int(number or 0) for number in rest)) for name, architecture, *rest in entries]


def test_every_budget_fits_every_architecture() -> None:
    budgets = _budgets()
    assert budgets, "no kernel states a budget"
    for name, (registers, shared, threads) in budgets.items():
        assert shared <= MAX_SHARED_BYTES, name
        assert registers <= 255 and registers * threads <= 65536, name
