"""What the process does with memory that it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes

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
    give_freed_memory_back()  # what is free until now may lie where nothing fits


def give_freed_memory_back() -> None:
    """Hand what is free now to the system, whatever is kept from now on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
