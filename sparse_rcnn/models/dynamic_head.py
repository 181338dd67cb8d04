"""The iterative head: stages that each refine every proposal's feature and box (Sparse R-CNN, section 3.2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.models.linear import Linear
from sparse_rcnn.models.recompute import recomputed
from sparse_rcnn.ops._library import is_reference

# Probability that a class starts with, so that the many negatives do not swamp the first steps (RetinaNet, 4.1).
PRIOR_PROBABILITY = 0.01


class DynamicHead(nn.Module):
    """``config.num_stages`` stages with parameters of their own, run one after the other.

    Args:
        config: the detector's configuration.
        strides: pixels a cell of each pyramid level.
    """

    def __init__(self, config: SparseRCNNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.stages = nn.ModuleList(Stage(config, strides) for _ in range(config.num_stages))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for matrices, and class biases that start every class at ``PRIOR_PROBABILITY``."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for stage in self.stages:
            nn.init.constant_(stage.class_logits.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))

    def forward(
        self, features: Sequence[Tensor], boxes: Tensor, proposal_features: Tensor, forbidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Refine the proposals.

        Args:
            features: L maps [B, C, Hl, Wl], finest first.
            boxes: [B, N, 4] xyxy in pixels of the padded batch.
            proposal_features: [B, N, C].
            forbidden: bool [B, N, N], whom each proposal may not attend to; None forbids nothing.

        Returns:
            logits [S, B, N, K] and boxes [S, B, N, 4] of every stage. Boxes are not clipped.
        """
        # RoIAlign gathers all channels of a cell, torchvision's a channel: once here rather than in every stage.
        layout = torch.contiguous_format if _trains_officially() else torch.channels_last
        features = [feature.contiguous(memory_format=layout) for feature in features]
        features = ops.share_gradients(features)
        if forbidden is not None:
            forbidden = forbidden.repeat_interleave(self.num_heads, dim=0)  # as the attention has images and heads
        all_logits, all_boxes = [], []
        for stage in self.stages:
            logits, boxes, proposal_features = stage(features, boxes, proposal_features, forbidden)
            all_logits.append(logits)
            all_boxes.append(boxes)
            # A stage's boxes learn from its own loss; only the initial ones learn through the first stage.
            boxes = boxes.detach()
        return torch.stack(all_logits), torch.stack(all_boxes)


class Stage(nn.Module):
    """Self-attention among proposals, interaction with the RoI features, FFN, class and box towers."""

    def __init__(self, config: SparseRCNNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        C = config.hidden_dim
        self.config = config
        self.strides = tuple(strides)
        # Plain interaction reads the box alone: there are no proposal features to attend to.
        self.attends = config.self_attention and config.interaction != "plain"
        if self.attends:
            self.self_attn = nn.MultiheadAttention(C, config.num_heads)
            self.norm1 = nn.LayerNorm(C)
        self.inst_interact = _INTERACTIONS[config.interaction](config, strides)
        self.norm2 = nn.LayerNorm(C)
        self.linear1 = Linear(C, config.dim_feedforward)
        self.linear2 = Linear(config.dim_feedforward, C)
        self.norm3 = nn.LayerNorm(C)
        self.cls_module = _tower(C, config.num_cls_layers)
        self.reg_module = _tower(C, config.num_reg_layers)
        self.class_logits = Linear(C, config.num_classes + (config.classification == "softmax"))
        self.bboxes_delta = Linear(C, 4)

    def forward(
        self, features: Sequence[Tensor], boxes: Tensor, x: Tensor, forbidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One refinement: boxes [B, N, 4] and proposal features x [B, N, C] in; logits, boxes, features out."""
        if self.attends:
            x = x.transpose(0, 1)  # [N, B, C], as the attention computes
            x = _add_norm(self.norm1, self._attend(x, forbidden), x).transpose(0, 1).contiguous()
        x = _add_norm(self.norm2, self.inst_interact(features, boxes, x), x if self.inst_interact.residual else None)
        x = _add_norm(self.norm3, self.linear2(F.relu(self.linear1(x))), x)
        rows = x.flatten(0, 1)  # [B * N, C]
        logits = self.class_logits(_run_tower(self.cls_module, rows))
        return logits.view(*x.shape[:2], -1), self._refine(rows, boxes), x

    def _attend(self, x: Tensor, forbidden: Tensor | None) -> Tensor:
        """What the proposals x [N, B, C] gather from each other."""
        # A CPU's fused attention is slower in bfloat16 than in float32, with narrow heads several times.
        widened = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not is_reference()
        with torch.autocast("cpu", enabled=False) if widened else contextlib.nullcontext():
            x = x.float() if widened else x
            # With its weights returned, the attention is not of a fused operator.
            return self.self_attn(x, x, x, need_weights=_trains_officially(), attn_mask=forbidden)[0]

    def _refine(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The box tower on x [B * N, C], and the boxes [B, N, 4] that its deltas make of ``boxes``."""
        clamp = self.config.delta_clamp
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            deltas = self.bboxes_delta(_run_tower(self.reg_module, x))
            return ops.apply_deltas(deltas.view_as(boxes), boxes, clamp=clamp)
        linears, norms = self.reg_module[0::3], self.reg_module[1::3]
        refined = ops.refine_boxes(
            *(x, boxes.flatten(0, 1), [linear.weight for linear in linears]),
            *([norm.weight for norm in norms], [norm.bias for norm in norms]),
            *(self.bboxes_delta.weight, self.bboxes_delta.bias),
            clamp=clamp,
        )
        return refined.view_as(boxes)


class DynamicConv(nn.Module):
    """The dynamic interaction: each proposal generates the weights that its RoI features pass through."""

    residual = True

    def __init__(self, config: SparseRCNNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        C, D = config.hidden_dim, config.dim_dynamic
        self.config = config
        self.strides = tuple(strides)
        self.dynamic_layer = Linear(C, 2 * C * D)
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(C)
        self.out_layer = Linear(config.pooler_resolution**2 * C, C)
        self.norm3 = nn.LayerNorm(C)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, x: Tensor) -> Tensor:
        """Boxes [B, N, 4] and proposal features x [B, N, C]: what is added to the features, [B, N, C]."""
        parameters = self._generate(x)
        with self._recomputing(parameters, x):
            interaction = ops.roi_dynamic_conv(
                *(features, boxes, parameters),
                *(self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias),
                *(self.strides, self.config.pooler_resolution, self.config.sampling_ratio, self.config.level_rule),
            )  # [B, N, P, C]
        return _add_norm(self.norm3, self.out_layer(interaction.flatten(2)), relu=True)

    def _generate(self, x: Tensor) -> Tensor:
        """The proposals' own weights, [B * N, 2 * C * D]."""
        return self.dynamic_layer(x).flatten(0, 1)

    def _recomputing(self, parameters: Tensor, x: Tensor) -> contextlib.AbstractContextManager[None]:
        """On a GPU the generated weights are made again in the backward pass: a GEMM there is cheaper than keeping
        2 * C * D numbers a proposal and stage (315 MB a stage for 16 images of 300 proposals in bfloat16)."""
        if not x.is_cuda or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        return recomputed(parameters, lambda: self._generate(x))


class ConcatInteraction(nn.Module):
    """The paper's variant without dynamic weights: RoI and proposal feature concatenated, then one layer."""

    residual = True

    def __init__(self, config: SparseRCNNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.roi = RoIFeature(config, strides)
        self.merge = Linear(2 * config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, x: Tensor) -> Tensor:
        """Boxes [B, N, 4] and proposal features x [B, N, C]: what is added to the features, [B, N, C]."""
        merged = self.merge(torch.cat([self.roi(features, boxes), x], dim=-1))
        return _add_norm(self.norm, merged, relu=True)


class PlainInteraction(nn.Module):
    """The paper's cascade baseline: a stage sees its RoI features and nothing of the stage before but the box."""

    residual = False

    def __init__(self, config: SparseRCNNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.roi = RoIFeature(config, strides)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, x: Tensor) -> Tensor:
        """Boxes [B, N, 4]: RoI features [B, N, C]; the proposal features x are not used."""
        return self.roi(features, boxes)


class RoIFeature(nn.Module):
    """The pooled bins of each box as one vector: RoIAlign, Linear, LayerNorm, ReLU."""

    def __init__(self, config: SparseRCNNConfig, strides: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.out_layer = Linear(config.pooler_resolution**2 * config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Boxes [B, N, 4]: [B, N, C]."""
        config = self.config
        pooled = ops.multiscale_roi_align(
            features, boxes, self.strides, config.pooler_resolution, config.sampling_ratio, config.level_rule
        )  # [B, N, P, C]
        return _add_norm(self.norm, self.out_layer(pooled.flatten(2)), relu=True)


_INTERACTIONS = {"dynamic": DynamicConv, "concat": ConcatInteraction, "plain": PlainInteraction}


def _trains_officially() -> bool:
    """Whether to compute with the official code's operations in their order, for the rounding's sake."""
    return is_reference() and torch.is_grad_enabled()


def _tower(channels: int, layers: int) -> nn.Sequential:
    """``layers`` times Linear without bias, LayerNorm, ReLU."""
    blocks: list[nn.Module] = []
    for _ in range(layers):
        blocks += [Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()]
    return nn.Sequential(*blocks)


def _run_tower(tower: nn.Sequential, x: Tensor) -> Tensor:
    for linear, norm in zip(tower[0::3], tower[1::3], strict=True):
        x = _add_norm(norm, linear(x), relu=True)
    return x


def _add_norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, relu)
