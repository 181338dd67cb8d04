"""From padded 8-bit images to detections in one function of tensors: fixed shapes, no host read, so that it can be
captured in a CUDA graph; on a CPU it is simply called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_rcnn import ops
from sparse_rcnn.inference.head import InferenceHead
from sparse_rcnn.models import proposals
from sparse_rcnn.models.sparse_rcnn import SparseRCNN


class Found(NamedTuple):
    """The detections of a batch, best first. Only the first ``counts[i]`` of image i are any, the others are zero."""

    boxes: Tensor  # [B, N, 4] float32 xyxy, in pixels of the given images
    scores: Tensor  # [B, N] float32
    labels: Tensor  # [B, N] int64
    proposals: Tensor  # [B, N] int64
    counts: Tensor  # [B] int64


class Stages(NamedTuple):
    """What every stage said, and where the first began."""

    logits: Tensor  # [S, B, N, K] float32
    boxes: Tensor  # [S, B, N, 4] float32
    proposal_boxes: Tensor  # [B, N, 4] float32


class Program:
    """The whole detector as a function.

    Args:
        model: gives the configuration and the proposals.
        backbone: normalised images [B, 3, H, W], channels-last -> maps.
        head: the stages.
        device, dtype: of the computation.
    """

    def __init__(
        self, model: SparseRCNN, backbone: nn.Module, head: InferenceHead, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = model.config
        self.backbone, self.head, self.dtype = backbone, head, dtype
        self.proposal_boxes = model.init_proposal_boxes.weight.detach().to(device, torch.float32)

    def __call__(self, images: Sequence[Tensor], sizes: Tensor, shape: tuple[int, int]) -> Found:
        """Detect.

        Args:
            images: B uint8 RGB images, [3, h, w] or flat bytes, see :func:`~sparse_rcnn.ops.normalize_pad`.
            sizes: [B, 4] int64, height and width of each image, then those that the network sees it in. Boxes are in
                pixels of the first. Four zeros: no image, no detections.
            shape: (height, width) that all are padded to, multiples of 32.
        """
        return self.detect(self.normalize(images, sizes, shape), sizes)

    def normalize(self, images: Sequence[Tensor], sizes: Tensor, shape: tuple[int, int]) -> Tensor:
        """The network's input [B, 3, H, W], channels-last: arguments as in :meth:`__call__`."""
        config = self.config
        return ops.normalize_pad(images, sizes, shape, config.pixel_mean, config.pixel_std, self.dtype)

    def detect(self, batch: Tensor, sizes: Tensor) -> Found:
        """Detections of normalised images [B, 3, H, W]; ``sizes`` as in :meth:`__call__`."""
        seen = sizes[:, 2:].float()
        logits, boxes = self.head(self.backbone(batch), proposals.to_pixels(self.proposal_boxes, seen))
        return self._select(logits[-1].float(), boxes[-1], seen, sizes[:, :2].float())

    def stages(self, batch: Tensor, sizes: Tensor) -> tuple[Found, Stages]:
        """As :meth:`detect`, with the logits and boxes of every stage."""
        seen = sizes[:, 2:].float()
        start = proposals.to_pixels(self.proposal_boxes, seen)  # [B, N, 4]
        logits, boxes = self.head(self.backbone(batch), start, every_stage=True)
        found = self._select(logits[-1].float(), boxes[-1], seen, sizes[:, :2].float())
        return found, Stages(torch.stack(logits).float(), torch.stack(boxes), start)

    def _select(self, logits: Tensor, boxes: Tensor, seen: Tensor, given: Tensor) -> Found:
        """The best N of logits [B, N, K] and boxes [B, N, 4], clipped, scaled from the sizes [B, 2] ``seen`` to those
        ``given``; what is empty then moves to the end."""
        B, N, K = logits.shape
        if self.config.classification == "focal":
            scores, index = logits.sigmoid().flatten(1).topk(N)
            labels, chosen = index % K, index // K
        else:
            scores, labels = logits.softmax(-1)[..., :-1].max(-1)
            scores, chosen = scores.sort(dim=1, descending=True)
            labels = labels.gather(1, chosen)
        boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
        boxes = boxes.clamp(min=0).minimum(_limits(seen))
        boxes = (boxes * _limits(given / seen)).minimum(_limits(given))  # NaN where there is no image, which is empty
        full = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        order = full.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        counts = full.sum(1)
        is_none = torch.arange(N, device=boxes.device) >= counts[:, None]
        found = [values.gather(1, order).masked_fill(is_none, 0) for values in (scores, labels, chosen)]
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).masked_fill(is_none[..., None], 0)
        return Found(boxes, *found, counts)


def _limits(sizes: Tensor) -> Tensor:
    """(height, width) of images [B, 2] as (width, height, width, height), [B, 1, 4]."""
    return sizes.flip(-1).repeat(1, 2)[:, None]
