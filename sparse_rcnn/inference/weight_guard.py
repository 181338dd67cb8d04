"""Whether a module's weights are still those that something was made from."""

from __future__ import annotations

import weakref

from torch import Tensor, nn


class WeightGuard:
    """Remembers the parameters, buffers and submodules of ``module`` as they are now, and keeps none of them alive.

    An operation in place raises a tensor's version, ``tensor.data = ...`` and ``module.to(...)`` change its address, an
    assignment changes the tensor or the submodule itself. What is written through ``tensor.data`` in place
    (``tensor.data.copy_(...)``) or in inference mode leaves no trace, in PyTorch as here. A module that nobody has any
    more cannot change.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        parts = [(weakref.ref(part), part) for part in module.modules()]
        self._modules = [
            (part_ref, name, None if child is None else weakref.ref(child))
            for part_ref, part in parts
            for name, child in part._modules.items()
        ]
        self._tensors = [
            (part_ref, table, name, weakref.ref(tensor), _version(tensor), tensor.data_ptr())
            for part_ref, part in parts
            for table in ("_parameters", "_buffers")
            for name, tensor in getattr(part, table).items()
            if tensor is not None
        ]

    def changed(self) -> bool:
        """Whether any of them was replaced, moved or written to since. Reads no values: some 0.3 ms."""
        if self._module() is None:
            return False
        return any(self._child_changed(*child) for child in self._modules) or any(
            self._tensor_changed(*tensor) for tensor in self._tensors
        )

    @staticmethod
    def _child_changed(part_ref: weakref.ref, name: str, child_ref: weakref.ref | None) -> bool:
        part = part_ref()
        if part is None or name not in part._modules:
            return True
        child = part._modules[name]
        return child is not None if child_ref is None else child is None or child is not child_ref()

    @staticmethod
    def _tensor_changed(
        part_ref: weakref.ref, table: str, name: str, tensor_ref: weakref.ref, version: int, address: int
    ) -> bool:
        part, tensor = part_ref(), tensor_ref()
        if part is None or tensor is None or getattr(part, table).get(name) is not tensor:
            return True
        return tensor.data_ptr() != address or _version(tensor) != version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which inference tensors have not
