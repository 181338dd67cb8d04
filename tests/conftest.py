"""What several suites share: the build of the CUDA kernels that runs on the CPU."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Before anything imports triton, whose functions become interpreted ones when they are defined. With a GPU they are
# compiled, and tests/gpu runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-build", action="store_true", help="compile the CUDA sources for every architecture")


def build_with_cmake(folder: str, target: str, *options: str) -> Path:
    """Build one target of CMakeLists.txt under build/, incrementally; the folder it was built in.

    One process after the other: all that run the tests want it at once.
    """
    build = ROOT / "build" / folder
    tool = [sys.executable, "-m", "cmake"]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    configure = [*tool, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", python, *options]
    build.mkdir(parents=True, exist_ok=True)
    with open(build / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [*tool, "--build", str(build), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return build


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The CUDA kernels built for the CPU: their controls, and the operators as the backend ``emulated``."""
    from sparse_rcnn.ops import _library

    if not (ROOT / "CMakeLists.txt").exists():  # test-compat tests a wheel; a checkout always has them
        pytest.skip("an installed package has no sources to build")
    name = "_emulator"
    # A sanitizer build has its emulated kernels beside its other libraries.
    sanitized = os.environ.get("SPARSE_RCNN_LIBRARIES")
    build = Path(sanitized) if sanitized else build_with_cmake("emulated", name, "-DSPARSE_RCNN_EMULATED=ON")
    spec = importlib.util.spec_from_file_location(name, next(build.glob(f"{name}.*so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _library.add_backend("emulated", "sparse_rcnn_emulated")
    return module
