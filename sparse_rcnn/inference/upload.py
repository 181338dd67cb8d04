"""Images on their way to the GPU while it computes those before them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ALIGNMENT = 256  # bytes; of the first pixel of each image


class Uploads:
    """Copies of batches of images on a GPU, made from page-locked memory by a stream of their own.

    There are two places, each of memory on the host and on the GPU, used in turn: one is filled while the other is
    read. The host waits only for a place whose copy, of two batches before, is not over.

    Args:
        device: the GPU. On a CPU, which has no streams, all of it happens at once (for tests).
    """

    def __init__(self, device: torch.device) -> None:
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream()
        self._places = [_Place(device, self._module) for _ in range(2)]

    @contextlib.contextmanager
    def __call__(self, images: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Copy uint8 images [3, h, w]: gives the same on the GPU, for what the block puts into the current stream.

        Those that are there already are given as they are.
        """
        place = self._places[0]
        self._places.reverse()
        place.uploaded.synchronize()
        starts, end = [], 0
        for image in images:
            starts.append(end)
            end += 0 if image.is_cuda else -(-image.numel() // _ALIGNMENT) * _ALIGNMENT
        place.reserve(end, self._stream)
        for image, start in zip(images, starts, strict=True):
            if not image.is_cuda:
                _rows(place.host, start, image).copy_(image.permute(1, 2, 0))
        with self._module.stream(self._stream):
            self._stream.wait_event(place.released)
            place.device[:end].copy_(place.host[:end], non_blocking=True)
            place.uploaded.record(self._stream)
        self._module.current_stream().wait_event(place.uploaded)
        try:
            yield [
                image if image.is_cuda else _rows(place.device, start, image).permute(2, 0, 1)
                for image, start in zip(images, starts, strict=True)
            ]
        finally:
            place.released.record(self._module.current_stream())


class _Place:
    """Memory for one batch on both sides, and when it may be written to again."""

    def __init__(self, device: torch.device, module: object) -> None:
        self._device, self._module = device, module
        self.uploaded, self.released = module.Event(), module.Event()
        self.host = torch.empty(0, dtype=torch.uint8)
        self.device = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, size: int, stream: object) -> None:
        """Have room for so many bytes."""
        if size <= self.host.numel():
            return
        self.released.synchronize()  # nobody reads what goes now
        size = 1 << (size - 1).bit_length()  # few sizes: page-locked memory is slow to get
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        with self._module.stream(stream):  # memory that only this stream's order protects is written by this stream
            self.device = torch.empty(size, dtype=torch.uint8, device=self._device)


def _rows(memory: Tensor, start: int, image: Tensor) -> Tensor:
    """The part of ``memory`` from ``start`` on that holds ``image`` [3, h, w], as [h, w, 3]."""
    channels, height, width = image.shape
    return memory[start : start + image.numel()].view(height, width, channels)
