"""Detections that a device is still computing, and that the host waits for when it wants them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_rcnn.inference.program import Found

Sizes = tuple[Sequence[int], Sequence[int]]


class Submitted:
    """One or more runs of the program that together serve a batch.

    Attributes:
        seconds: that the device computed; known after :meth:`results`.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self.seconds = 0.0

    def results(self) -> list[dict[str, Tensor]]:
        """A dict an image, on the CPU; see :meth:`OptimizedSparseRCNN.detect`. Waits for them."""
        results = [result for run in self._runs for result in run.results()]
        self.seconds = sum(run.seconds() for run in self._runs)
        return results


class Run:
    """One run of the program: what it found is on its way to the host.

    Args:
        found: what the program returned; its tensors may be written again by what is submitted later.
        count: images, the first ones of ``found``.
        begin: :func:`now` before the run.
        resized: of images that were resized before, the (height, width) that the program was given, and those that the
            boxes shall be in.
    """

    def __init__(
        self, found: Found, count: int, begin: float | torch.cuda.Event, resized: Mapping[int, Sizes] | None = None
    ) -> None:
        device = found.counts.device
        # From a GPU: into page-locked memory, without a wait.
        self._found = Found(*(values.to("cpu", non_blocking=True, copy=True) for values in found))
        self._count, self._resized = count, resized or {}
        self._begin, self._end = begin, now(device)

    def results(self) -> list[dict[str, Tensor]]:
        """The images' detections in tensors of their own."""
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
        counts = self._found.counts.tolist()
        names = ("boxes", "scores", "labels", "proposals")
        results = [
            {name: values[index, : counts[index]].clone() for name, values in zip(names, self._found, strict=False)}
            for index in range(self._count)
        ]
        for index, sizes in self._resized.items():
            results[index]["boxes"] = _scale(results[index]["boxes"], *sizes)
        return results

    def seconds(self) -> float:
        """From begin to end, as the device saw it."""
        if isinstance(self._end, float):
            return self._end - self._begin
        return self._begin.elapsed_time(self._end) / 1e3


def now(device: torch.device) -> float | torch.cuda.Event:
    """This moment: in the current stream of a GPU, or on the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _scale(boxes: Tensor, seen: Sequence[int], given: Sequence[int]) -> Tensor:
    """Boxes [n, 4] from pixels of an image of (height, width) ``seen`` to those of one ``given``, clipped to it."""
    x, y = given[1] / seen[1], given[0] / seen[0]
    return (boxes * boxes.new_tensor([x, y, x, y])).minimum(boxes.new_tensor([given[1], given[0]] * 2))
