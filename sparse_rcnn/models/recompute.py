"""Trading a cheap computation in the backward pass for memory held since the forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_DROPPED = object()


@contextlib.contextmanager
def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Inside the block, autograd does not keep ``tensor`` for the backward pass, which calls ``compute`` instead.

    Args:
        tensor: a result that operators in the block save whole.
        compute: makes the same values again; called without grad and under the autocast state of now.
    """
    device_type = tensor.device.type
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    # The address, not the tensor: holding on to that is what this is to avoid.
    address, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: Tensor) -> Any:
        return _DROPPED if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(packed: Any) -> Tensor:
        if packed is not _DROPPED:
            return packed
        with torch.no_grad(), torch.autocast(device_type, dtype, enabled=enabled):
            return compute()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
