"""Does an implementation do what its specification says? The comparison, and small random problems of each operator.

``python -m sparse_rcnn.doctor`` runs the problems on what is installed; the benchmarks hold what they time to the
same comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn import ops

# Absolute and relative, of the types that are exact enough to have one.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
EAGER_FACTOR = 2.0
SECONDS = 5.0  # that the problems of one operator may take
ROUNDS = 3
# xyxy, after one that is not a number: inverted, and one for each of P3, P4 and P5.
_AWKWARD = (
    (90.0, 20.0, 30.0, 60.0),
    (5.0, 20.0, 155.0, 140.0),
    (-50.0, 10.0, 250.0, 300.0),
    (-40.0, -30.0, 400.0, 500.0),
)


class Specification:
    """What a reference gives for one set of inputs, exactly (in float64) and in the inputs' own type.

    Args:
        reference: the specification, differentiable.
        inputs: its keyword arguments.
        wrt: the arguments (tensors or lists of them) whose gradients are compared as well.
        keep: arguments that stay in their type in float64, since the specification computes in it (boxes).
    """

    def __init__(
        self, reference: Callable[..., Any], inputs: dict[str, Any], wrt: Sequence[str] = (), keep: Sequence[str] = ()
    ) -> None:
        self._inputs, self._wrt = inputs, wrt
        exact_inputs = {name: value if name in keep else _widen(value) for name, value in inputs.items()}
        self._grads = _random_gradients(reference, inputs) if wrt else []
        self._exact = _evaluate(reference, exact_inputs, wrt, [grad.double() for grad in self._grads])
        eager = _evaluate(reference, inputs, wrt, self._grads)
        self._eager_error = {label: _greatest_error(eager[label], exact) for label, exact in self._exact.items()}

    def compare(self, implementation: Callable[..., Any], slack: float = 1.0) -> dict[str, Any]:
        """One record; ``passed`` says whether values and gradients are right.

        An element is right within 1e-5, absolute and relative, of the exact value (float64: 1e-10). A tensor is right
        as well when its greatest error is at most twice that of the reference in the same type: the only measure of
        half types, and for float32 that of sums of thousands of terms. ``slack`` multiplies both.
        """
        problem, actual = self._run(implementation)
        if problem is not None:
            return {"passed": False, "error": problem}
        worst: dict[str, Any] = {"tensor": None, "max_error": 0.0, "share_of_allowed": 0.0}
        for label, exact in self._exact.items():
            value = actual.get(label)
            if value is None or value.shape != exact.shape:
                got = "nothing" if value is None else f"shape {list(value.shape)}"
                return {"passed": False, "error": f"{label}: expected shape {list(exact.shape)}, got {got}"}
            share = _share_of_allowed(value, exact, self._eager_error[label], slack)
            if not share <= worst["share_of_allowed"]:  # NaN too
                worst = {"tensor": label, "max_error": _greatest_error(value, exact), "share_of_allowed": share}
            if share != share:
                break
        return {"passed": worst["share_of_allowed"] <= 1.0, **worst}

    def problem(self, implementation: Callable[..., Any]) -> str | None:
        """Why an implementation does not run on these inputs, or None if it does."""
        return self._run(implementation)[0]

    def _run(self, implementation: Callable[..., Any]) -> tuple[str | None, dict[str, Tensor]]:
        try:
            return None, _evaluate(implementation, self._inputs, self._wrt, self._grads)
        except Exception as error:  # whoever asked says what did not run, and goes on
            return f"{type(error).__name__}: {_first_line(error)}", {}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def tensors_in(values: object) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dicts, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from tensors_in(value)


def leaves(inputs: dict[str, Any], wrt: Sequence[str]) -> tuple[dict[str, Any], list[Tensor]]:
    """The inputs with those of ``wrt`` as leaves that want a gradient, and these leaves in a row."""
    detached: dict[str, Any] = {}
    for name in wrt:
        value = inputs[name]
        if isinstance(value, Tensor):
            detached[name] = value.detach().requires_grad_()
        else:
            detached[name] = [tensor.detach().requires_grad_() for tensor in value]
    return {**inputs, **detached}, list(tensors_in(detached))


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(_widen(item) for item in value) if isinstance(value, list | tuple) else value


def _random_gradients(reference: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """A random gradient of each output, so that no error in one element hides behind another's."""
    with torch.no_grad():
        outputs = list(tensors_in(reference(**inputs)))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def _evaluate(
    implementation: Callable[..., Any], inputs: dict[str, Any], wrt: Sequence[str], grads: list[Tensor]
) -> dict[str, Tensor]:
    """Label -> tensor: the outputs and the gradients."""
    inputs, wanted = leaves(inputs, wrt)
    with torch.set_grad_enabled(bool(wrt)):
        outputs = list(tensors_in(implementation(**inputs)))
    values = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if not wrt:
        return values
    labels = [
        f"gradient of {name}" if isinstance(inputs[name], Tensor) else f"gradient of {name}[{index}]"
        for name in wrt
        for index, _ in enumerate(tensors_in(inputs[name]))
    ]
    return values | dict(zip(labels, torch.autograd.grad(outputs, wanted, grads), strict=True))


def _greatest_error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0


def _share_of_allowed(actual: Tensor, exact: Tensor, eager_error: float, slack: float) -> float:
    """The greatest error as a share of what is allowed; above 1, or NaN, is wrong."""
    if exact.numel() == 0:
        return 0.0
    floor = 1e-6 * (exact.abs().max().item() or 1.0)
    share = _greatest_error(actual, exact) / (slack * EAGER_FACTOR * eager_error + floor)
    if actual.dtype in TOLERANCE:
        allowed = slack * TOLERANCE[actual.dtype] * (1 + exact.abs())
        share = min(share, ((actual.double() - exact).abs() / allowed).max().item())
    return share


def steady_norm(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight and bias [size] of a LayerNorm, random, after which no value is near zero.

    A ReLU follows it, whose gradient jumps at zero: of two implementations that are both right, rounding would let one
    of them pass a gradient that the other stops.
    """
    signs = torch.randint(0, 2, (2, size), generator=generator) * 2.0 - 1
    values = torch.rand(2, size, generator=generator)
    return signs[0] * (0.1 + 0.1 * values[0]), signs[1] * (1.5 + values[1])


@dataclass(frozen=True)
class Problem:
    """Inputs of an operator, small and awkward; the fields are as in :class:`Specification`."""

    inputs: dict[str, Any]
    wrt: Sequence[str]
    keep: Sequence[str] = ()


def self_test(operator: str, device: torch.device) -> dict[str, Any]:
    """Values and gradients of an operator on small random problems, against its reference.

    Returns:
        The record of :meth:`Specification.compare` that is worst, with the ``dtype`` it came from, how many
        ``problems`` were tried and the ``seconds`` they took (no more are begun after five).
    """
    reference, implementation = getattr(ops, f"{operator}_reference"), getattr(ops, operator)
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float16,) if device.type == "cuda" else ())
    start, worst, tried = time.perf_counter(), None, 0
    for seed, dtype in ((seed, dtype) for seed in range(ROUNDS) for dtype in dtypes):
        if worst is not None and time.perf_counter() - start > SECONDS:
            break
        problem = make_problem(operator, seed, dtype, device)
        specification = Specification(reference, problem.inputs, problem.wrt, problem.keep)
        record = {"dtype": str(dtype).removeprefix("torch."), **specification.compare(implementation)}
        tried += 1
        if worst is None or not record["passed"] or record["share_of_allowed"] > worst["share_of_allowed"]:
            worst = record
        if not record["passed"]:
            break
    return {**worst, "problems": tried, "seconds": round(time.perf_counter() - start, 3)}


def has_self_test(operator: str) -> bool:
    """Whether there are problems of this operator: of every one that has kernels."""
    return operator in _PROBLEMS


def make_problem(operator: str, seed: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """One random problem of an operator; an odd seed has the channels of the published models."""
    return _PROBLEMS[operator](_Random(seed, dtype, device))


class _Random:
    """Draws tensors of one type on one device, the same numbers on all of them."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.channels, self.inner = (256, 64) if seed % 2 else (32, 16)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self._generator) * scale
        return values.to(self.device, self.dtype)

    def boxes(self, *shape: int, awkward: bool = False) -> Tensor:
        """xyxy [*shape, 4] float32 on an image of 128 x 160, small ones.

        The awkward ones begin with those of _AWKWARD.
        """
        corners = torch.rand(*shape, 2, generator=self._generator) * 120
        sizes = torch.rand(*shape, 2, generator=self._generator) * 100 + 2
        boxes = torch.cat([corners, corners + sizes], dim=-1)
        if awkward:
            boxes[..., 0, :] = float("nan")
            for index, box in enumerate(_AWKWARD, start=1):
                boxes[..., index, :] = torch.tensor(box)
        return boxes.to(self.device)

    def pyramid(self, batch: int) -> list[Tensor]:
        """Channels-last maps of strides 4 to 32."""
        maps = (self(batch, self.channels, 128 // stride, 160 // stride) for stride in (4, 8, 16, 32))
        return [feature.contiguous(memory_format=torch.channels_last) for feature in maps]

    def norm(self, size: int) -> tuple[Tensor, Tensor]:
        weight, bias = steady_norm(size, self._generator)
        return weight.to(self.device, self.dtype), bias.to(self.device, self.dtype)

    def norms(self) -> dict[str, Tensor]:
        named = {}
        for name, size in (("norm1", self.inner), ("norm2", self.channels)):
            named[f"{name}_weight"], named[f"{name}_bias"] = self.norm(size)
        return named

    def sizes(self, batch: int) -> Tensor:
        """(height, width) of the images [batch, 2]."""
        return torch.tensor([128.0, 160.0], device=self.device).expand(batch, 2)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Random, int64."""
        return torch.randint(below, shape, generator=self._generator).to(self.device)

    def matches(self, stages: int, batch: int, targets: int, proposals: int) -> Tensor:
        """[stages, batch, targets]: another proposal for each target, none for the last one."""
        chosen = [torch.randperm(proposals, generator=self._generator)[:targets] for _ in range(stages * batch)]
        matches = torch.stack(chosen).view(stages, batch, targets)
        matches[..., -1] = -1
        return matches.to(self.device)

    def parameters(self, rois: int) -> Tensor:
        return self(rois, 2 * self.channels * self.inner, scale=self.channels**-0.5)


def _multiscale_roi_align(random: _Random) -> Problem:
    inputs = {"features": random.pyramid(2), "boxes": random.boxes(2, 7, awkward=True), "strides": (4, 8, 16, 32)}
    return Problem(inputs, wrt=("features",), keep=("boxes",))


def _dynamic_conv(random: _Random) -> Problem:
    norms = random.norms()
    inputs = {"roi_features": random(5, 49, random.channels), "parameters": random.parameters(5), **norms}
    return Problem(inputs, wrt=("roi_features", "parameters", *norms))


def _roi_dynamic_conv(random: _Random) -> Problem:
    pooled, norms = _multiscale_roi_align(random), random.norms()
    inputs = {**pooled.inputs, "parameters": random.parameters(14), **norms}
    return Problem(inputs, wrt=("features", "parameters", *norms), keep=pooled.keep)


def _apply_deltas(random: _Random) -> Problem:
    inputs = {"deltas": random(3, 11, 4), "boxes": random.boxes(3, 11), "clamp": (None, 1.5)}
    return Problem(inputs, wrt=("deltas", "boxes"))


def _add_layer_norm(random: _Random) -> Problem:
    C = random.channels
    weight, bias = random.norm(C)
    inputs = {"x": random(13, C), "residual": random(13, C), "weight": weight, "bias": bias, "relu": True}
    return Problem(inputs, wrt=("x", "residual", "weight", "bias"))


def _linear_assignment(random: _Random) -> Problem:
    counts = torch.tensor([7, 0, 4], device=random.device)
    return Problem({"cost": random(3, 20, 7), "counts": counts}, wrt=())


def _matching_cost(random: _Random) -> Problem:
    inputs = {"logits": random(3, 2, 20, 7), "boxes": random.boxes(3, 2, 20), "target_labels": random.integers(7, 2, 5)}
    inputs |= {"target_boxes": random.boxes(2, 5), "target_counts": torch.tensor([5, 2], device=random.device)}
    return Problem(inputs | {"image_sizes": random.sizes(2)}, wrt=())


def _normalize_pad(random: _Random) -> Problem:
    images = [random.integers(256, 37, 40, 3).byte().permute(2, 0, 1), random.integers(256, 3 * 40 * 40).byte()]
    sizes = 20 + torch.cat([random.integers(17, 2, 2), random.integers(50, 2, 2)], dim=1)
    inputs = {"images": images, "sizes": sizes, "shape": (72, 83), "dtype": random.dtype}
    return Problem(inputs | {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}, wrt=())


def _refine_boxes(random: _Random) -> Problem:
    C = random.channels
    inputs = {"x": random(13, C), "boxes": random.boxes(13), "delta_weight": random(4, C, scale=C**-0.5)}
    inputs |= {"delta_bias": random(4), "tower_weights": [random(C, C, scale=C**-0.5) for _ in range(3)]}
    norms = [random.norm(C) for _ in range(3)]
    inputs |= {"norm_weights": [weight for weight, _ in norms], "norm_biases": [bias for _, bias in norms]}
    return Problem(inputs, wrt=())


def _set_box_loss(random: _Random) -> Problem:
    inputs = {"boxes": random.boxes(3, 2, 20), "matches": random.matches(3, 2, 5, 20)}
    return Problem(inputs | {"target_boxes": random.boxes(2, 5), "image_sizes": random.sizes(2)}, wrt=("boxes",))


def _set_focal_loss(random: _Random) -> Problem:
    inputs = {"logits": random(3, 2, 20, 7), "matches": random.matches(3, 2, 5, 20)}
    return Problem(inputs | {"target_labels": random.integers(7, 2, 5)}, wrt=("logits",))


def _winograd_conv2d(random: _Random) -> Problem:
    """In float32, the kernels' only type."""
    inputs = {"x": random(2, 32, 9, 14), "bias": random(64), "residual": random(2, 64, 9, 14)}
    inputs["weight"] = ops.winograd_weight(random(64, 32, 3, 3, scale=0.06).float())
    return Problem({name: tensor.float() for name, tensor in inputs.items()} | {"relu": True}, wrt=())


_PROBLEMS: dict[str, Callable[[_Random], Problem]] = {
    "add_layer_norm": _add_layer_norm,
    "apply_deltas": _apply_deltas,
    "dynamic_conv": _dynamic_conv,
    "linear_assignment": _linear_assignment,
    "matching_cost": _matching_cost,
    "multiscale_roi_align": _multiscale_roi_align,
    "normalize_pad": _normalize_pad,
    "refine_boxes": _refine_boxes,
    "roi_dynamic_conv": _roi_dynamic_conv,
    "set_box_loss": _set_box_loss,
    "set_focal_loss": _set_focal_loss,
    "winograd_conv2d": _winograd_conv2d,
}
