"""One gradient buffer for all operators that read the same feature maps.

Each of the six stages reads the pyramid, and autograd would make a full gradient of it for every one of them and add
them up: memory and time for six pyramids. Maps that went through :func:`share_gradients` carry a buffer that the
operators' backward kernels add to instead.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From this size on a CPU buffer is of huge pages where the system has them: of ordinary ones, the 91 MB of an
# 800x1333 image take longer to fault in (some 25 ms) than everything else in the backward of RoIAlign.
HUGE_PAGES_FROM = 32 * 2**20


class SharedFeatures(tuple[Tensor, ...]):
    """Feature maps whose gradient is summed in one buffer; made by :func:`share_gradients`."""

    gradient: SharedGradient


def share_gradients(features: Sequence[Tensor]) -> Sequence[Tensor]:
    """Let the backward of every operator that reads ``features`` add into one buffer.

    Args:
        features: L maps [B, C, Hl, Wl] of one floating dtype.

    Returns:
        The same maps, for :func:`multiscale_roi_align` and :func:`roi_dynamic_conv`; any other use of them gets its
        gradient in the ordinary way, and all are added. Maps that need no gradient, and maps in a graph that
        torch.compile traces, are returned as they are.
    """
    needed = torch.is_grad_enabled() and any(feature.requires_grad for feature in features)
    if not needed or torch.compiler.is_compiling():
        return features
    gradient = SharedGradient()
    shared = SharedFeatures(_Share.apply(gradient, *features))
    shared.gradient = gradient
    return shared


class SharedGradient:
    """The buffer of one pyramid during one backward pass."""

    def __init__(self) -> None:
        self._cells: Tensor | None = None
        self._pass = -1

    def cells(self, features: Sequence[Tensor]) -> Tensor:
        """The buffer [B * sum(Hl * Wl), C] of this backward pass, of zeros when it is the first to ask."""
        # A pass that did not reach the maps (gradients of something else were asked for) leaves its sums behind.
        current = torch._C._current_graph_task_id()
        if self._cells is None or self._pass != current:
            self._cells, self._pass = new_grad_cells(features), current
        return self._cells

    def take(self) -> Tensor | None:
        """The sums of this backward pass, which end with it; None if no operator added any."""
        cells, self._cells = self._cells, None
        return cells if self._pass == torch._C._current_graph_task_id() else None


def new_grad_cells(features: Sequence[Tensor]) -> Tensor:
    """Zeros for the gradient of every cell of all maps, [B * sum(Hl * Wl), C], in the accumulation type."""
    B, C = features[0].shape[:2]
    cells = sum(feature.shape[2] * feature.shape[3] for feature in features)
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    size = B * cells * C * dtype.itemsize
    # Not the tensors that stand for others while a graph is traced.
    real = type(features[0]) is Tensor and features[0].device.type == "cpu"
    if real and size >= HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # zeros; the tensor keeps it
        pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=dtype).view(B * cells, C)
    return torch.zeros(B * cells, C, dtype=dtype, device=features[0].device)


def split_grad_cells(cells: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """The gradient [B, C, Hl, Wl] of each map, channels-last views of the buffer where the dtype is its own."""
    B, C = features[0].shape[:2]
    sizes = [B * feature.shape[2] * feature.shape[3] for feature in features]
    parts = cells.split(sizes)
    return [
        part.view(B, feature.shape[2], feature.shape[3], C).permute(0, 3, 1, 2).to(feature.dtype)
        for part, feature in zip(parts, features, strict=True)
    ]


def call_sharing(
    features: Sequence[Tensor],
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *arguments: Any,
) -> Tensor:
    """Run an operator whose backward adds the gradient of ``features`` to their shared buffer.

    Args:
        features: of :func:`share_gradients`.
        forward: ``forward(features, *arguments)``, the native operator.
        backward: ``backward(grad, features, cells, *arguments)`` gives the gradients of ``arguments`` and adds that of
            the features into ``cells``.
        arguments: the operator's other arguments.
    """
    return _Sharing.apply(features.gradient, forward, backward, len(features), *features, *arguments)


class _Share(torch.autograd.Function):
    """The maps as they are; their gradient is the buffer's, plus whatever came in the ordinary way."""

    @staticmethod
    def forward(ctx: Any, gradient: SharedGradient, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*features)
        return tuple(feature.view_as(feature) for feature in features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cells = ctx.gradient.take()
        if cells is None:
            return None, *grads
        shared = split_grad_cells(cells, ctx.saved_tensors)
        return None, *(own if grad is None else own + grad for own, grad in zip(shared, grads, strict=True))


class _Sharing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: SharedGradient, forward: Callable, backward: Callable, levels: int, *inputs: Any
    ) -> Tensor:
        features, arguments = list(inputs[:levels]), inputs[levels:]
        ctx.gradient, ctx.backward_function, ctx.levels = gradient, backward, levels
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in arguments]
        ctx.places = [index for index, value in enumerate(arguments) if isinstance(value, Tensor)]
        ctx.save_for_backward(*features, *tensors)
        return forward(features, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        features, arguments = list(saved[: ctx.levels]), list(ctx.others)
        for index, tensor in zip(ctx.places, saved[ctx.levels :], strict=True):
            arguments[index] = tensor
        grads = ctx.backward_function(grad, features, ctx.gradient.cells(features), *arguments)
        return None, None, None, None, *(None for _ in features), *grads
