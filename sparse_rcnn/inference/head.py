"""The iterative head for inference: weights in one type, and nothing computed that no detection depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.inference.linear import make_layer
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.models.dynamic_head import Stage
from sparse_rcnn.onednn import linear

Weights = tuple[Tensor, Tensor | None]  # of a linear layer
Norm = tuple[Tensor, Tensor]  # of a LayerNorm, in float32: the kernels take no other


class InferenceHead:
    """What ``model.head`` computes in evaluation mode.

    The first stage's self-attention and generated parameters depend on the learned proposals alone: they are computed
    here, once. Each later stage has two branches that meet in its RoIAlign: the stage before refines the boxes, while
    this one's self-attention and ``dynamic_layer`` need its features only. On a GPU they run on two streams.

    Args:
        model: where the weights are taken from; those that have the device and the type already are shared.
        device, dtype: of weights and features. Boxes are float32.
        out_layer_rank, fp8: see :class:`~sparse_rcnn.inference.OptimizedSparseRCNN`.
    """

    def __init__(
        self,
        model: SparseRCNN,
        device: torch.device,
        dtype: torch.dtype,
        out_layer_rank: int | None = None,
        fp8: bool = False,
    ) -> None:
        self.config = model.config
        self.dtype = dtype
        self.stages = [_Stage(stage, model.config, device, dtype, out_layer_rank, fp8) for stage in model.head.stages]
        proposals = model.init_proposal_features.weight.detach()[None].to(device)  # [1, N, C]
        # In float32 whatever the type is: once and for all, so rounded once.
        first = _Stage(model.head.stages[0], model.config, device, torch.float32)
        mixed = first.mix(proposals.float())
        parameters = first.generate(mixed)
        self.first_features = mixed.to(dtype)  # [1, N, C]
        self.first_parameters = None if parameters is None else parameters.to(dtype)  # [N, 2 * C * D]
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(
        self, features: Sequence[Tensor], boxes: Tensor, every_stage: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refine the proposals.

        Args:
            features: L maps [B, C, Hl, Wl], channels-last.
            boxes: [B, N, 4] float32 xyxy, the learned ones in pixels.
            every_stage: compute every stage's logits, not the last one's only.

        Returns:
            The logits [B, N, K] of the last stage, or of all; the boxes [B, N, 4] of every stage.
        """
        logits, refined = [], []
        x, parameters = self.first_features.expand(len(boxes), -1, -1), self.first_parameters
        for index, stage in enumerate(self.stages):
            if index > 0:
                with self._aside():
                    boxes = self.stages[index - 1].refine(x, boxes)
                refined.append(boxes)
                mixed = stage.mix(x)
                parameters = None  # their memory, the most that the head needs, is for the next ones
                parameters = stage.generate(mixed)
                self._meet()
                x = mixed
            x = stage.interact(features, boxes, x, parameters)
            if every_stage or stage is self.stages[-1]:
                logits.append(stage.classify(x))
        refined.append(self.stages[-1].refine(x, boxes))
        return logits, refined

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Run what is inside beside what comes after it, until :meth:`_meet`; on a CPU before it."""
        if self.side_stream is None:
            yield
            return
        self.side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side_stream):
            yield

    def _meet(self) -> None:
        if self.side_stream is not None:
            torch.cuda.current_stream().wait_stream(self.side_stream)


class _Stage:
    """One stage's weights, and its steps as functions of them."""

    def __init__(
        self,
        stage: Stage,
        config: SparseRCNNConfig,
        device: torch.device,
        dtype: torch.dtype,
        out_layer_rank: int | None = None,
        fp8: bool = False,
    ) -> None:
        self.config, self.strides = config, stage.strides

        def weights(layer: nn.Linear) -> Weights:
            bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
            return layer.weight.detach().to(device, dtype), bias

        def norm(layer: nn.LayerNorm) -> Norm:
            return layer.weight.detach().to(device, torch.float32), layer.bias.detach().to(device, torch.float32)

        self.attends = stage.attends
        if stage.attends:
            attention = stage.self_attn
            self.heads = attention.num_heads
            projected = (attention.in_proj_weight, attention.in_proj_bias)
            self.in_proj = tuple(tensor.detach().to(device, dtype) for tensor in projected)
            self.out_proj, self.norm1 = weights(attention.out_proj), norm(stage.norm1)
        interaction = stage.inst_interact
        self.residual = interaction.residual
        if config.interaction == "dynamic":
            self.dynamic_layer = make_layer(interaction.dynamic_layer, device, dtype, None, fp8)
            self.dynamic_norms = (*norm(interaction.norm1), *norm(interaction.norm2))
            out_layer, self.out_norm = interaction.out_layer, norm(interaction.norm3)
        else:
            out_layer, self.out_norm = interaction.roi.out_layer, norm(interaction.roi.norm)
        self.out_layer = make_layer(out_layer, device, dtype, out_layer_rank, fp8)
        if config.interaction == "concat":
            self.merge, self.merge_norm = weights(interaction.merge), norm(interaction.norm)
        self.norm2, self.norm3 = norm(stage.norm2), norm(stage.norm3)
        self.linear1, self.linear2 = weights(stage.linear1), weights(stage.linear2)
        self.cls_tower = [
            (weights(stage.cls_module[i]), norm(stage.cls_module[i + 1])) for i in _layers(stage.cls_module)
        ]
        self.reg_tower = [
            (weights(stage.reg_module[i]), norm(stage.reg_module[i + 1])) for i in _layers(stage.reg_module)
        ]
        self.class_logits, self.bboxes_delta = weights(stage.class_logits), weights(stage.bboxes_delta)

    def mix(self, x: Tensor) -> Tensor:
        """Self-attention among the proposals x [B, N, C] of each image, residual, norm1."""
        if not self.attends:
            return x
        B, N, C = x.shape
        heads = linear(x, *self.in_proj).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads)  # [B, heads, N, C / heads]
        return ops.add_layer_norm(linear(attended.transpose(1, 2).reshape(B, N, C), *self.out_proj), x, *self.norm1)

    def generate(self, x: Tensor) -> Tensor | None:
        """The proposals' own weights, [B * N, 2 * C * D]; None where the interaction has none."""
        return self.dynamic_layer(x.flatten(0, 1)) if self.config.interaction == "dynamic" else None

    def interact(self, features: Sequence[Tensor], boxes: Tensor, x: Tensor, parameters: Tensor | None) -> Tensor:
        """The interaction of x [B, N, C] with the boxes' RoI features and the FFN: [B, N, C]."""
        return self.absorb(self.pool(features, boxes, parameters), x)

    def absorb(self, pooled: Tensor, x: Tensor) -> Tensor:
        """What x [B, N, C] becomes by ``out_layer`` of the pooled [B, N, P, C], and the FFN."""
        found = ops.add_layer_norm(self.out_layer(pooled.flatten(2)), None, *self.out_norm, relu=True)
        if self.config.interaction == "concat":
            merged = linear(torch.cat([found, x], dim=-1), *self.merge)
            found = ops.add_layer_norm(merged, None, *self.merge_norm, relu=True)
        x = ops.add_layer_norm(found, x if self.residual else None, *self.norm2)
        hidden = linear(x, *self.linear1, relu=True)
        return ops.add_layer_norm(linear(hidden, *self.linear2), x, *self.norm3)

    def pool(self, features: Sequence[Tensor], boxes: Tensor, parameters: Tensor | None) -> Tensor:
        """The boxes' RoI features, convolved with the proposals' own parameters where there are any: [B, N, P, C]."""
        config = self.config
        pooling = (self.strides, config.pooler_resolution, config.sampling_ratio, config.level_rule)
        if parameters is None:
            return ops.multiscale_roi_align(features, boxes, *pooling)
        if len(parameters) == boxes.shape[0] * boxes.shape[1]:
            return ops.roi_dynamic_conv(features, boxes, parameters, *self.dynamic_norms, *pooling)
        # The first stage's parameters are those of every image: read again, not copied for each.
        images = [
            ops.roi_dynamic_conv(
                [f[i : i + 1] for f in features], boxes[i : i + 1], parameters, *self.dynamic_norms, *pooling
            )
            for i in range(len(boxes))
        ]
        return torch.cat(images)

    def classify(self, x: Tensor) -> Tensor:
        """The class tower: logits [B, N, K] of x [B, N, C]."""
        return linear(_run(self.cls_tower, x), *self.class_logits)

    def refine(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The box tower of x [B, N, C], and the boxes [B, N, 4] that its deltas make of ``boxes``."""
        clamp = self.config.delta_clamp
        if not x.is_cuda:
            return ops.apply_deltas(linear(_run(self.reg_tower, x), *self.bboxes_delta), boxes, clamp=clamp)
        tower = [weight for (weight, _), _ in self.reg_tower]
        norm_weights, norm_biases = ([norm[i] for _, norm in self.reg_tower] for i in (0, 1))
        refined = ops.refine_boxes(
            *(x.flatten(0, 1), boxes.flatten(0, 1), tower, norm_weights, norm_biases),
            *(*self.bboxes_delta,),
            clamp=clamp,
        )
        return refined.view_as(boxes)


def _layers(tower: nn.Sequential) -> range:
    """Where the linear layers stand: Linear, LayerNorm, ReLU, Linear..."""
    return range(0, len(tower), 3)


def _run(tower: Sequence[tuple[Weights, Norm]], x: Tensor) -> Tensor:
    for weights, norm in tower:
        x = ops.add_layer_norm(linear(x, *weights), None, *norm, relu=True)
    return x
