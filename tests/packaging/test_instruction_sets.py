"""Code for AVX is in the kernels of a level of csrc/cpu/isa.h and nowhere else.

A function that several sources share, an inline one or a template of the standard library, is compiled in each of them,
and the linker keeps one copy for all. Were that one compiled under a kernel's ``#pragma GCC target``, the library would
end with an illegal instruction on processors without AVX.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sparse_rcnn

LIBRARY = Path(sparse_rcnn.__file__).parent / "_C.so"
LEVELS = {"4avx2", "6avx512", "11avx512_bf16"}  # as mangled names have these namespaces
BMI2 = {"andn", "bextr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx"}

FUNCTION = re.compile(r"[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"\s+[0-9a-f]+:\s+(?:\{\w+\}\s+)?(\w+)")
VEX = re.compile(r"v[a-z]|k(add|and|mov|n?or|test|not|shift|unpck|xn?or)[a-z]*$")

PLANTED = """
#pragma GCC push_options
#pragma GCC target("avx2")
inline float half(float a) { return a / 2; }
namespace avx2 { float wide(float a) { return half(a); } }
#pragma GCC pop_options
float narrow(float a) { return half(a) + 1; }
"""


def _functions_with_avx(library: Path) -> set[str]:
    """The mangled names of the functions that have an instruction of AVX, AVX-512 or BMI2."""
    if platform.machine() != "x86_64":
        pytest.skip("not an x86-64 processor")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, function = set(), ""
    for line in done.stdout.splitlines():
        if start := FUNCTION.match(line):
            function = start[1]
        elif (code := INSTRUCTION.match(line)) and (VEX.match(code[1]) or code[1] in BMI2):
            found.add(function)
    return found


def _of_no_level(functions: set[str]) -> set[str]:
    return {name for name in functions if not any(level in name for level in LEVELS)}


@pytest.mark.skipif(not LIBRARY.exists(), reason="_C.so was not built")
def test_only_the_kernels_of_a_level_have_avx() -> None:
    functions = _functions_with_avx(LIBRARY)
    if not functions:
        pytest.skip("_C.so was built for the baseline alone")
    assert all(any(level in name for name in functions) for level in LEVELS)
    assert not _of_no_level(functions)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++)")
def test_a_shared_function_with_avx_is_found(tmp_path: Path) -> None:
    source, library = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(PLANTED)
    subprocess.run(["g++", "-O0", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    functions = _functions_with_avx(library)
    assert functions == {"_ZN4avx24wideEf", "_Z4halff"}
    assert _of_no_level(functions) == {"_Z4halff"}
