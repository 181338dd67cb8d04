"""The peer that ``torch.compile`` gets: the detector in plain PyTorch, without anything that a host has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparse_rcnn import SparseRCNN, ops
from sparse_rcnn.models.proposals import to_pixels
from sparse_rcnn.ops.multiscale_roi_align import box_levels, wide_boxes


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    output_size: int = 7,
    sampling_ratio: int = 2,
    level_rule: str = "detectron2",
) -> Tensor:
    """What ``multiscale_roi_align_reference`` computes, all levels at once: their cells are the rows of one matrix."""
    B, N = boxes.shape[:2]
    C, device = features[0].shape[1], boxes.device
    cells = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, C) for feature in features])
    shapes = [(*feature.shape[2:], stride) for feature, stride in zip(features, strides, strict=True)]
    begins = [B * sum(height * width for height, width, _ in shapes[:index]) for index in range(len(shapes))]
    rois = wide_boxes(boxes).reshape(-1, 4)
    level = box_levels(rois, strides, level_rule)
    begin = torch.tensor(begins, device=device)[level]
    height, width, stride = torch.tensor(shapes, device=device)[level].unbind(1)  # each [R]
    samples = output_size * sampling_ratio
    points = (torch.arange(samples, dtype=rois.dtype, device=device) + 0.5) / samples
    y, x = (_taps(rois[:, axis], rois[:, axis + 2], stride, size, points) for axis, size in ((1, height), (0, width)))
    first = begin + torch.arange(B, device=device).repeat_interleave(N, output_size=B * N) * height * width
    sampled = 0
    for row, row_weight in y:
        for column, column_weight in x:
            index = first[:, None, None] + row[:, :, None] * width[:, None, None] + column[:, None, :]
            weight = (row_weight[:, :, None] * column_weight[:, None, :]).to(cells.dtype)
            sampled = sampled + cells[index] * weight[..., None]
    area = (rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])
    bins = sampled.view(-1, output_size, sampling_ratio, output_size, sampling_ratio, C).mean((2, 4))
    return torch.where(area.view(-1, 1, 1, 1) >= 0, bins, 0).view(B, N, output_size**2, C)


def _taps(low: Tensor, high: Tensor, stride: Tensor, size: Tensor, points: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two cells [R, samples] that each point lies between along one axis, and their weights."""
    at = ((low / stride - 0.5)[:, None]) + ((high - low) / stride)[:, None] * points
    inside = (at >= -1) & (at <= size[:, None])
    at = at.clamp(min=0)
    lower = at.long().minimum(size[:, None] - 1)
    upper = (lower + 1).minimum(size[:, None] - 1)
    fraction = torch.where(lower == upper, 0, at - lower)
    return [(lower, (1 - fraction) * inside), (upper, fraction * inside)]


@contextmanager
def sync_free() -> Any:
    """All operators by their references, RoIAlign by the one above, and the attention as on the other backends."""
    with ExitStack() as stack:
        stack.enter_context(ops.backend("reference"))
        # The fused attention and channels-last maps, which a compiler is the faster for.
        stack.enter_context(mock.patch("sparse_rcnn.models.dynamic_head._trains_officially", lambda: False))
        for name in ("multiscale_roi_align", "roi_dynamic_conv"):
            target = f"sparse_rcnn.ops.{name}.multiscale_roi_align_reference"
            stack.enter_context(mock.patch(target, roi_align))
        yield


def forward(model: SparseRCNN) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A function of normalised images [B, 3, H, W] and their sizes [B, 2] to the logits and boxes of all stages, and
    the last stage's best scores [B, N]."""

    def run(batch: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes = to_pixels(model.init_proposal_boxes.weight.to(sizes.dtype), sizes)
        features = model.init_proposal_features.weight.expand(len(sizes), -1, -1)
        logits, boxes = model.head(model.backbone(batch), boxes, features)
        return logits, boxes, logits[-1].float().sigmoid().flatten(1).topk(logits.shape[2]).values

    return run
