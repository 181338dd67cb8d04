"""Whether a module's weights are still those that something was made from."""

from __future__ import annotations

from torch import Tensor, nn


class WeightGuard:
    """Remembers the parameters and buffers of ``module`` as they are now.

    An operation in place raises a tensor's version, ``tensor.data = ...`` and ``module.to(...)`` change its address, an
    assignment changes the tensor itself. What is written through ``tensor.data`` in place (``tensor.data.copy_(...)``)
    or in inference mode leaves no trace, in PyTorch as here.
    """

    def __init__(self, module: nn.Module) -> None:
        self._entries = [
            (table, name, tensor, _version(tensor), tensor.data_ptr())
            for part in module.modules()
            for table in (part._parameters, part._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]

    def changed(self) -> bool:
        """Whether any of them was replaced, moved or written to since. Reads no values: some microseconds."""
        return any(
            table.get(name) is not tensor or tensor.data_ptr() != address or _version(tensor) != version
            for table, name, tensor, version, address in self._entries
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which inference tensors have not
