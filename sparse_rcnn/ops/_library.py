"""The native libraries, and which implementation serves which operator.

An operator ``<op>`` has its schema in ``csrc/schemas.cpp`` and its kernels in ``_C.so`` (CPU) and ``_C_cuda.so``
(CUDA); the parts of it that are Python (fake, autograd, autocast) are declared in ``ops/<op>.py`` by :func:`declare`.
Triton kernels, in ``kernels/<op>.py``, serve on GPUs. Where no kernel is, the reference serves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

AUTO, NATIVE, TRITON, REFERENCE = "auto", "native", "triton", "reference"
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}


@dataclass(frozen=True)
class Operator:
    """The Python side of a native operator."""

    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    # backward(native, ctx, *grads): ``native`` is the namespace whose kernels the forward ran.
    backward: Callable[..., Any] | None = None
    # autocast(dtype, *args) -> args with those tensors cast that the operator wants in the autocast dtype.
    autocast: Callable[..., tuple[Any, ...]] | None = None


_operators: dict[str, Operator] = {}
_triton_operators: set[str] = set()
_namespaces: dict[str, str] = {}  # backend -> namespace of torch.ops
_served: set[tuple[str, str, str]] = set()  # (backend, operator, device type)
_problems: dict[str, str] = {}  # library -> why it is not loaded
_libraries: list[torch.library.Library] = []  # registrations live as long as these
_backend = AUTO


def declare(name: str, **parts: Any) -> None:
    """Declare the Python side of an operator; see :class:`Operator`."""
    _operators[name] = Operator(**parts)


def declare_triton(name: str) -> None:
    """Declare that ``kernels/<name>.py`` has a function of that name which serves CUDA tensors."""
    _triton_operators.add(name)


def kernels(name: str, device: torch.device) -> Any | None:
    """What serves ``name`` on ``device``: a namespace of ``torch.ops``, a module of Triton kernels, or None for the
    reference.

    Raises:
        RuntimeError: a backend was asked for by name and has no kernel for this operator and device.
    """
    chosen = serving(name, device.type)
    if chosen == REFERENCE:
        if _backend in (AUTO, REFERENCE):
            return None
        raise RuntimeError(f"{name}: the {_backend} backend was asked for and {why_not(name, device.type)}")
    if chosen == TRITON:
        return importlib.import_module(f"sparse_rcnn.kernels.{name}")
    return getattr(torch.ops, _namespaces[chosen])


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of all operators inside a ``with`` block, for the whole process.

    Args:
        name: ``auto`` (native where there is a kernel, else Triton on GPUs, else the reference; the default),
            ``native``, ``triton`` or ``reference``. The environment variable ``SPARSE_RCNN_BACKEND`` sets what holds
            outside of any block.

    Raises:
        ValueError: an unknown name.
        RuntimeError: later, by an operator that the named backend has no kernel for.
    """
    global _backend
    before, _backend = _backend, _known(name, "backend")
    try:
        yield
    finally:
        _backend = before


def active_backend() -> str:
    """The backend in force."""
    return _backend


def is_reference() -> bool:
    """Whether the reference backend is in force, under which the whole detector computes as the official code does."""
    return _backend == REFERENCE


def serving(name: str, device_type: str) -> str:
    """``native``, ``triton`` or ``reference`` (or a backend that a test added): who serves ``name`` on this device."""
    if _backend != TRITON:
        chosen = NATIVE if _backend == AUTO else _backend
        if (chosen, name, device_type) in _served:
            return chosen
    if _backend == AUTO and device_type == "cuda" or _backend == TRITON:
        # Asked for by name, Triton serves CPU tensors too: its interpreter (TRITON_INTERPRET=1) takes them.
        return TRITON if name in _triton_operators and _has_triton() else REFERENCE
    return REFERENCE


def why_not(name: str, device_type: str) -> str:
    """Why the backend in force does not serve ``name`` on this type of device, in words."""
    if _backend == TRITON:
        return "it has no Triton kernel" if _has_triton() else "triton is not installed"
    library = "_C_cuda" if device_type == "cuda" else "_C"
    return _problems.get(library, f"{library} has no kernel of it for {device_type} tensors")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def operators() -> list[str]:
    """The names of all operators with kernels, without their backward forms."""
    names = _triton_operators.union(name for name in _operators if not name.endswith("_backward"))
    return sorted(names)


def problems() -> dict[str, str]:
    """Why a native library is not loaded; empty when both are."""
    return dict(_problems)


def add_backend(name: str, namespace: str) -> None:
    """Serve operators from another namespace of ``torch.ops``, whose library has been loaded (for tests)."""
    _namespaces[name] = namespace
    _register(name)


def _known(name: str, argument: str) -> str:
    names = (AUTO, NATIVE, TRITON, REFERENCE, *(n for n in _namespaces if n != NATIVE))
    if name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(names)}, got {name!r}")
    return name


def load() -> None:
    """Load the native libraries and register the Python side of what they define.

    They lie in the package; ``SPARSE_RCNN_LIBRARIES`` names another folder, of a sanitizer or a debug build.
    """
    global _backend
    folder = Path(os.environ.get("SPARSE_RCNN_LIBRARIES", Path(__file__).resolve().parent.parent))
    _load_library(folder / "_C.so")
    if "_C" not in _problems:
        if torch.version.cuda is None:
            _problems["_C_cuda"] = "this PyTorch is built without CUDA"
        else:
            _load_library(folder / "_C_cuda.so")
        _namespaces[NATIVE] = "sparse_rcnn"
        _register(NATIVE)
    else:
        _problems["_C_cuda"] = _problems["_C"]
    _backend = _known(os.environ.get("SPARSE_RCNN_BACKEND", AUTO), "SPARSE_RCNN_BACKEND")


def _load_library(path: Path) -> None:
    if not path.exists():
        _problems[path.stem] = f"{path.name} was not built"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:  # another platform's, or missing symbols
        _problems[path.stem] = f"{path.name} does not load: {error}"


def _register(backend_name: str) -> None:
    namespace = _namespaces[backend_name]
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, operator in _operators.items():
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, operator.fake, lib=library)
        if operator.backward is not None:
            backward = partial(operator.backward, getattr(torch.ops, namespace))
            torch.library.register_autograd(qualified, backward, setup_context=operator.setup_context, lib=library)
        if operator.autocast is not None:
            for device_type in ("cpu", "cuda"):
                _register_autocast(library, namespace, name, operator.autocast, device_type)
        for device_type, key in _DISPATCH_KEYS.items():
            if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
                _served.add((backend_name, name, device_type))


def _register_autocast(
    library: torch.library.Library, namespace: str, name: str, cast: Callable[..., tuple[Any, ...]], device_type: str
) -> None:
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return getattr(getattr(torch.ops, namespace), name)(*cast(torch.get_autocast_dtype(device_type), *args))

    library.impl(name, autocast, key)
