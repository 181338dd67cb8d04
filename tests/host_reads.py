"""Proves, without a GPU, that code leaves no value of a tensor to be waited for on the host.

On a GPU each of these operations makes the host wait until the kernels before it are done, and none can be captured in
a CUDA graph. With a GPU ``torch.cuda.set_sync_debug_mode("error")`` sees them; here they are known by their names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class HostRead(AssertionError):
    """A tensor's value was read by the host, or a value of the host copied into a tensor."""


@contextlib.contextmanager
def forbid_host_reads() -> Iterator[None]:
    """Raise :class:`HostRead`, naming the operation, where the code inside would make the host wait for a GPU.

    Seen are Python's and PyTorch's operations, in the backward too, whose functions a ``TorchFunctionMode`` would miss:
    Tensor's methods are exchanged instead. The inside of a kernel is not seen, so that a CPU kernel may look at its
    tensors. What lives on the CPU even in training on a GPU (AdamW's step counts without ``capturable``) is reported
    all the same.
    """
    with contextlib.ExitStack() as stack:
        for owner, names in _READING_FUNCTIONS:
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, _raising(f"{owner.__name__}.{name}")))
        stack.enter_context(mock.patch.object(Tensor, "to", _checked_to(Tensor.to)))
        stack.enter_context(_Operators())
        yield


# Those that read values, and those that copy a value of the host to the device and wait for the copy.
_READING_FUNCTIONS = (
    (Tensor, ("item", "tolist", "cpu", "numpy", "__array__", "__dlpack__", "__contains__", "new_tensor")),
    (Tensor, ("__bool__", "__int__", "__float__", "__complex__", "__index__", "__format__", "__repr__")),
    (torch, ("tensor", "as_tensor", "asarray", "from_numpy")),
)


def _raising(name: str) -> Callable[..., Any]:
    def read(*args: Any, **kwargs: Any) -> Any:
        raise HostRead(f"host read: {name}")

    return read


def _checked_to(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Where everything is on the CPU, only this spelling tells a way back to the host from a way to the device.
        if any(isinstance(value, str) and value == "cpu" for value in (*args, *kwargs.values())):
            raise HostRead('host read: Tensor.to("cpu")')
        return function(tensor, *args, **kwargs)

    return to


# lift_fresh makes a tensor of values of the host, such as a list that is an index. Indexing itself cannot be exchanged:
# a class never gets the slots of a C type back.
_READS = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "lift_fresh"),
        *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "combinations", "multinomial"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    }
)
_INDEX = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        problem = _problem(function, args, kwargs) if function.namespace == "aten" else None
        if problem is not None:
            raise HostRead(f"host read: {problem}")
        return function(*args, **kwargs)


def _problem(function: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """What makes the host wait in a call of an operator of PyTorch, in words."""
    name = function.overloadpacket.__name__
    if name in _READS:
        return f"aten::{name}"
    if name in _INDEX:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"aten::{name} with a mask"
        if any(index.device != args[0].device for index in indices):
            return f"aten::{name} with indices of another device"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "aten::repeat_interleave without an output_size"
    if name == "copy_":
        return _copy_problem(args[1], args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if name == "_to_copy" and kwargs.get("device") is not None:
        return _copy_problem(args[0], kwargs["device"], kwargs.get("non_blocking", False))
    return None


def _copy_problem(source: Tensor, target: torch.device, non_blocking: bool) -> str | None:
    if source.device.type == target.type:
        return None
    if source.device.type == "cpu" and non_blocking and source.is_pinned():
        return None
    return f"a copy from {source.device} to {target}"
