"""Programs captured for fixed shapes: one CUDA graph for each (batch, height, width), few of them, made on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_rcnn.inference.program import Found

# The test sizes of the paper's models (800 to 1333 pixels, either way up) are 36 shapes.
MAX_BUCKETS = 48


class Key(NamedTuple):
    """Shape of a padded batch."""

    batch: int
    height: int
    width: int

    @property
    def capacity(self) -> int:
        """Bytes of a place for one image: of four times the pixels that the network sees. Larger ones are resized
        before."""
        return 4 * 3 * self.height * self.width


class Inputs(NamedTuple):
    """The tensors that a captured program reads; see :class:`~sparse_rcnn.inference.program.Program`."""

    images: list[Tensor]  # B of uint8 [capacity]
    sizes: Tensor  # [B, 4] int64

    @classmethod
    def blank(cls, key: Key, device: torch.device) -> Inputs:
        """Places for ``key.batch`` images, of which none is there."""
        buffers = torch.zeros(key.batch, key.capacity, dtype=torch.uint8, device=device)
        return cls(list(buffers), torch.zeros(key.batch, 4, dtype=torch.int64, device=device))

    def fill(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int, int, int]]) -> None:
        """Write images [3, h, w], which are on the same device, into the first places; the others are empty."""
        rows = torch.zeros(self.sizes.shape, dtype=torch.int64)
        rows[: len(sizes)] = torch.tensor(sizes)
        for buffer, image in zip(self.images, images, strict=False):
            pixels = image.permute(1, 2, 0).reshape(-1)
            buffer[: pixels.numel()].copy_(pixels)
        # From page-locked memory it can be copied without a wait.
        self.sizes.copy_(rows.pin_memory() if self.sizes.is_cuda else rows, non_blocking=True)


@dataclass
class Captured:
    """A call of the program, bound to its tensors: ``replay()`` makes ``outputs`` of what ``inputs`` hold."""

    inputs: Inputs
    outputs: Found
    replay: Callable[[], Any]

    @property
    def capacity(self) -> int:
        """Bytes that an image may have."""
        return self.inputs.images[0].numel()


Capture = Callable[[Callable[[], Found], Inputs], Captured]


class Buckets:
    """The captured programs.

    Args:
        program: as :class:`~sparse_rcnn.inference.program.Program`.
        capture: makes something to be replayed of a call of it.
        device: of the inputs.
        batch_size: largest batch; captured are powers of two and this.
        limit: programs at most. Further shapes are left to the caller.
    """

    def __init__(
        self,
        program: Callable[..., Found],
        capture: Capture,
        device: torch.device,
        batch_size: int,
        limit: int = MAX_BUCKETS,
    ) -> None:
        self.program, self.capture, self.device = program, capture, device
        self.batch_size, self.limit = batch_size, limit
        self.replays: dict[Key, int] = {}  # of each program, in the order of their making
        self.uncaptured = 0  # batches that no program took
        self._programs: dict[Key, Captured] = {}

    def key(self, images: int, height: int, width: int) -> Key:
        """The shape that a batch runs in: filled up to a power of two, so that remainders need few programs."""
        return Key(min(1 << (images - 1).bit_length(), self.batch_size), height, width)

    def find(self, images: int, height: int, width: int) -> Captured | None:
        """The program for so many images padded to this size, captured now if there is none; None beyond the limit, or
        for more images than ``batch_size``."""
        key = self.key(images, height, width)
        if key not in self._programs:
            if images > self.batch_size or len(self._programs) >= self.limit:
                self.uncaptured += 1
                return None
            inputs = Inputs.blank(key, self.device)
            self._programs[key] = self.capture(lambda: self.program(*inputs, (height, width)), inputs)
            self.replays[key] = 0
        self.replays[key] += 1
        return self._programs[key]

    def clear(self) -> None:
        """Give the memory of all programs back."""
        self._programs.clear()
        self.replays.clear()


class GraphCapture:
    """Captures CUDA graphs that share one pool of memory: they run one after the other."""

    WARM_UPS = 3  # calls before the capture: plans, workspaces and lazily loaded kernels cannot be made inside

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Found], inputs: Inputs) -> Captured:
        """Capture ``run()``, which reads ``inputs``."""
        stream = torch.cuda.Stream(inputs.sizes.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        return Captured(inputs, outputs, graph.replay)
