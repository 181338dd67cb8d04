"""The moving average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


def build_ema(model: nn.Module, decay: float, state: dict[str, Any] | None = None) -> ModelEmaV3 | None:
    """An exponential moving average of all parameters and buffers of ``model``, or None where ``decay`` is 0.

    It is timm's, for ``AveragedModel`` of torch reads a count on the host in every step. The decay rises to its value
    as 1 - step^(-2/3): the average of a short run is over its last part too, and never holds the initial weights. It is
    to be updated after the step, replayed from a CUDA graph or not: ``ema.update(model, step)``, steps from 1.

    Args:
        model: what to average; ``module`` of the result is its copy, in evaluation mode.
        decay: 0..1, of the old average in the new one.
        state: a ``state_dict`` to go on from; None, or an empty one, starts with the weights of ``model``.
    """
    if decay == 0:
        return None
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(model, decay=decay, use_warmup=True)
    if state:
        ema.load_state_dict(state)
    return ema
