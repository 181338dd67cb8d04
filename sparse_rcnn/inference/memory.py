"""What the process does with memory that it no longer needs, and when there is too little."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, as torch's allocator does on a GPU.

    Otherwise glibc hands large blocks back and the kernel clears new pages for the next run: a fifth and more of the
    time of a detector on a CPU. It holds for the whole process, from now on.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has another way
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


def run_in_batches(
    run: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any], most: int, halved: Callable[[int], None]
) -> list[Any]:
    """``run`` on all ``items``, at most ``most`` at a time, and on half as many wherever the memory does not suffice.

    Args:
        halved: told how many at a time it goes on with, after the warning that says so.

    Returns:
        the lists that ``run`` returned as one.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: not even one item fits.
    """
    results: list[Any] = []
    while items:
        count = min(len(items), most)
        try:
            results += run(items[:count])
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if count == 1 or not _is_out_of_memory(error):
                raise
            most = count // 2
        else:
            items = items[count:]
            continue
        # Only here, where the error no longer holds on to the tensors of what failed.
        warnings.warn(f"out of memory with {count} images at a time: going on with {most}", stacklevel=5)
        halved(most)
    return results


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for GPUs only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
