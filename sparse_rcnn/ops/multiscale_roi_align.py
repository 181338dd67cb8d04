"""RoIAlign over the levels of a feature pyramid, the level of each box chosen inside (FPN, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_rcnn.ops import _library
from sparse_rcnn.ops._check import check_floating, check_same_device, check_shape
from sparse_rcnn.ops.shared_gradients import SharedFeatures, call_sharing, new_grad_cells, split_grad_cells

LEVEL_RULES = ("detectron2", "mmdet")
MAX_LEVELS = 8  # what the kernels' argument block holds
MAX_SAMPLES = 512  # of a box's side: the taps of more do not fit in a GPU's shared memory


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    output_size: int = 7,
    sampling_ratio: int = 2,
    level_rule: str = "detectron2",
) -> Tensor:
    """Pool the features of every box from the pyramid level that fits its size.

    Source: Mask R-CNN (section 3, RoIAlign, the half-pixel "aligned" form) and FPN (equation 1, the level).

    Args:
        features: L maps [B, C, Hl, Wl], finest first, of one floating dtype; channels_last memory is fastest.
        boxes: [B, N, 4] xyxy in pixels of the (padded) images, floating point. No gradient flows to them.
        strides: pixels a cell of each level, L powers of two, each twice the one before.
        output_size: bins a side; P = output_size ** 2.
        sampling_ratio: bilinear samples a side of each bin.
        level_rule: ``detectron2`` is floor(4 + log2(sqrt(area) / 224 + 1e-8)), ``mmdet`` is
            floor(2 + log2(sqrt(area) / 56 + 1e-6)); both clamped to the levels given.

    Returns:
        [B, N, P, C] of the features' dtype, bins row-major. A box of negative area pools to zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
    """
    check_roi_align(features, boxes, strides, output_size, sampling_ratio, level_rule)
    native = _library.kernels("multiscale_roi_align", boxes.device)
    options = (strides, output_size, sampling_ratio, level_rule)
    if native is None:
        return multiscale_roi_align_reference(features, boxes, *options)
    boxes = wide_boxes(boxes)
    if isinstance(features, SharedFeatures) and torch.is_grad_enabled():
        backward = partial(_backward_sharing, native)
        return call_sharing(features, native.multiscale_roi_align, backward, boxes, *options)
    return native.multiscale_roi_align(list(features), boxes, *options)


def multiscale_roi_align_reference(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    output_size: int = 7,
    sampling_ratio: int = 2,
    level_rule: str = "detectron2",
) -> Tensor:
    """The specification of :func:`multiscale_roi_align`, level by level in plain PyTorch."""
    B, N = boxes.shape[:2]
    C = features[0].shape[1]
    rois = wide_boxes(boxes).reshape(B * N, 4)
    image = torch.arange(B, device=boxes.device).repeat_interleave(N)  # [B * N]
    level = box_levels(rois, strides, level_rule)  # [B * N]
    pooled = features[0].new_zeros(B * N, output_size**2, C)
    for index, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        # A level without boxes takes part too: its parameters get gradients of zero, as every step must give them.
        chosen = (level == index).nonzero().squeeze(1)
        # Training in float32 is the official code's to the last bit, with its operator of the same sums.
        trains = feature.requires_grad and feature.dtype == rois.dtype == torch.float32
        bins = (_torchvision_roi_align if trains else _roi_align)(
            feature, rois[chosen], image[chosen], stride, output_size, sampling_ratio
        )
        pooled = pooled.index_copy(0, chosen, bins)
    return pooled.view(B, N, output_size**2, C)


def wide_boxes(boxes: Tensor) -> Tensor:
    """The boxes [..., 4] detached, in the type their coordinates are computed in: float32 unless they are float64."""
    return boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))


def box_levels(boxes: Tensor, strides: Sequence[int], level_rule: str = "detectron2") -> Tensor:
    """The index into ``strides`` of the level each box [..., 4] reads, int64 [...].

    A box of negative or NaN area counts as level 0.
    """
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    side = (width * height).sqrt()
    if level_rule == "detectron2":
        level = torch.floor(4 + torch.log2(side / 224 + 1e-8))
    else:
        level = torch.floor(torch.log2(side / 56 + 1e-6)) + 2
    finest = int(math.log2(strides[0]))
    level = level.nan_to_num(nan=finest).clamp(finest, finest + len(strides) - 1)
    return level.to(torch.int64) - finest


def _torchvision_roi_align(
    feature: Tensor, rois: Tensor, image: Tensor, stride: int, size: int, samples: int
) -> Tensor:
    """As :func:`_roi_align`."""
    from sparse_rcnn.models.light_torchvision import torchvision

    sides = rois[:, 2:] - rois[:, :2]
    # Where a coordinate or a side is not finite it would read out of bounds.
    pools = rois.isfinite().all(1) & sides.isfinite().all(1) & (sides.prod(1) >= 0)
    rois = torch.cat([image[:, None].to(rois.dtype), torch.where(pools[:, None], rois, 0.0)], dim=1)
    bins = torchvision.ops.roi_align(feature, rois, size, 1 / stride, samples, aligned=True)
    return (bins * pools.view(-1, 1, 1, 1)).flatten(2).transpose(1, 2)


def _roi_align(feature: Tensor, rois: Tensor, image: Tensor, stride: int, size: int, samples: int) -> Tensor:
    """One level: [R, size * size, C] for rois [R, 4] in pixels, of the images [R]."""
    C, H, W = feature.shape[1:]
    R, taps = rois.shape[0], 4 * samples**2
    x_low, x_high, x_frac, x_inside = _bilinear_taps(rois[:, 0], rois[:, 2], W, stride, size, samples)
    y_low, y_high, y_frac, y_inside = _bilinear_taps(rois[:, 1], rois[:, 3], H, stride, size, samples)
    # A bin is the mean of samples^2 points, each a blend of 4 cells: a weighted sum of 4 * samples^2 rows of the
    # channels-last map. Axes: [R, size (y), size (x), samples (y), samples (x), y low/high, x low/high].
    rows = torch.stack([y_low, y_high], -1) * W  # [R, size, samples, 2]
    columns = torch.stack([x_low, x_high], -1)
    row_weights = torch.stack([1 - y_frac, y_frac], -1) * y_inside.unsqueeze(-1)
    column_weights = torch.stack([1 - x_frac, x_frac], -1) * x_inside.unsqueeze(-1)
    rows, row_weights = (t[:, :, None, :, None, :, None] for t in (rows, row_weights))
    columns, column_weights = (t[:, None, :, None, :, None, :] for t in (columns, column_weights))
    cells = (image * (H * W)).view(R, 1, 1, 1, 1, 1, 1) + rows + columns
    # A box of negative area has level NaN and pools to zeros: its weights vanish, not its cells.
    positive = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1]) >= 0).to(rois.dtype).view(R, 1, 1, 1, 1, 1, 1)
    weights = row_weights * column_weights * positive / samples**2
    table = feature.permute(0, 2, 3, 1).reshape(-1, C)  # a view when the map is channels_last
    bags = F.embedding_bag(
        cells.reshape(-1, taps), table, per_sample_weights=weights.reshape(-1, taps).to(table.dtype), mode="sum"
    )
    return bags.view(R, size**2, C)


def _bilinear_taps(
    start: Tensor, end: Tensor, length: int, stride: int, size: int, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis: the two cells of every sample, the weight of the second, and whether the sample counts.

    Args:
        start, end: the boxes' edges in pixels, [R].
        length: cells of the map along the axis.

    Returns:
        low, high (int64), fraction, inside (of the boxes' dtype), each [R, size, samples]. A sample further than one
        cell outside the map counts as zero; nearer ones read the border.
    """
    bins = torch.arange(size, device=start.device, dtype=start.dtype).view(1, size, 1)
    offsets = (torch.arange(samples, device=start.device, dtype=start.dtype) + 0.5).view(1, 1, samples)
    start, end = (start / stride - 0.5).view(-1, 1, 1), (end / stride - 0.5).view(-1, 1, 1)
    extent = (end - start) / size  # of a bin, in cells
    points = start + bins * extent + offsets * extent / samples  # [R, size, samples]
    inside = ((points >= -1) & (points <= length)).to(points.dtype)
    points = points.nan_to_num().clamp(0, length - 1)
    low = points.floor()
    high = (low + 1).clamp(max=length - 1)
    return low.to(torch.int64), high.to(torch.int64), points - low, inside


def check_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    level_rule: str,
) -> None:
    """Raise unless the arguments of :func:`multiscale_roi_align` fit one another."""
    if len(features) == 0 or len(features) != len(strides):
        raise ValueError(f"strides: expected one a level, got {len(strides)} for {len(features)} features")
    if len(features) > MAX_LEVELS:
        raise ValueError(f"features: expected at most {MAX_LEVELS} levels, got {len(features)}")
    check_shape("boxes", boxes, ("B", "N", 4))
    check_floating("boxes", boxes)
    check_shape("features[0]", features[0], (boxes.shape[0], "C", "H", "W"))
    for index, feature in enumerate(features):
        name = f"features[{index}]"
        check_shape(name, feature, (boxes.shape[0], features[0].shape[1], "H", "W"))
        check_floating(name, feature)
        if feature.dtype != features[0].dtype:
            raise TypeError(f"{name}: expected {features[0].dtype} like features[0], got {feature.dtype}")
        if feature.shape[2] == 0 or feature.shape[3] == 0:
            raise ValueError(f"{name}: expected at least one cell, got {list(feature.shape)}")
        check_same_device(boxes=boxes, **{name: feature})
    for index, stride in enumerate(strides):
        if not isinstance(stride, int) or stride < 1 or stride & (stride - 1) or stride != strides[0] << index:
            raise ValueError(f"strides: expected powers of two, each twice the one before, got {list(strides)}")
    if output_size < 1 or sampling_ratio < 1:
        raise ValueError(f"output_size, sampling_ratio: expected >= 1, got {output_size}, {sampling_ratio}")
    if output_size * sampling_ratio > MAX_SAMPLES:
        raise ValueError(
            f"output_size, sampling_ratio: expected a product of at most {MAX_SAMPLES} samples a side, got "
            f"{output_size} x {sampling_ratio}"
        )
    if level_rule not in LEVEL_RULES:
        raise ValueError(f"level_rule: expected one of {', '.join(LEVEL_RULES)}, got {level_rule!r}")


def _fake(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    level_rule: str,
) -> Tensor:
    return features[0].new_empty(*boxes.shape[:2], output_size**2, features[0].shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, *ctx.options = inputs
    ctx.save_for_backward(*features, boxes)


def _backward(native: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *features, boxes = ctx.saved_tensors
    cells = new_grad_cells(features)
    deterministic = torch.are_deterministic_algorithms_enabled()
    native.multiscale_roi_align_backward(grad, features, boxes, *ctx.options, deterministic, cells)
    return split_grad_cells(cells, features), None, None, None, None, None


def _backward_sharing(
    native: Any, grad: Tensor, features: Sequence[Tensor], cells: Tensor, boxes: Tensor, *options: Any
) -> tuple[None, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    native.multiscale_roi_align_backward(grad, features, boxes, *options, deterministic, cells)
    return None, None, None, None, None


_library.declare("multiscale_roi_align", fake=_fake, setup_context=_setup_context, backward=_backward)
_library.declare("multiscale_roi_align_backward", fake=lambda *arguments: None)
