"""Reading checkpoint files of any origin; nothing that stands in them is executed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_rcnn.weights.pickles import NUMPY, TRAINER_LOGS, PickledArray, check_tuples, read_pickle

SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")


def safe_load(path: str | os.PathLike[str], what: str = "a checkpoint") -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Args:
        path: ``.safetensors``; ``.pth`` or ``.pt`` of ``torch.save``, read with ``weights_only=True``; or ``.pkl`` of
            numpy arrays as detectron2 writes them, read by :mod:`sparse_rcnn.weights.pickles`.
        what: the errors' name for what was expected.

    Returns:
        The dict in the file. Arrays of a ``.pkl`` are :class:`PickledArray`; see :func:`tensors`.

    Raises:
        ValueError: the file is missing, empty, damaged, of another kind, or names something to be executed.
    """
    path = Path(path)
    wanted = f"{path}: expected {what} ({', '.join(SUFFIXES)})"
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{wanted}, got {'a directory' if path.is_dir() else f'the suffix {path.suffix!r}'}")
    if not path.is_file():
        raise ValueError(f"{wanted}, {'it is not a file' if path.exists() else 'there is no such file'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{wanted}, the file is empty")
    try:
        contents = _read(path)
    except Exception as error:  # the readers raise a zoo of types for a damaged or hostile file
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise ValueError(f"{wanted}, cannot read it: {reason}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{wanted}, it holds a {type(contents).__name__} instead of a dict")
    return contents


def _read(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:  # mapped, and copied: a file that changes changes nothing here
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if suffix == ".pkl":
        with open(path, "rb") as file:
            return read_pickle(file)
    stand_ins = [(stand_in, name) for name, stand_in in {**NUMPY, **TRAINER_LOGS}.items()]
    check_tuples(path)
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged files; what is wrong with one stands in the error
        return torch.load(path, map_location="cpu", weights_only=True)


def tensors(entries: dict[Any, Any], source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """``entries`` of a state dict as plain dense tensors on the CPU.

    Raises:
        ValueError: naming every entry that is none.
    """
    result, problems = {}, []
    for name, value in entries.items():
        try:
            result[name] = _tensor(name, value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"{source}: expected named tensors; {'; '.join(problems)}")
    return result


def _tensor(name: Any, value: Any) -> Tensor:
    if not isinstance(name, str):
        raise ValueError(f"the name is a {type(name).__name__}")
    if isinstance(value, PickledArray):
        return value.to_tensor()
    if not isinstance(value, Tensor):
        raise ValueError(f"got a {type(value).__name__}")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"got a {value.layout} tensor on {value.device}" + " (quantized)" * value.is_quantized)
    return value.detach()
