"""Decoded images, kept in memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import accumulate, takewhile

import numpy as np


class PixelCache:
    """Decoded images in one piece of memory that loader processes forked later share.

    The first images of the data set that fit have a place of their own and stay; the others are decoded every time.
    Nothing is ever evicted: where every image is read once an epoch, in an order drawn anew, that finds more than
    throwing out the least recently used would. A page takes memory from when an image is written to it. Two processes
    may write an image at the same time; both write the same bytes. In processes that are not forked but spawned the
    cache is empty and stays so.

    Args:
        sizes: (height, width) of each image.
        limit: bytes; 0 keeps nothing.

    Raises:
        ValueError: the limit is negative, or the system does not give as much memory.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], limit: int) -> None:
        if limit < 0:
            raise ValueError(f"cache_mb: expected at least 0, got {limit / 10**6:g}")
        ends = accumulate(height * width * 3 for height, width in sizes)
        self._ends = list(takewhile(lambda end: end <= limit, ends))
        self.limit, self._sizes = limit, list(sizes[: len(self._ends)])
        self._pixels = self._filled = None
        if self._ends:
            try:
                self._pixels, self._filled = mmap.mmap(-1, self._ends[-1]), mmap.mmap(-1, len(self._ends))
            except OSError as error:
                needed = f"{self._ends[-1] / 10**6:.0f} MB"
                raise ValueError(f"cache_mb: {needed} cannot be had: {error.strerror}") from None

    def get(self, index: int) -> np.ndarray | None:
        """A copy of image ``index``, uint8 [H, W, 3], or None if it is not here."""
        if index >= len(self._sizes) or not self._filled[index]:
            return None
        return self._place(index).copy()

    def put(self, index: int, pixels: np.ndarray) -> None:
        """Keep an image, uint8 [H, W, 3] of the size that was announced, if it has a place."""
        if index < len(self._sizes):
            self._place(index)[:] = pixels
            self._filled[index] = 1  # after the pixels: who sees the mark may read them

    def _place(self, index: int) -> np.ndarray:
        height, width = self._sizes[index]
        size = height * width * 3
        flat = np.frombuffer(self._pixels, dtype=np.uint8, count=size, offset=self._ends[index] - size)
        return flat.reshape(height, width, 3)

    def __reduce__(self) -> tuple:
        return PixelCache, ((), 0)
