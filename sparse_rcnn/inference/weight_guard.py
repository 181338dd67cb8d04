"""Whether a module's weights are still those that something was made from."""

from __future__ import annotations

from torch import Tensor, nn


class WeightGuard:
    """Remembers the parameters, buffers and submodules of ``module`` as they are now.

    An operation in place raises a tensor's version, ``tensor.data = ...`` and ``module.to(...)`` change its address, an
    assignment changes the tensor or the submodule itself. What is written through ``tensor.data`` in place
    (``tensor.data.copy_(...)``) or in inference mode leaves no trace, in PyTorch as here.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._modules = [(part._modules, name, child) for part in parts for name, child in part._modules.items()]
        self._tensors = [
            (table, name, tensor, _version(tensor), tensor.data_ptr())
            for part in parts
            for table in (part._parameters, part._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]

    def changed(self) -> bool:
        """Whether any of them was replaced, moved or written to since. Reads no values: some 0.2 ms."""
        return any(table.get(name) is not child for table, name, child in self._modules) or any(
            table.get(name) is not tensor or tensor.data_ptr() != address or _version(tensor) != version
            for table, name, tensor, version, address in self._tensors
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which inference tensors have not
