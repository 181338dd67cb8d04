"""The targets of a batch as padded tensors, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PackedTargets:
    """Targets of B images, padded to the largest number M of boxes.

    Attributes:
        labels: [B, M] int64, 0 in padding.
        boxes: [B, M, 4] xyxy in pixels, 0 in padding.
        counts: [B] int64, how many are real.
        step_counts: [G] int64, the counts of all images of the optimizer step that these are a part of, those of its
            other micro-batches and processes too; None if they are all of it, but for what other processes have.
    """

    labels: Tensor
    boxes: Tensor
    counts: Tensor
    step_counts: Tensor | None = None

    def to(self, device: torch.device) -> PackedTargets:
        """The same on ``device``; from pinned memory without a wait."""
        tensors = self.labels, self.boxes, self.counts, self.step_counts
        return PackedTargets(*(None if t is None else t.to(device, non_blocking=True) for t in tensors))


def pack_targets(
    targets: Sequence[dict[str, Tensor]], num_classes: int, like: Tensor, columns: int = 0, pin_memory: bool = False
) -> PackedTargets:
    """Check and pad the targets of a batch.

    Args:
        targets: a dict an image: ``boxes`` [M_i, 4] xyxy in pixels, ``labels`` [M_i] int64.
        num_classes: labels are 0..num_classes - 1.
        like: a tensor of the device and dtype that the boxes shall have.
        columns: M, if the largest number of boxes is less.
        pin_memory: make them in memory that a GPU reads without the host waiting for it.

    Raises:
        TypeError, ValueError: naming the image and what is wrong: another type or shape, a label out of range, a box
            that is not finite or has no area.
    """
    for index, target in enumerate(targets):
        _check_target(f"targets[{index}]", target, num_classes)
    counts = [len(target["labels"]) for target in targets]
    M = max([columns, *counts])
    labels = torch.zeros(len(targets), M, dtype=torch.int64, pin_memory=pin_memory)
    boxes = torch.zeros(len(targets), M, 4, dtype=like.dtype, pin_memory=pin_memory)
    for index, target in enumerate(targets):
        labels[index, : counts[index]] = target["labels"]
        boxes[index, : counts[index]] = target["boxes"]
    return PackedTargets(labels, boxes, torch.tensor(counts, pin_memory=pin_memory)).to(like.device)


def _check_target(name: str, target: dict[str, Tensor], num_classes: int) -> None:
    if not isinstance(target, dict) or "boxes" not in target or "labels" not in target:
        raise TypeError(f"{name}: expected a dict with boxes and labels, got {target!r:.80}")
    boxes, labels = target["boxes"], target["labels"]
    for field, value in (("boxes", boxes), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}.{field}: expected a tensor, got {type(value).__name__}")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise TypeError(f"{name}.labels: expected int64 [M], got {labels.dtype} {list(labels.shape)}")
    if boxes.shape != (len(labels), 4) or not boxes.is_floating_point():
        raise TypeError(f"{name}.boxes: expected floating [{len(labels)}, 4], got {boxes.dtype} {list(boxes.shape)}")
    if not len(labels):
        return
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{name}.labels: expected 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
    bad = ~(boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{name}.boxes: expected x1 < x2 and y1 < y2, got {boxes[first].tolist()} at {first}")
