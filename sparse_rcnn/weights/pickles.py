"""Reading pickles of numpy arrays without executing anything.

A pickle is a program: it names functions and calls them. Here every name is looked up in a short table of inert
stand-ins that only keep what they are given, and any other name ends the reading. The arrays are built afterwards, from
kept bytes whose type and length were checked. The same stand-ins let ``torch.load(weights_only=True)`` pass over the
numpy scalars and log buffers that trainers leave beside the weights.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


class Inert:
    """Takes the place of a pickled object: keeps the arguments and the state, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class PickledDtype(Inert):
    """``numpy.dtype``: arguments (code, align, copy), state (version, byte order, ...)."""


class PickledArray(Inert):
    """``numpy.ndarray``: state (version, shape, dtype, Fortran order, bytes)."""

    def to_tensor(self) -> Tensor:
        """The array as a tensor of its own.

        Raises:
            ValueError: the parts do not make an array of numbers.
        """
        try:
            _, shape, dtype, fortran, data = self.state
            data = data.encode("latin1") if isinstance(data, str) else data  # pickled by Python 2
            sizes = [int(size) for size in shape]
            kind = _numpy_dtype(dtype)
            if min(sizes, default=0) < 0 or len(data) != math.prod(sizes) * kind.itemsize:
                raise ValueError(f"{len(data)} bytes do not make {sizes} of {kind}")
            array = np.frombuffer(data, kind).reshape(sizes, order="F" if fortran else "C")
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not an array: {error}") from error
        return torch.from_numpy(array.astype(kind.newbyteorder("="), order="C"))


def _numpy_dtype(dtype: Any) -> np.dtype:
    code = dtype.arguments[0] if isinstance(dtype, PickledDtype) and dtype.arguments else None
    if code not in _DTYPES:
        raise ValueError(f"expected an array of numbers, got elements of type {code!r}")
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "="
    if order not in ("<", ">", "=", "|"):
        raise ValueError(f"expected a byte order, got {order!r}")
    return np.dtype(code).newbyteorder(order)


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    """The form of numpy's pickle protocol 5."""
    array = PickledArray()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _nothing(*_: Any) -> None:
    return None


def _latin1(text: Any, encoding: Any) -> bytes:
    """``_codecs.encode``, by which pickle protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode: expected text and latin1")
    return text.encode("latin1")


def _empty_dict() -> dict:
    return {}


def _empty_bytes() -> bytes:
    return b""


NUMPY = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledDtype,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")  # numpy 1 and 2
        for name, stand_in in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", Inert),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}
# What mmdetection 3 writes into a checkpoint while training: logs whose statistics are named by getattr.
TRAINER_LOGS = {"mmengine.logging.history_buffer.HistoryBuffer": Inert, "builtins.getattr": _nothing}

_NAMES = {
    **NUMPY,
    "collections.OrderedDict": _empty_dict,
    "_codecs.encode": _latin1,
    "__builtin__.bytes": _empty_bytes,  # how protocol 2 writes no bytes
}

# What pickle protocols 2 to 5 write for numbers, text, bytes, lists, tuples, dicts and calls. Left out on purpose:
# sets, other dict forms, persistent ids, extension codes, out-of-band buffers and the text forms of protocol 0.
_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "BINPUT", "LONG_BINPUT"),
    *("BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
)


# An R101-300 with its optimizer has 4,668 tuples. Nested ones overflow the C stack near 80,000.
_MAX_TUPLES = 50_000


class _Reader(pickle._Unpickler):
    """The Python unpickler (the C one allocates what a hostile memo index asks for), with few names and opcodes."""

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
    # pickle's own reader of this opcode allocates the announced length before it looks whether it is there.
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, only numpy arrays are read")
        return _NAMES[f"{module}.{name}"]

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.__setstate__(state)
        elif type(target) is not dict:  # the attributes of an OrderedDict are of no use
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        # Hashing a deeply nested tuple would overflow the C stack.
        if type(self.stack[-1]) is not dict or not isinstance(key, (str, int)):
            raise pickle.UnpicklingError(f"expected a dict with text or number keys, got {type(key).__name__}")
        self.stack[-1][key] = value

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def read_pickle(file: BinaryIO) -> Any:
    """The content of a pickle, its arrays as :class:`PickledArray`.

    Raises:
        Exception: of many types, for a damaged file or one that names anything but numpy arrays.
    """
    return _Reader(file, encoding="latin1").load()


def check_tuples(path: Path) -> None:
    """Refuse a ``torch.save`` file with absurdly many tuples.

    ``torch.load(weights_only=True)`` hashes a dict key of any depth, and a deep enough one ends the process.

    Raises:
        Exception: of many types, for a damaged file or too many tuples.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl"):
                    with archive.open(entry) as file:
                        _count_tuples(file)
        return
    with open(path, "rb") as file:  # before torch 1.6: five pickles (the fourth is the content), then the storages
        for _ in range(5):
            _count_tuples(file)


def _count_tuples(file: BinaryIO) -> None:
    count = 0
    for opcode, _, _ in pickletools.genops(file):
        count += opcode.name.startswith("TUPLE")
        if count > _MAX_TUPLES:
            raise pickle.UnpicklingError(f"it has more than {_MAX_TUPLES} tuples, of no use in a checkpoint")
