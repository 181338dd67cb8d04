"""Noisy copies of the targets beside the learned proposals, in training: the head learns to mend or to refuse them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_rcnn.losses.targets import PackedTargets

# How far each side of a box is moved at most, in halves of the box's width or height: of those to be mended, and from
# there on of those to be refused. At 0.8 the IoU is 0.5 on average, at 2 next to nothing.
NEAR, FAR = 0.8, 2.0


@dataclass
class NoisyProposals:
    """D proposals an image that training adds to the learned ones.

    Attributes:
        boxes: [B, D, 4] xyxy in pixels.
        targets: [B, D] int64, the target of the image that each is to be mended to, -1 for one to be refused.
        groups: [B, D] int64 from 0, equal for those that attend to each other.
        features: [B, D] int64, the learned proposal whose feature each starts with.
    """

    boxes: Tensor
    targets: Tensor
    groups: Tensor
    features: Tensor

    def to(self, device: torch.device) -> NoisyProposals:
        """The same on ``device``; from pinned memory without a wait."""
        return NoisyProposals(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in one order."""
        return self.boxes, self.targets, self.groups, self.features

    def forbidden(self, learned: int) -> Tensor:
        """Whom each of ``learned`` + D proposals may not attend to, bool [B, learned + D, learned + D].

        The learned ones see only each other: what they say is what they say without the others.
        """
        own = self.groups.new_full((len(self.groups), learned), -1)
        groups = torch.cat([own, self.groups], dim=1)
        return groups.unsqueeze(1) != groups.unsqueeze(2)


def noisy_proposals(targets: PackedTargets, sizes: Tensor, count: int, learned: int) -> NoisyProposals:
    """Proposals for the images of a batch, on the host.

    An image's ``count`` places hold as many groups as fit. Each has one copy of every target to be mended, and another,
    with more noise, to be refused, so that the stages learn to leave out what is near an object that another proposal
    has. Of more targets than half the places a random part is taken; the places that are left over, and those of an
    image without targets, are to be refused.

    The noise depends on the image's size and boxes alone, so that neither the division of a step among processes and
    micro-batches nor a resumed run changes it. Augmentation, which moves the boxes, renews it.

    Source: DN-DETR (Li et al., CVPR 2022), the second copies of DINO (Zhang et al., ICLR 2023, section 3.3); here
    without embedded labels: a copy starts with the feature of a learned proposal, and is found by its RoI.

    Args:
        targets: of the B images, in CPU memory.
        sizes: [B, 2] (height, width).
        count: D, at least 2.
        learned: N, learned proposals to take features of.
    """
    parts = [
        _of_image(boxes[:number], size, count, learned)
        for boxes, number, size in zip(targets.boxes, targets.counts.tolist(), sizes, strict=True)
    ]
    stacked = [torch.stack(tensors) for tensors in zip(*parts, strict=True)]
    return NoisyProposals(*(tensor.pin_memory() if targets.boxes.is_pinned() else tensor for tensor in stacked))


def mended(counts: Tensor, count: int) -> Tensor:
    """How many of ``count`` places are to be mended in images of ``counts`` targets, of the shape of ``counts``."""
    taken = counts.clamp(max=count // 2)
    return taken * (count // (2 * taken).clamp(min=1))


def _of_image(boxes: Tensor, size: Tensor, count: int, learned: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`NoisyProposals` for one image of ``size`` (height, width) with targets ``boxes`` [m, 4]."""
    seed = zlib.crc32(torch.cat([size, boxes.flatten()]).numpy().tobytes())
    generator = torch.Generator().manual_seed(seed)
    limit = size.flip(0).repeat(2)  # (w, h, w, h)
    features = torch.randint(learned, (count,), generator=generator)
    places = torch.arange(count)
    if len(boxes):
        chosen = torch.randperm(len(boxes), generator=generator)[: count // 2]
        group_size = 2 * len(chosen)
        groups, place = places // group_size, places % group_size
        complete = groups < count // group_size
        near = complete & (place < len(chosen))
        index = chosen[place % len(chosen)]
        around = boxes[index]
        targets = torch.where(near, index, -1)
        groups = torch.where(complete, groups, count + places)  # the places left over are alone
    else:
        near = torch.zeros(count, dtype=torch.bool)
        around = _anywhere(limit, count, generator)
        targets, groups = torch.full((count,), -1), places
    return _moved(around, near, limit, generator), targets, groups, features


def _moved(boxes: Tensor, near: Tensor, limit: Tensor, generator: torch.Generator) -> Tensor:
    """``boxes`` [D, 4] with the noise of ``near`` [D] or of the others, inside of ``limit``, at least a pixel wide."""
    amount = torch.rand(boxes.shape, generator=generator, dtype=boxes.dtype)
    amount = torch.where(near.unsqueeze(1), NEAR * amount, NEAR + (FAR - NEAR) * amount)
    sign = torch.randint(2, boxes.shape, generator=generator) * 2 - 1
    half = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) / 2
    corners = (boxes + sign * amount * half).view(-1, 2, 2)
    low, high = corners.amin(1), corners.amax(1)
    low = low.clamp(min=0).minimum(limit[:2] - 1)
    return torch.cat([low, high.minimum(limit[2:]).maximum(low + 1)], dim=1)


def _anywhere(limit: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Boxes [count, 4] of any place and size, small ones more often than large ones."""
    center, side = torch.rand(2, count, 2, generator=generator, dtype=limit.dtype)
    return torch.cat([center - side**2 / 2, center + side**2 / 2], dim=1) * limit
