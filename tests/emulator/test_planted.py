"""A kernel with one mistake (csrc/testing/planted.cu) does not pass on the emulator; the same without it does."""

import subprocess
import sys

import pytest
import torch

# What becomes of the mistake: other values than the right kernel's, or an error in these words.
WRONG_VALUES = [
    "barrier_between_write_and_read",
    "barrier_before_reuse",
    "barrier_in_warp",
    "barrier_of_block_not_warp",
    "all_elements_written",
    "copy_waited_for",
    "copy_committed",
    "copy_waited_for_before_barrier",
]
REPORTED = {
    "dynamic_write_in_bounds": r"written outside dynamic shared memory \(512 bytes\): 0 bytes after its end",
    "static_write_in_bounds": r"written outside the array 'row' \(512 bytes\): 0 bytes after its end",
    "barrier_reached_by_all": r"28 of 128 threads have returned, 100 wait in __syncthreads at .*planted\.cu",
    "barrier_the_same_for_all": r"divergent barrier: it is in __syncthreads at .*planted\.cu",
    "shuffle_reached_by_all": r"not all threads reach a barrier: .*31 of warp 0 wait in __shfl_sync",
    "shared_address_aligned": "not a multiple of 16",
}
OUT_OF_BOUNDS = ["dynamic_write_in_bounds", "static_write_in_bounds"]
# What a build that looks for races reports of the first list; the second shows there only.
RACES = {
    "barrier_between_write_and_read": "shared",
    "barrier_before_reuse": "shared",
    "barrier_in_warp": "shared",
    "barrier_of_block_not_warp": "shared",
    "copy_waited_for_before_barrier": "shared",
    "additions_are_atomic": "global",
    "a_cell_has_one_block": "global",
}


@pytest.fixture(params=[1, 4], ids=["1 block", "4 blocks"])
def x(request):
    # Distinct, and exact under the kernels' arithmetic.
    return torch.arange(1.0, 1 + request.param * 128).reshape(request.param, 128)


def wanted(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.roll(-1, dims=1)


def planted(name: str, right: bool, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.sparse_rcnn_emulated.planted(name, right, x)


@pytest.fixture(autouse=True)
def defaults(emulator):
    yield
    emulator.set_seed(0)
    emulator.set_poison(0xFF)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", [*WRONG_VALUES, *REPORTED, "additions_are_atomic", "a_cell_has_one_block"])
def test_right_kernels_pass(emulator, x, name, seed):
    emulator.set_seed(seed)
    for poison in (0xFF, 0x7F, None):
        emulator.set_poison(poison)
        torch.testing.assert_close(planted(name, True, x), wanted(x), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_mistakes_give_wrong_values(emulator, x, name, seed):
    if emulator.races and name in RACES:
        pytest.skip("reported as a race: test_races_are_reported")
    emulator.set_seed(seed)
    assert not torch.equal(planted(name, False, x), wanted(x))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", REPORTED)
def test_mistakes_are_reported(emulator, x, name, seed):
    if emulator.address_sanitizer and name in OUT_OF_BOUNDS:
        pytest.skip("stops the process: test_sanitizers_stop_at_writes_out_of_bounds")
    emulator.set_seed(seed)
    with pytest.raises(RuntimeError, match=rf"emulated kernel, block \(\d, 0, 0\): .*{REPORTED[name]}"):
        planted(name, False, x)
    # And no trace of it is left.
    torch.testing.assert_close(planted(name, True, x), wanted(x), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", RACES)
def test_races_are_reported(emulator, name, seed):
    if not emulator.races:
        pytest.skip("this build does not look for them")  # that of make test-sanitize does
    emulator.set_seed(seed)
    x = torch.arange(4 * 128.0).reshape(4, 128)
    line = r"\S*planted\.cu:\d+"
    access = r"(reads|writes|updates atomically)"
    report = rf"race: it {access} {RACES[name]} memory at .*{line}, which thread \d+.* {access} at .*{line}"
    with pytest.raises(RuntimeError, match=report):
        planted(name, False, x)
    torch.testing.assert_close(planted(name, True, x), wanted(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_sanitizers_stop_at_writes_out_of_bounds(emulator, name):
    if not emulator.address_sanitizer:
        pytest.skip("this build is without them")  # that of make test-sanitize has them
    code = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('_emulator', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        f"torch.ops.sparse_rcnn_emulated.planted('{name}', False, torch.zeros(1, 128))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, emulator.__file__], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "planted.cu" in done.stderr
    assert "use-after-poison" in done.stderr or "index 128 out of bounds" in done.stderr
