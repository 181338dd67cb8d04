"""Build the native libraries; everything else about the package is declared in pyproject.toml.

Two libraries without a Python module in them, loaded by ``sparse_rcnn.ops``: ``_C.so`` with the schemas and the CPU
kernels, and ``_C_cuda.so`` with the CUDA kernels. Both use LibTorch's stable ABI only, so one wheel serves every
Python and every torch from 2.11 on.

Environment:
    SPARSE_RCNN_CUDA: ``auto`` (default) builds the CUDA kernels when PyTorch is a CUDA build, a toolkit is found and a
        GPU is present; ``1`` builds them or fails; ``0`` does not.
    TORCH_CUDA_ARCH_LIST: the architectures, default ``8.0;8.6;8.9;9.0a;10.0;12.0+PTX``.

Without PyTorch in the build environment or without a C++ compiler, the package installs as pure Python and says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
# The oldest LibTorch whose stable ABI the libraries may use: 2.11.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ["-O3", "-std=c++20", TARGET_VERSION]


def main() -> None:
    """Build what this machine can and hand it to setuptools."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    try:
        import torch  # noqa: F401
    except ImportError:
        _say("PyTorch is not in the build environment: installing without native kernels (pure PyTorch)")
        return setup()
    if shutil.which(compiler) is None:
        _say(f"no C++ compiler ({compiler}) found: installing without native kernels (pure PyTorch)")
        return setup()
    toolkit = _cuda_toolkit()
    if toolkit is not None:  # before torch.utils.cpp_extension looks for one itself
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import CppExtension

    extensions = [CppExtension("sparse_rcnn._C", _sources("schemas.cpp", "cpu/"), **_options("torch_cpu"))]
    if toolkit is not None:
        options = _options("torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread")
        options["extra_compile_args"]["cxx"].append("-DUSE_CUDA")
        options["extra_compile_args"]["nvcc"] = [*CXX_FLAGS, "-DUSE_CUDA", "--threads=0", "-lineinfo"]
        options["include_dirs"].append(str(toolkit / "include"))
        options["library_dirs"] = [str(toolkit / "lib64")]
        extensions.append(CppExtension("sparse_rcnn._C_cuda", _sources("cuda/"), **options))
    return setup(ext_modules=extensions, cmdclass=_commands())


def _sources(*prefixes: str) -> list[str]:
    """The lines of csrc/sources.txt that start with one of the prefixes, relative to the repository."""
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    return [f"csrc/{line}" for line in lines if line.startswith(prefixes)]


def _options(*libraries: str) -> dict:
    return {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": {"cxx": [*CXX_FLAGS, "-fvisibility=hidden", "-g0"]},
        "libraries": list(libraries),
        "py_limited_api": True,
    }


def _cuda_toolkit() -> Path | None:
    """Where the CUDA toolkit is, or None when the CUDA kernels are not to be built."""
    wanted = os.environ.get("SPARSE_RCNN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"SPARSE_RCNN_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    import torch

    toolkit = _find_toolkit()
    problem = None
    if torch.version.cuda is None:
        problem = "this PyTorch is built without CUDA"
    elif toolkit is None:
        problem = "no CUDA toolkit found (nvcc on PATH, CUDA_HOME)"
    elif wanted == "auto" and not torch.cuda.is_available():
        problem = "no GPU is present (SPARSE_RCNN_CUDA=1 builds them all the same)"
    if problem is None:
        return toolkit
    if wanted == "1":
        sys.exit(f"SPARSE_RCNN_CUDA=1: {problem}")
    _say(f"building without CUDA kernels: {problem}")
    return None


def _find_toolkit() -> Path | None:
    """The toolkit's root, from CUDA_HOME or from nvcc's own word: nvcc on PATH may be a wrapper outside of it."""
    for candidate in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            return Path(candidate)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda")
        return default if (default / "bin" / "nvcc").exists() else None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def _commands() -> dict:
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        """Shared libraries for torch.ops.load_library: no Python in their names, no PyInit symbol."""

        def get_ext_filename(self, fullname: str) -> str:
            return fullname.replace(".", os.sep) + ".so"

        def get_export_symbols(self, ext: object) -> list[str]:
            return []

    class Wheel(bdist_wheel):
        """One wheel for every Python: the libraries do not link against it."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"build_ext": BuildLibraries.with_options(use_ninja=shutil.which("ninja") is not None), "bdist_wheel": Wheel}


def _say(message: str) -> None:
    print(f"sparse_rcnn: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
