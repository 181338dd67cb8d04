"""The detector: backbone and FPN, learned proposals, iterative head, losses or detections."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_rcnn.losses import HungarianMatcher, SetCriterion, pack_targets
from sparse_rcnn.models import proposals
from sparse_rcnn.models.backbone import STRIDES, BackboneWithFPN
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.models.dynamic_head import DynamicHead

if TYPE_CHECKING:
    from sparse_rcnn.inference import OptimizedSparseRCNN


@dataclass
class StageOutputs:
    """What every stage of the head said about a batch.

    Attributes:
        logits: [S, B, N, K] float32 (K + 1 with softmax classification).
        boxes: [S, B, N, 4] float32 xyxy in pixels of the given images, not clipped.
        proposal_boxes: [B, N, 4], the learned boxes that the first stage starts from.
        detections: the list of dicts that the model returns without ``return_stages``; empty in training.
        losses: the dict of losses in training, empty in evaluation.
    """

    logits: Tensor
    boxes: Tensor
    proposal_boxes: Tensor
    detections: list[dict[str, Tensor]]
    losses: dict[str, Tensor]


class SparseRCNN(nn.Module):
    """Sparse R-CNN (Sun et al., "Sparse R-CNN: End-to-End Object Detection with Learnable Proposals", CVPR 2021).

    ``model.to(memory_format=torch.channels_last)`` runs faster and rounds a little more; :class:`Predictor` and the
    trainer do so.

    Args:
        config: what to build; the weights are initialised, nothing is downloaded.
    """

    def __init__(self, config: SparseRCNNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SparseRCNNConfig()
        self.backbone = BackboneWithFPN(config.backbone, config.hidden_dim, config.frozen_stages)
        self.init_proposal_features = nn.Embedding(config.num_proposals, config.hidden_dim)
        self.init_proposal_boxes = nn.Embedding(config.num_proposals, 4)
        self.init_proposal_features.requires_grad_(config.interaction != "plain")  # which does not read them
        with torch.no_grad():
            self.init_proposal_boxes.weight.copy_(proposals.initial_boxes(config.proposal_init, config.num_proposals))
        self.head = DynamicHead(config, STRIDES)
        matcher = HungarianMatcher(
            *(config.class_weight, config.l1_weight, config.giou_weight),
            *(config.focal_alpha, config.focal_gamma, config.classification),
        )
        self.criterion = SetCriterion(
            matcher, config.num_classes, config.no_object_weight, deep_supervision=config.deep_supervision
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> SparseRCNN:
        """The detector in a directory of :meth:`save_pretrained`, or in an official or mmdetection checkpoint.

        Args:
            path: a directory or ``.safetensors`` file, a ``.pth`` or ``.pkl`` of the official code, or a ``.pth`` of
                mmdetection; the configuration is inferred from the tensors of the last three.
            map_location: device of the parameters.

        Returns:
            The detector in evaluation mode.

        Raises:
            ValueError: the file is missing, damaged, of another model, or has missing, unexpected or wrongly shaped
                tensors (each is listed). Nothing in the file is executed.
        """
        from sparse_rcnn.weights import load_pretrained

        config, state = load_pretrained(path)
        model = cls(config)
        model.load_state_dict(state)
        return model.to(map_location).eval()

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
        """Write ``model.safetensors`` and ``config.json`` atomically; ``dtype`` stores the weights in another type."""
        from sparse_rcnn.weights import save_pretrained

        return save_pretrained(self.config, self.state_dict(), directory, dtype)

    def optimize(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 1,
        image_sizes: Iterable[tuple[int, int]] = (),
        **options: Any,
    ) -> OptimizedSparseRCNN:
        """The detector for inference only, several times as fast and equal to rounding.

        Arguments and errors are those of :class:`~sparse_rcnn.inference.OptimizedSparseRCNN`. It holds for the weights
        as they are now.
        """
        from sparse_rcnn.inference import OptimizedSparseRCNN

        return OptimizedSparseRCNN(self, device, dtype, batch_size, image_sizes, **options)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        return_stages: bool = False,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]] | StageOutputs:
        """Losses in training mode, detections in evaluation mode (the contract of torchvision's detectors).

        Args:
            images: CHW tensors at network size, RGB, uint8 0..255 or floating 0..1; sizes may differ. They are padded
                at the right and the bottom to a common multiple of 32; the padding is not masked, as in the original,
                so an image alone and in a batch of larger ones differ a little.
            targets: in training, a dict an image: ``boxes`` [M, 4] xyxy in pixels, ``labels`` [M] int64.
            return_stages: return :class:`StageOutputs` instead.

        Returns:
            In training the weighted losses (``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last stage, and with
            ``_0``, ``_1``... of the others); their sum is to be minimised. In evaluation a dict an image: ``boxes``
            [n, 4] float32 xyxy clipped to the image, ``scores`` [n] descending, ``labels`` [n], and ``proposals``
            [n], the proposal that each detection is.

        Raises:
            TypeError, ValueError: images or targets of the wrong type, shape or value.
        """
        batch, sizes = self._normalize(images)
        boxes = proposals.to_pixels(self.init_proposal_boxes.weight.to(sizes.dtype), sizes)  # [B, N, 4]
        features = self.init_proposal_features.weight.expand(len(images), -1, -1)  # [B, N, C]
        logits, stage_boxes = self.head(self.backbone(batch), boxes, features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # under autocast

        losses: dict[str, Tensor] = {}
        detections: list[dict[str, Tensor]] = []
        if self.training:
            if targets is None:
                raise ValueError("targets: expected a dict an image in training mode, got None")
            if len(targets) != len(images):
                raise ValueError(f"targets: expected {len(images)}, one an image, got {len(targets)}")
            packed = pack_targets(targets, self.config.num_classes, stage_boxes)
            losses = self.criterion(logits, stage_boxes, packed, sizes)
        else:
            detections = self._detections(logits[-1], stage_boxes[-1], images)
        if return_stages:
            return StageOutputs(logits, stage_boxes, boxes, detections, losses)
        return losses if self.training else detections

    def _normalize(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One padded, normalised batch [B, 3, H, W], and the sizes [B, 2] (height, width) of the images in it."""
        if isinstance(images, Tensor) and images.dim() == 3 or len(images) == 0:
            raise ValueError("images: expected a list of at least one CHW tensor")
        for index, image in enumerate(images):
            _check_image(f"images[{index}]", image)
        weight = self.init_proposal_boxes.weight
        mean = torch.tensor(self.config.pixel_mean, device=weight.device).view(3, 1, 1)
        std = torch.tensor(self.config.pixel_std, device=weight.device).view(3, 1, 1)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        shape = (len(images), 3, -(-height // 32) * 32, -(-width // 32) * 32)
        # In float32 whatever the model's dtype is: 8-bit pixels need no more.
        batch = torch.zeros(shape, device=weight.device)
        for slot, image in zip(batch, images, strict=True):
            pixels = image.to(slot) if image.dtype == torch.uint8 else image.to(slot) * 255.0
            slot[:, : image.shape[1], : image.shape[2]] = (pixels - mean) / std
        sizes = torch.tensor([image.shape[1:] for image in images], device=weight.device)
        # Pixels of boxes need float32 at least, also in a half-precision model.
        return batch.to(weight.dtype), sizes.to(torch.promote_types(weight.dtype, torch.float32))

    def _detections(self, logits: Tensor, boxes: Tensor, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The best N of the last stage's scores for every image; no NMS, no threshold (section 3.4 of the paper)."""
        results = []
        for image_logits, image_boxes, image in zip(logits, boxes, images, strict=True):
            N, K = image_logits.shape
            if self.config.classification == "focal":
                # A proposal can appear under several classes.
                scores, index = image_logits.sigmoid().flatten().topk(N)
                labels, chosen = index % K, index // K
            else:
                scores, labels = image_logits.softmax(-1)[:, :-1].max(-1)
                scores, chosen = scores.sort(descending=True)
                labels = labels[chosen]
            height, width = image.shape[1:]
            limit = image_boxes.new_tensor([width, height, width, height])
            kept = image_boxes[chosen].clamp(min=0).minimum(limit)
            full = (kept[:, 2] > kept[:, 0]) & (kept[:, 3] > kept[:, 1])
            found = {"boxes": kept, "scores": scores, "labels": labels, "proposals": chosen}
            results.append({name: values[full] for name, values in found.items()})
        return results


def _check_image(name: str, image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"{name}: expected shape [3, H, W], got {list(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"{name}: expected uint8 0..255 or floating point 0..1, got {image.dtype}")
