"""The iterative head for inference: weights in one type, and nothing computed that no detection depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.inference.linear import Layer, make_layer
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.models.dynamic_head import Stage
from sparse_rcnn.onednn import linear, packed

Weights = tuple[Tensor, Tensor | None]  # of a linear layer
Norm = tuple[Tensor, Tensor]  # of a LayerNorm, in float32: the kernels take no other


class InferenceHead:
    """What ``model.head`` computes in evaluation mode.

    The first stage's self-attention and generated parameters depend on the learned proposals alone: they are computed
    here, once. Each later stage has two branches that meet in its RoIAlign: the stage before refines the boxes, while
    this one's self-attention and ``dynamic_layer`` need its features only. On a GPU they run on two streams.

    Args:
        model: where the weights are taken from; on a GPU those that have the device and the type already are shared.
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
        stages = model.head.stages
        proposals = model.init_proposal_features.weight.detach()[None].to(device)  # [1, N, C]
        # In float32 whatever the type is: once and for all, so rounded once.
        first = _Proposals(stages[0], model.config, device, torch.float32, fp8=False)
        mixed = first.mix(proposals.float())
        parameters = first.generate(mixed)
        self.first_features = mixed.to(dtype)  # [1, N, C]
        self.first_parameters = None if parameters is None else parameters.to(dtype)  # [N, 2 * C * D]
        del first  # before there is more
        self.proposals = [_Proposals(stage, model.config, device, dtype, fp8) for stage in stages[1:]]
        self.stages = [_Stage(stage, model.config, device, dtype, out_layer_rank, fp8) for stage in stages]
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
                proposals = self.proposals[index - 1]
                mixed = proposals.mix(x)
                parameters = None  # their memory, the most that the head needs, is for the next ones
                parameters = proposals.generate(mixed)
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


class _Weights:
    """Takes a stage's weights over: to a device, in one type, on a CPU in oneDNN's order for one image's proposals."""

    def __init__(self, config: SparseRCNNConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.device, self.dtype = config.num_proposals, device, dtype

    def linear(self, layer: nn.Linear) -> Weights:
        return self.product(layer.weight, layer.bias)

    def product(self, weight: Tensor, bias: Tensor | None) -> Weights:
        bias = None if bias is None else bias.detach().to(self.device, self.dtype)
        return packed(weight.detach().to(self.device, self.dtype), self.rows), bias

    def layer(self, layer: nn.Linear, rank: int | None, fp8: bool) -> Layer:
        return make_layer(layer, self.device, self.dtype, self.rows, rank, fp8)

    def norm(self, layer: nn.LayerNorm) -> Norm:
        return layer.weight.detach().to(self.device, torch.float32), layer.bias.detach().to(self.device, torch.float32)

    def tower(self, tower: nn.Sequential) -> list[tuple[Weights, Norm]]:
        layers = range(0, len(tower), 3)  # Linear, LayerNorm, ReLU, Linear...
        return [(self.linear(tower[i]), self.norm(tower[i + 1])) for i in layers]


class _Proposals:
    """The part of a stage that sees no image: self-attention, and the proposals' own weights."""

    def __init__(
        self, stage: Stage, config: SparseRCNNConfig, device: torch.device, dtype: torch.dtype, fp8: bool
    ) -> None:
        own = _Weights(config, device, dtype)
        self.attends = stage.attends
        if stage.attends:
            attention = stage.self_attn
            self.heads = attention.num_heads
            self.in_proj = own.product(attention.in_proj_weight, attention.in_proj_bias)
            self.out_proj, self.norm1 = own.linear(attention.out_proj), own.norm(stage.norm1)
        dynamic = config.interaction == "dynamic"
        self.dynamic_layer = own.layer(stage.inst_interact.dynamic_layer, None, fp8) if dynamic else None

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
        return None if self.dynamic_layer is None else self.dynamic_layer(x.flatten(0, 1))


class _Stage:
    """The rest of a stage, which begins with the RoI features: its weights, and its steps as functions of them."""

    def __init__(
        self,
        stage: Stage,
        config: SparseRCNNConfig,
        device: torch.device,
        dtype: torch.dtype,
        out_layer_rank: int | None,
        fp8: bool,
    ) -> None:
        self.config, self.strides = config, stage.strides
        own = _Weights(config, device, dtype)
        interaction = stage.inst_interact
        self.residual = interaction.residual
        if config.interaction == "dynamic":
            self.dynamic_norms = (*own.norm(interaction.norm1), *own.norm(interaction.norm2))
            out_layer, out_norm = interaction.out_layer, interaction.norm3
        else:
            out_layer, out_norm = interaction.roi.out_layer, interaction.roi.norm
        self.out_layer, self.out_norm = own.layer(out_layer, out_layer_rank, fp8), own.norm(out_norm)
        if config.interaction == "concat":
            self.merge, self.merge_norm = own.linear(interaction.merge), own.norm(interaction.norm)
        self.norm2, self.norm3 = own.norm(stage.norm2), own.norm(stage.norm3)
        self.linear1, self.linear2 = own.linear(stage.linear1), own.linear(stage.linear2)
        self.cls_tower, self.reg_tower = own.tower(stage.cls_module), own.tower(stage.reg_module)
        self.class_logits, self.bboxes_delta = own.linear(stage.class_logits), own.linear(stage.bboxes_delta)

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


def _run(tower: Sequence[tuple[Weights, Norm]], x: Tensor) -> Tensor:
    for weights, norm in tower:
        x = ops.add_layer_norm(linear(x, *weights), None, *norm, relu=True)
    return x
