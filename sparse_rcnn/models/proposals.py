"""The learned proposals' initial boxes (Sparse R-CNN, section 3.1 and table 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def initial_boxes(kind: str, count: int) -> Tensor:
    """Initial proposal boxes [count, 4], normalised (cx, cy, w, h).

    Args:
        kind: ``image`` covers the image, ``center`` a tenth of it in the middle, ``grid`` tiles it, ``random`` draws
            centre and size from a normal distribution. ``tiles``, beyond the paper, are overlapping tiles of several
            sizes, the smallest as small as the number allows: small objects are found in fewer images.
        count: number of proposals.

    Raises:
        ValueError: another kind.
    """
    if kind == "image":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(count, 4)
    if kind == "center":
        return torch.tensor([0.5, 0.5, 0.1, 0.1]).expand(count, 4)
    if kind == "grid":
        side = math.ceil(math.sqrt(count))
        centers = (torch.arange(side) + 0.5) / side
        cx, cy = centers.repeat(side)[:count], centers.repeat_interleave(side)[:count]
        size = torch.full((count,), 1.0 / side)
        return torch.stack([cx, cy, size, size], dim=1)
    if kind == "tiles":
        return _tiles(count)
    if kind == "random":
        centers = (0.5 + 0.2 * torch.randn(count, 2)).clamp(0.05, 0.95)
        sizes = (0.4 + 0.2 * torch.randn(count, 2)).clamp(0.05, 1.0)
        return torch.cat([centers, sizes], dim=1)
    raise ValueError(f"kind: expected image, center, grid, random or tiles, got {kind!r}")


def _tiles(count: int) -> Tensor:
    """Grids whose sides fall by the square root of 2, and the whole image for what is left over."""
    side = 1
    while sum(n * n for n in _sides(side + 1)) <= count:
        side += 1
    boxes = [torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(count, 4)]
    for n in _sides(side):
        grid = initial_boxes("grid", n * n)
        boxes.append(torch.cat([grid[:, :2], (1.4 * grid[:, 2:]).clamp(max=1)], dim=1))
    return torch.cat(boxes[::-1])[:count]


def _sides(largest: int) -> list[int]:
    """Tiles a side of each grid, ascending."""
    return sorted({round(largest / 2 ** (step / 2)) for step in range(1 + round(2 * math.log2(largest)))})


def to_pixels(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Normalised cxcywh boxes [N, 4] on images of ``image_sizes`` [B, 2] (height, width): xyxy pixels [B, N, 4].

    The size is the image's own, without padding.
    """
    scale = image_sizes.flip(-1).repeat(1, 2)  # [B, 4] as (w, h, w, h)
    centers, sizes = boxes[:, :2], boxes[:, 2:]
    corners = torch.cat([centers - 0.5 * sizes, centers + 0.5 * sizes], dim=1)  # [N, 4]
    return corners.unsqueeze(0) * scale.unsqueeze(1)
