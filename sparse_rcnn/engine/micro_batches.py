"""A step's images divided among processes and micro-batches, so that the step is that of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.engine import distributed
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.models.batch import SIZE_MULTIPLE, Batch, PaddedShape, round_up


def prepare_step(
    model: SparseRCNN,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Any]],
    accumulate: int,
    shape: PaddedShape | None = None,
) -> list[Batch]:
    """The batches of :class:`~sparse_rcnn.engine.step.TrainStep`.

    The network sees the padding, and the losses are divided by the number of boxes. All micro-batches of all processes
    are therefore padded to the same size and know of each other's boxes, which the processes tell each other here.

    Args:
        model: checks and pads, see :meth:`SparseRCNN.prepare`.
        images, targets: this process's, as many as every other process has.
        accumulate: micro-batches, of equal size.
        shape: what to pad to at least; None is the least that holds the step.

    Raises:
        TypeError, ValueError: images or targets of the wrong type, shape or value.
    """
    if accumulate == 1 and distributed.world_size() == 1:
        return [model.prepare(images, targets, shape)]
    size = len(images) // accumulate
    parts = [slice(start, start + size) for start in range(0, len(images), size)]
    smallest = shape or PaddedShape(0, 0, 0)
    sides = [max(image.shape[axis] for image in images) for axis in (1, 2)]
    numbers = distributed.gather_numbers([*sides, *(len(target["boxes"]) for target in targets)])
    height, width = (round_up(max(side), SIZE_MULTIPLE) for side in list(zip(*numbers, strict=True))[:2])
    shape = PaddedShape(max(height, smallest.height), max(width, smallest.width), smallest.boxes)
    pin_memory = next(model.parameters()).is_cuda
    counts = torch.tensor([count for own in numbers for count in own[2:]], pin_memory=pin_memory)
    batches = [model.prepare(images[part], targets[part], shape) for part in parts]
    for batch in batches:
        batch.targets.step_counts = counts
    return batches
