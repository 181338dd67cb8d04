"""The steps of an optimized detector one by one: a call of each, and the least time that the machine allows it.

The floor of a step is the sum over its operations of the larger of two times: its FLOPs at the machine's best matrix
product, and what it reads and writes, once, at the machine's best copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from sparse_rcnn.inference.convolution import FusedConv2d
from sparse_rcnn.inference.head import InferenceHead
from sparse_rcnn.inference.program import Program
from sparse_rcnn.models.proposals import to_pixels

_BACKBONE = {"stem": r"body_(conv1|bn1|relu|maxpool)", **{f"res{i}": rf"body_layer{i - 1}_" for i in range(2, 6)}}


@dataclass
class Component:
    """One step.

    Attributes:
        call: does it once.
        operations: (FLOPs, bytes) of each.
    """

    call: Callable[[], Any]
    operations: list[tuple[float, float]] = field(default_factory=list)

    def floor(self, flop_per_s: float, bytes_per_s: float) -> float:
        """Seconds."""
        return sum(max(flops / flop_per_s, size / bytes_per_s) for flops, size in self.operations)

    @property
    def gflop(self) -> float:
        """Of all operations."""
        return sum(flops for flops, _ in self.operations) / 1e9


def components(program: Program, images: list[Tensor], sizes: Tensor, shape: tuple[int, int]) -> dict[str, Component]:
    """The steps of ``program`` on these images, in their order; arguments are those of a call of it.

    The backbone is in pieces if it is a ResNet that was fused.
    """
    batch = program.normalize(images, sizes, shape)
    pixels = sum(image.nbytes for image in images)
    steps = {
        "preprocessing": Component(lambda: program.normalize(images, sizes, shape), [(0, pixels + batch.nbytes)]),
        **dict(_backbone(program.backbone, batch)),
    }
    features, seen = program.backbone(batch), sizes[:, 2:].float()
    steps |= _head(program.head, features, to_pixels(program.proposal_boxes, seen))
    logits, boxes = program.head(features, to_pixels(program.proposal_boxes, seen))
    selected = (logits[-1].float(), boxes[-1], seen, sizes[:, :2].float())
    steps["selection"] = Component(lambda: program._select(*selected), [(0, selected[0].nbytes)])
    return steps


def _backbone(backbone: Any, batch: Tensor) -> Iterator[tuple[str, Component]]:
    names = [*_BACKBONE, "FPN"]
    nodes = backbone.graph.nodes if isinstance(backbone, fx.GraphModule) else ()
    if {_piece(node.name) for node in nodes} != set(names):
        yield "backbone+FPN", Component(lambda: backbone(batch))
        return
    pieces = split_module(backbone, None, lambda node: names.index(_piece(node.name)))
    recorder = _Recorder(pieces)
    recorder.run(batch)
    for index, name in enumerate(names):
        piece, inputs = recorder.calls[f"submod_{index}"]
        operations = _Operations(piece)
        operations.run(*(tensor.clone() for tensor in inputs))
        yield name, Component(lambda piece=piece, inputs=inputs: piece(*inputs), operations.found)


def _piece(node: str) -> str:
    return next((name for name, pattern in _BACKBONE.items() if re.match(pattern, node)), "FPN")


class _Recorder(fx.Interpreter):
    """Keeps what every piece was called with."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: dict[str, tuple[Any, tuple[Tensor, ...]]] = {}

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        self.calls[target] = self.fetch_attr(target), args
        return super().call_module(target, args, kwargs)


class _Operations(fx.Interpreter):
    """Counts what a piece of the backbone computes and moves."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[float, float]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_module", "call_function") and isinstance(result, Tensor):
            inputs, _ = self.fetch_args_kwargs_from_env(n)
            layer = self.fetch_attr(n.target) if n.op == "call_module" else None
            is_conv = isinstance(layer, FusedConv2d)
            weights, flops = (layer.weight, 2 * layer.products * result[:, 0].numel()) if is_conv else (None, 0)
            tensors = [result, weights, *inputs]
            self.found.append((flops, sum(t.nbytes for t in tensors if isinstance(t, Tensor))))
        return result


def _head(head: InferenceHead, features: list[Tensor], boxes: Tensor) -> dict[str, Component]:
    """Of all stages together; the branches one after the other."""
    B, first, last = len(boxes), head.stages[0], head.stages[-1]
    x = head.first_features.expand(B, -1, -1).contiguous()
    later, config = head.proposals, head.config
    parameters = [head.first_parameters, *(own.generate(own.mix(x)) for own in later)]
    pooled = first.pool(features, boxes, parameters[0])

    def each(parts: list[Any], step: str, *arguments: Any) -> Callable[[], Any]:
        return lambda: [getattr(part, step)(*arguments) for part in parts]

    def pool() -> None:
        for stage, own in zip(head.stages, parameters, strict=True):
            stage.pool(features, boxes, own)

    def towers() -> None:
        for stage in head.stages:
            stage.refine(x, boxes)
        last.classify(x)

    N, C, D, F, P = x.shape[1], x.shape[2], config.dim_dynamic, config.dim_feedforward, pooled.shape[2]
    S, K, size, R = len(head.stages), config.num_classes, x.element_size(), B * x.shape[1]

    def linear(inputs: int, outputs: int, times: int) -> list[tuple[float, float]]:
        moved = size * (inputs * outputs + R * (inputs + outputs))
        return [(2 * R * inputs * outputs, moved)] * times

    steps = {}
    if any(own.attends for own in later):
        attended = [(4 * R * N * C, 4 * size * R * C)] * len(later)
        operations = [*linear(C, 3 * C, len(later)), *attended, *linear(C, C, len(later))]
        steps["attention"] = Component(each(later, "mix", x), operations)
    if config.interaction == "dynamic":
        steps["dynamic_layer"] = Component(each(later, "generate", x), linear(C, 2 * C * D, len(later)))
        steps["interaction"] = Component(pool, [(4 * R * P * C * D, size * R * (2 * C * D + P * C))] * S)
    else:
        steps["interaction"] = Component(pool, [(0, size * R * P * C)] * S)
    dense = [*linear(P * C, C, S), *linear(C, F, S), *linear(F, C, S)]
    steps["out_layer, FFN"] = Component(each(head.stages, "absorb", pooled, x), dense)
    layers = S * config.num_reg_layers + config.num_cls_layers
    steps["towers, boxes"] = Component(towers, [*linear(C, C, layers), *linear(C, 4, S), *linear(C, K, 1)])
    return steps
