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
from sparse_rcnn.losses.denoising import NoisyProposals, noisy_proposals
from sparse_rcnn.models import proposals
from sparse_rcnn.models.backbone import STRIDES, BackboneWithFPN
from sparse_rcnn.models.batch import Batch, PaddedShape, normalize_pixels, pad_images
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.models.dynamic_head import DynamicHead
from sparse_rcnn.models.uninitialized import Uninitialized

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
            *(matcher, config.num_classes, config.no_object_weight, config.deep_supervision, config.match_iou)
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
        with Uninitialized():
            model = cls(config)
        model.load_state_dict(state, assign=True)
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
        images: Sequence[Tensor] | Batch,
        targets: Sequence[dict[str, Tensor]] | None = None,
        return_stages: bool = False,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]] | StageOutputs:
        """Losses in training mode, detections in evaluation mode (the contract of torchvision's detectors).

        Args:
            images: CHW tensors at network size, RGB, uint8 0..255 or floating 0..1; sizes may differ. They are padded
                at the right and the bottom to a common multiple of 32; the padding is not masked, as in the original,
                so an image alone and in a batch of larger ones differ a little. In training also what
                :meth:`prepare` made of images and targets, which then needs nothing more of the host.
            targets: in training, a dict an image: ``boxes`` [M, 4] xyxy in pixels, ``labels`` [M] int64.
            return_stages: return :class:`StageOutputs` instead.

        Returns:
            In training the weighted losses (``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last stage, and with
            ``_0``, ``_1``... of the others; with ``config.denoising`` the same names with ``_dn``); their sum is to be
            minimised. In evaluation a dict an image: ``boxes``
            [n, 4] float32 xyxy clipped to the image, ``scores`` [n] descending, ``labels`` [n], and ``proposals``
            [n], the proposal that each detection is.

        Raises:
            TypeError, ValueError: images or targets of the wrong type, shape or value.
        """
        if not self.training:
            logits, boxes, initial = self._stages(*self._normalize(images))
            detections = self.detections(logits[-1], boxes[-1], images)
            return StageOutputs(logits, boxes, initial, detections, {}) if return_stages else detections
        batch = images if isinstance(images, Batch) else self.prepare(images, targets)
        batch = batch.to(self.init_proposal_boxes.weight.device)
        pixels = self._scale(batch.pixels, batch.sizes)
        logits, boxes, initial = self._stages(pixels, batch.sizes, batch.noisy)
        N = self.config.num_proposals
        further = logits[:, :, N:], boxes[:, :, N:]
        logits, boxes = (outputs[:, :, :N].contiguous() for outputs in (logits, boxes))
        losses = self.criterion(logits, boxes, batch.targets, batch.sizes)
        if batch.noisy is not None:
            losses |= self.criterion.denoising(*further, batch.noisy.targets, batch.targets, batch.sizes)
        return StageOutputs(logits, boxes, initial, [], losses) if return_stages else losses

    def prepare(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None,
        shape: PaddedShape | None = None,
    ) -> Batch:
        """Check and pad the images and targets of a training step: everything that the host has to look at.

        Args:
            images, targets: as in :meth:`forward`.
            shape: what to pad to; None is the least that holds the batch.

        Returns:
            The batch on the images' device, in pinned memory if that is the CPU and the model is on a GPU.

        Raises:
            TypeError, ValueError: images or targets of the wrong type, shape or value.
        """
        pixels, sizes = self._pad(images, None if shape is None else shape[:2])
        if targets is None:
            raise ValueError("targets: expected a dict an image in training mode, got None")
        if len(targets) != len(images):
            raise ValueError(f"targets: expected {len(images)}, one an image, got {len(targets)}")
        columns, pin_memory = 0 if shape is None else shape.boxes, self.init_proposal_boxes.weight.is_cuda
        packed = pack_targets(targets, self.config.num_classes, sizes, columns, pin_memory)
        count, learned = self.config.denoising, self.config.num_proposals
        return Batch(pixels, sizes, packed, noisy_proposals(packed, sizes, count, learned) if count else None)

    def _pad(self, images: Sequence[Tensor], shape: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        weight = self.init_proposal_boxes.weight
        # Pixels of boxes need float32 at least, also in a half-precision model.
        return pad_images(images, torch.promote_types(weight.dtype, torch.float32), shape, pin_memory=weight.is_cuda)

    def _normalize(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One padded, normalised batch [B, 3, H, W], and the sizes [B, 2] (height, width) of the images in it."""
        device = self.init_proposal_boxes.weight.device
        pixels, sizes = (tensor.to(device, non_blocking=True) for tensor in self._pad(images))
        return self._scale(pixels, sizes), sizes

    def _scale(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        # In float32 whatever the model's dtype is: 8-bit pixels need no more.
        batch = normalize_pixels(pixels, sizes, self.config.pixel_mean, self.config.pixel_std)
        return batch.to(self.init_proposal_boxes.weight.dtype)

    def _stages(
        self, batch: Tensor, sizes: Tensor, noisy: NoisyProposals | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [S, B, N, K] and boxes [S, B, N, 4] of every stage, and the learned boxes [B, N, 4] before them.

        With ``noisy`` its D proposals come after the N learned ones in the first two.
        """
        boxes = proposals.to_pixels(self.init_proposal_boxes.weight.to(sizes.dtype), sizes)
        features = self.init_proposal_features.weight.expand(len(sizes), -1, -1)  # [B, N, C]
        given, forbidden = boxes, None
        if noisy is not None:
            given = torch.cat([boxes, noisy.boxes], dim=1)
            features = torch.cat([features, self.init_proposal_features(noisy.features)], dim=1)
            forbidden = noisy.forbidden(boxes.shape[1])
        logits, stage_boxes = self.head(self.backbone(batch), given, features, forbidden)
        # To float32 at least, under autocast.
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), stage_boxes, boxes

    def detections(self, logits: Tensor, boxes: Tensor, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The best N of a stage's scores for every image; no NMS, no threshold (section 3.4 of the paper).

        Args:
            logits: [B, N, K] float32 (K + 1 with softmax classification).
            boxes: [B, N, 4] xyxy in pixels of the images.
            images: the B images [3, h, w], of which only the sizes are read.

        Returns:
            The dicts that :meth:`forward` returns in evaluation mode.
        """
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
