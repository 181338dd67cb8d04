"""Building: what the wheel holds, what happens without a compiler or a toolkit, and use from C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from sparse_rcnn import ops
from tests.conftest import ROOT, build_with_cmake

PACKAGE_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything that an earlier build left."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in PACKAGE_FILES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name)
        elif path.exists():
            shutil.copy(path, copy / name)
    shutil.copytree(ROOT / "sparse_rcnn", copy / "sparse_rcnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def _build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "dist"]
    return subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def _only_wheel(source: Path) -> tuple[str, set[str]]:
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


def test_the_wheel_serves_every_python_and_holds_the_cpu_library(source: Path) -> None:
    done = _build(source, SPARSE_RCNN_CUDA="0")
    assert done.returncode == 0, done.stderr
    name, files = _only_wheel(source)
    assert "-py3-none-linux" in name
    assert "sparse_rcnn/_C.so" in files
    assert "sparse_rcnn/ops/apply_deltas.py" in files
    shipped = [f for f in files if f.startswith(("csrc", "tests", "benchmarks", "kernels"))]
    assert not shipped, "sources, tests and the emulator stay out of the wheel"


def test_without_a_compiler_the_package_installs_as_pure_python_and_says_so(source: Path) -> None:
    done = _build(source, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler) found: installing without native kernels" in done.stderr
    name, files = _only_wheel(source)
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if file.endswith(".so")]


def test_a_pure_install_runs_on_the_references(source: Path) -> None:
    program = (
        "import torch; from sparse_rcnn import ops; from sparse_rcnn.ops import _library\n"
        "boxes = ops.apply_deltas(torch.zeros(2, 4), torch.tensor([[0., 0, 4, 2], [1, 1, 3, 5]]))\n"
        "print(boxes.tolist(), _library.serving('apply_deltas', 'cpu'), _library.problems()['_C'])\n"
        "with ops.backend('native'):\n"
        "    ops.apply_deltas(torch.zeros(2, 4), torch.zeros(2, 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[0.0, 0.0, 4.0, 2.0], [1.0, 1.0, 3.0, 5.0]] reference _C.so was not built"
    assert done.stderr.strip().endswith(
        "RuntimeError: apply_deltas: the native backend was asked for and _C.so was not built"
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SPARSE_RCNN_CUDA": "yes"}, "SPARSE_RCNN_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"SPARSE_RCNN_CUDA": "1", "PATH": "", "CUDA_HOME": ""}, "SPARSE_RCNN_CUDA=1: "),
    ],
)
def test_a_build_that_cannot_be_made_stops_with_one_line(
    source: Path, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    if "PATH" in environment:  # a folder with the compiler and without nvcc
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "c++").symlink_to(shutil.which("c++"))
        environment = environment | {"PATH": str(tools)}
        if Path("/usr/local/cuda/bin/nvcc").exists() and torch.version.cuda is not None:
            pytest.skip("a toolkit is in its default place")
    done = _build(source, **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_operator_runs_from_cpp_without_python() -> None:
    build = build_with_cmake("cpp", "run_operator")
    done = subprocess.run(
        [str(build / "run_operator"), str(build / "_C.so")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    deltas = torch.tensor([[0.5, -0.25, 0.1, 0.2], [0.0, 0.0, 20.0, -1.0]])
    boxes = torch.tensor([[10.0, 20.0, 50.0, 100.0], [0.0, 0.0, 8.0, 4.0]])
    printed = torch.tensor([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    wanted = ops.apply_deltas_reference(deltas, boxes, clamp=(None, 8.74))
    torch.testing.assert_close(printed, wanted, rtol=1e-6, atol=1e-6)


def test_a_missing_library_is_named_by_the_cpp_program() -> None:
    build = build_with_cmake("cpp", "run_operator")
    done = subprocess.run([str(build / "run_operator"), "missing.so"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "missing.so" in done.stderr
