"""Training steps replayed from CUDA graphs, one for each shape of batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.step import TrainStep
from sparse_rcnn.losses import PackedTargets
from sparse_rcnn.losses.denoising import NoisyProposals
from sparse_rcnn.models.batch import SIZE_MULTIPLE, Batch, PaddedShape, round_up
from sparse_rcnn.ops import _library

# Lengths that a padded side can have. Fewer make fewer graphs and more padding: of images of at most 1333 pixels, 16
# are the multiples of 96, which pad a side by 48 pixels on average.
SIDES = 16
MIN_BOXES = 32
# A graph holds its launches and its input, some hundred megabytes for 16 large images; the work memory is shared.
MAX_GRAPHS = 32
# Of each shape before its capture, in which nothing may be compiled, tuned or made for good.
WARM_UP_STEPS = 2
# Of the operators of a training step, those whose reference waits for the device or copies from the host.
_NEEDS_KERNEL = ("apply_deltas", "linear_assignment", "multiscale_roi_align", "roi_dynamic_conv")


class ShapeBuckets:
    """The few shapes that all batches of a run are padded to.

    The network sees the padding, as it does that to a multiple of 32: a step on a larger pad is a slightly different
    one. A batch's shape depends on the batch alone, so that a run does not depend on what happens to be captured.

    Args:
        max_size: the longest side of an image, pixels. Longer ones get buckets too.
    """

    def __init__(self, max_size: int) -> None:
        self.limit = round_up(max_size, SIZE_MULTIPLE)
        self.unit = round_up(-(-self.limit // SIDES), SIZE_MULTIPLE)

    def shape(self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> PaddedShape:
        """What to pad a batch to; images CHW, targets with ``boxes`` [M_i, 4]."""
        height, width = (self._side(max(image.shape[axis] for image in images)) for axis in (1, 2))
        boxes = max(len(target["boxes"]) for target in targets)
        # Powers of two: a column of padding costs next to nothing.
        return PaddedShape(height, width, max(MIN_BOXES, 1 << (boxes - 1).bit_length()))

    def _side(self, size: int) -> int:
        side = round_up(size, self.unit)
        return min(side, self.limit) if size <= self.limit else side


class Capture(Protocol):
    """How a function of no arguments is made into one that does its work again on the same tensors."""

    def run(self, function: Callable[[], Any]) -> None:
        """Run the function, so that it can be captured afterwards."""

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Record what the function does, without doing it."""


@dataclass
class _Captured:
    inputs: Batch
    replay: Callable[[], Any]


class GraphedStep:
    """A :class:`TrainStep` that is captured for each shape of batch and replayed.

    The first batches of a shape are run as they come, then the step is captured; when there are ``max_graphs``, other
    shapes stay without. Every one of these is a training step, and gives what the plain step gives on the same batch.

    Args:
        step: the plain step.
        capture: makes the graphs.
        say: is told, once, that some shapes go without a graph.
        max_graphs: most graphs to hold.
    """

    def __init__(
        self, step: TrainStep, capture: Capture, say: Callable[[str], Any], max_graphs: int = MAX_GRAPHS
    ) -> None:
        self.step = step
        self._capture, self._say, self._max_graphs = capture, say, max_graphs
        self._runs: Counter[tuple] = Counter()  # of each shape without a graph
        self._graphs: dict[tuple, _Captured] = {}
        self._told = False

    def __call__(self, batch: Batch) -> None:
        """Queue one step on ``batch``, in pinned memory or on the device; see :meth:`TrainStep.__call__`."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in batch.tensors())
        if key not in self._graphs and not self._capture_now(key):
            self._runs[key] += 1
            self._capture.run(lambda: self.step(batch.to(self.step.device)))
            return
        if key not in self._graphs:
            self._graphs[key] = self._captured(batch)
        graph = self._graphs[key]
        for static, tensor in zip(graph.inputs.tensors(), batch.tensors(), strict=True):
            static.copy_(tensor, non_blocking=True)
        graph.replay()
        self.step.count_update()

    def _capture_now(self, key: tuple) -> bool:
        if self._runs[key] < WARM_UP_STEPS:
            return False
        full = len(self._graphs) == self._max_graphs
        if full and not self._told:
            self._say(f"cuda_graph: {self._max_graphs} shapes of batch have a graph, the others run without")
            self._told = True
        return not full

    def _captured(self, batch: Batch) -> _Captured:
        """A graph for the shape of ``batch``, which it does not read."""
        static = [torch.empty_like(tensor, device=self.step.device) for tensor in batch.tensors()]
        pixels, sizes, labels, boxes, counts, *noisy = static
        targets = PackedTargets(labels, boxes, counts)
        inputs = Batch(pixels, sizes, targets, NoisyProposals(*noisy) if noisy else None)
        groups = self.step.optimizer.param_groups
        for group in groups:  # what torch wants to see set, and warns of outside of a capture; the kernels are the same
            group["capturable"] = True
        try:
            return _Captured(inputs, self._capture.capture(lambda: self.step(inputs)))
        except RuntimeError as error:
            raise RuntimeError(f"cuda_graph: the step cannot be captured: {error}") from error
        finally:
            for group in groups:
                group["capturable"] = False


def refusal(device: torch.device) -> str | None:
    """Why the training step cannot be captured on ``device``, in words."""
    if device.type != "cuda":
        return f"expected a CUDA device, got {device}"
    if distributed.world_size() > 1:
        return f"expected one process, got {distributed.world_size()}"
    for name in _NEEDS_KERNEL:
        if _library.serving(name, device.type) == _library.REFERENCE:
            return f"{name} waits for the device without its kernel, and {_library.why_not(name, device.type)}"
    return None
