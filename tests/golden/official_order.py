"""The head's stage and the losses with the official implementation's order of float32 operations.

AdamW's first steps are nearly the signs of the gradients: one rounding more or less grows to 1e-3 of the loss within
three steps. With every operation in the official order, here in PyTorch's and torchvision's own operators, not even
that remains. Exact arithmetic is no nearer: in float64 the three totals after the first are 1.4e-4, 4.2e-3 and 1.9e-3
from the official float32 figures, in this order and in the package's own alike. The operators of this package are
tested against the same figures elsewhere, to rounding, and against this order over the same steps in float64.
"""

from __future__ import annotations

import warnings

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.ops.multiscale_roi_align import box_levels


def stage_forward(self, features, boxes, x):
    """``Stage.forward``: proposals before images in the attention, image after image in everything that follows."""
    B, N, C = x.shape
    self.self_attn.batch_first = False
    x = x.transpose(0, 1)
    x = self.norm1(x + self.self_attn(x, x, x)[0])
    x = x.transpose(0, 1).reshape(1, B * N, C)
    x = self.norm2(x + _interaction(self.inst_interact, _roi_align(features, boxes, self.strides), x))
    x = self.norm3(x + self.linear2(F.relu(self.linear1(x))))
    rows = x.view(B * N, C)
    logits, deltas = self.class_logits(self.cls_module(rows)), self.bboxes_delta(self.reg_module(rows))
    refined = ops.apply_deltas_reference(deltas.view(B, N, 4), boxes, clamp=self.config.delta_clamp)
    return logits.view(B, N, -1), refined, x.view(B, N, C)


def _roi_align(features, boxes, strides):
    """[B * N, C, 49], level by level."""
    B, N = boxes.shape[:2]
    image = torch.arange(B).repeat_interleave(N).to(boxes.dtype)
    rois = torch.cat([image[:, None], boxes.detach().reshape(B * N, 4)], dim=1)
    levels = box_levels(rois[:, 1:], strides)
    pooled = features[0].new_zeros(B * N, features[0].shape[1], 7, 7)
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        chosen = (levels == level).nonzero()[:, 0]
        bins = torchvision.ops.roi_align(feature, rois[chosen], 7, 1 / stride, sampling_ratio=2, aligned=True)
        pooled.index_put_((chosen,), bins)
    return pooled.flatten(2)


def _interaction(layer, pooled, x):
    C, D = pooled.shape[1], layer.norm1.weight.shape[0]
    first, second = layer.dynamic_layer(x).permute(1, 0, 2).split(C * D, dim=2)
    x = F.relu(layer.norm1(torch.bmm(pooled.transpose(1, 2), first.reshape(-1, C, D))))
    x = F.relu(layer.norm2(torch.bmm(x, second.reshape(-1, D, C))))
    return F.relu(layer.norm3(layer.out_layer(x.flatten(1))))


def _focal_loss(x: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    error = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    likelihood = p * target + (1 - p) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    return (weight * (error * (1 - likelihood) ** 2.0)).sum()


class Criterion(nn.Module):
    """The losses of one stage after the other, with the matches of this package's matcher.

    The focal loss is a TorchScript function, whose derivatives from the second call on are not rounded as those of
    eager PyTorch are.
    """

    def __init__(self, matcher: nn.Module) -> None:
        super().__init__()
        self.matcher, self.deep_supervision = matcher, True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            self.focal_loss = torch.jit.script(_focal_loss)

    def forward(self, logits, boxes, targets, image_sizes):
        """As ``SetCriterion.forward``; in the order that they are summed in."""
        matches = self.matcher(logits.detach(), boxes.detach(), targets, image_sizes)
        last, losses = len(logits) - 1, {}
        for stage in (last, *range(last)):
            found = self._stage(logits[stage], boxes[stage], matches[stage], targets, image_sizes)
            losses.update({name if stage == last else f"{name}_{stage}": loss for name, loss in found.items()})
        return losses

    def _stage(self, logits, boxes, matches, targets, image_sizes):
        counts = targets.counts.tolist()
        image = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
        # The pairs of an image in the order of their proposals.
        order = [matches[index, :count].argsort() for index, count in enumerate(counts)]
        target = torch.cat(order)
        proposal = matches[image, target]
        one_hot = torch.zeros_like(logits)
        one_hot[image, proposal, targets.labels[image, target]] = 1
        chosen, wanted = boxes[image, proposal], targets.boxes[image, target]
        scale = image_sizes.flip(-1).repeat(1, 2)[image]  # (w, h, w, h)
        num_boxes = float(max(sum(counts), 1))
        giou = torch.diag(torchvision.ops.generalized_box_iou(chosen, wanted))
        l1 = F.l1_loss(chosen / scale, wanted / scale, reduction="none")
        class_weight, l1_weight, giou_weight = self.matcher.weights
        return {
            "loss_ce": self.focal_loss(logits.flatten(0, 1), one_hot.flatten(0, 1)) / num_boxes * class_weight,
            "loss_giou": (1 - giou).sum() / num_boxes * giou_weight,
            "loss_bbox": l1.sum() / num_boxes * l1_weight,
        }


def parameter_order(official_key: str) -> tuple:
    """Sorts parameters as the official model registers them, which is the order of the terms of the gradient's norm."""
    part, *rest = official_key.split(".")
    if "fpn_" in official_key:
        return 0, official_key.split(".")[1][-1], "output" in official_key
    if "bottom_up" in official_key:
        _, _, stage, block = official_key.split(".")[:4]
        return 1, stage, int(block) if block.isdigit() else 0, "shortcut" not in official_key
    return (2, "boxes" in official_key) if part.startswith("init_proposal") else (3,)
