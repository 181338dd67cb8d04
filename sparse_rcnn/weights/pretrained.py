"""Loading checkpoints of three families into our names, and saving our own format."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.weights import mmdet, official
from sparse_rcnn.weights.atomic import atomic_write, flush
from sparse_rcnn.weights.check import check_state_dict
from sparse_rcnn.weights.infer_config import infer_config
from sparse_rcnn.weights.safe_load import safe_load, tensors

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FORMAT_VERSION = 1
_CONFIG_ENTRY = "config"  # of the metadata of the weights' file
FAMILIES = {"official": official, "mmdet": mmdet}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it stands in its file, under our names and in the file's types.

    Attributes:
        family: ``sparse_rcnn`` (our own), ``official`` or ``mmdet``.
        config: read from the file where it has one, else inferred from the shapes.
        state_dict: the tensors; of mmdetection's files with the BatchNorm counters.
    """

    family: str
    config: SparseRCNNConfig
    state_dict: dict[str, Tensor]


def load_pretrained(path: str | os.PathLike[str]) -> tuple[SparseRCNNConfig, dict[str, Tensor]]:
    """Configuration and weights of a checkpoint, ready for ``SparseRCNN(config).load_state_dict``.

    Args:
        path: a directory of :func:`save_pretrained` or the ``.safetensors`` file in it, whose configuration is that of
            the ``config.json`` beside it, or its own if there is none; a ``.pth`` or ``.pkl`` of the official code or
            of mmdetection, recognised by its names (those of an optimizer are passed over); a checkpoint of our
            training, ``last.pt``.

    Returns:
        The configuration, and the state dict under our names with every floating tensor as float32.

    Raises:
        ValueError: the file is missing, damaged or of another model, or tensors are missing, unexpected or wrongly
            shaped (each is listed). Nothing in the file is executed.
    """
    checkpoint = read_checkpoint(path)
    state = mmdet.without_counters(checkpoint.state_dict)
    return checkpoint.config, {name: _cast(tensor, torch.float32) for name, tensor in state.items()}


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Like :func:`load_pretrained`, with the tensors exactly as they are in the file."""
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise ValueError(f"{path}: expected a directory with {WEIGHTS_NAME} and {CONFIG_NAME}, no {WEIGHTS_NAME}")
        path = path / WEIGHTS_NAME
    contents = safe_load(path)
    family, entries = _state_dict(contents, path)
    state = tensors(entries, path)
    if family == "sparse_rcnn":
        config = _own_config(contents, path)
        check_state_dict(config, state, path)
        return Checkpoint(family, config, state)
    return _foreign(family, contents, state, path)


def _state_dict(contents: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The family, and the state dict: under ``model``, under ``state_dict``, or the whole content."""
    for entries in (contents.get("model"), contents.get("state_dict"), contents):
        if not isinstance(entries, dict):
            continue
        names = [name for name in entries if isinstance(name, str)]
        if any(name.startswith("head.stages.") for name in names):
            return "sparse_rcnn", entries
        for family, module in FAMILIES.items():
            if module.is_sparse_rcnn(names):
                return family, entries
    shown = ", ".join(repr(name) for name in list(contents)[:5]) or "nothing"
    raise ValueError(f"{path}: expected a Sparse R-CNN checkpoint (own, official or mmdetection), it holds {shown}")


def _own_config(contents: dict[str, Any], path: Path) -> SparseRCNNConfig:
    """Of the file itself, if it is one of the training, else of the config.json beside it, which one may edit."""
    if path.suffix.lower() != ".safetensors":
        if "model_config" not in contents:
            raise ValueError(f"{path}: expected 'model_config' beside 'model', or {WEIGHTS_NAME} with {CONFIG_NAME}")
        return _config(contents["model_config"], path)
    beside = path.with_name(CONFIG_NAME)
    if not beside.exists():
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if _CONFIG_ENTRY in metadata:
            return _parse_config(metadata[_CONFIG_ENTRY], path)
    return read_config(beside)


def _foreign(family: str, contents: dict[str, Any], state: dict[str, Tensor], path: Path) -> Checkpoint:
    keys = FAMILIES[family].KEYS
    names = {key: keys.to_ours(key) or key for key in state}
    renamed = {names[key]: tensor for key, tensor in state.items()}
    if len(renamed) != len(state):
        raise ValueError(f"{path}: expected one tensor of each name, some stand there twice under different names")
    if "model_config" in contents:  # written by our convert
        config = _config(contents["model_config"], path)
    else:
        try:
            config = infer_config(renamed, family, mmdet.class_names(contents) if family == "mmdet" else None)
        except ValueError as error:
            raise ValueError(f"{path}: no detector has the shapes of its tensors: {error}") from error
    in_file = {ours: key for key, ours in names.items()}
    check_state_dict(config, renamed, path, lambda name: in_file.get(name) or keys.from_ours(name))
    return Checkpoint(family, config, renamed)


def read_config(path: str | os.PathLike[str]) -> SparseRCNNConfig:
    """The configuration in a ``config.json``.

    Raises:
        ValueError: the file is missing, not JSON, of another format version, or not a valid configuration.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the JSON of a detector's configuration: {error}") from error
    return _parse_config(text, path)


def _parse_config(text: str, path: Path) -> SparseRCNNConfig:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON of a detector's configuration: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")
    return _config(values, path)


def _config(values: Any, path: Path) -> SparseRCNNConfig:
    try:
        return SparseRCNNConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def save_pretrained(
    config: SparseRCNNConfig,
    state_dict: dict[str, Tensor],
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``model.safetensors`` and ``config.json``; existing ones are replaced only when both are complete.

    What was written is read back and compared before it is put in place. At every moment, a kill included, the
    directory loads as the old model or as the new one: the weights' file has the configuration too, and a
    ``config.json`` that says otherwise goes before the weights are replaced.

    Args:
        config: the detector's configuration.
        state_dict: its tensors under our names, on any device.
        directory: made if absent.
        dtype: stores the floating tensors in this type, for example ``torch.float16``; None keeps theirs. Loading
            gives float32 again.

    Returns:
        The directory.

    Raises:
        ValueError: the tensors are not those of ``config``, or ``dtype`` is no floating type.
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: expected a directory to save to, got a file")
    check_state_dict(config, state_dict, directory)
    packed = pack(state_dict, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    text = _config_text(config)
    beside = directory / CONFIG_NAME
    # The inner file is put in place first.
    with atomic_write(beside) as settings, atomic_write(directory / WEIGHTS_NAME) as weights:
        settings.write_text(text, encoding="utf-8")
        try:
            # One entry only: safetensors writes several in random order, and equal models should give equal files.
            save_file(packed, weights, metadata={_CONFIG_ENTRY: text})
        except SafetensorError as error:
            raise OSError(f"{directory / WEIGHTS_NAME}: cannot write it: {error}") from error
        weights.chmod(settings.stat().st_mode)  # safetensors makes its file readable by the owner alone
        check_same(load_file(weights), packed, directory / WEIGHTS_NAME)
        flush(weights)  # before the first change, for this may find the disk full
        if beside.exists() and beside.read_text(encoding="utf-8", errors="replace") != text:
            beside.unlink()
            flush(directory)
    return directory


def _config_text(config: SparseRCNNConfig) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, **config.to_dict()}, indent=2, allow_nan=False) + "\n"


def pack(state_dict: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors as a file wants them: on the CPU, contiguous, sharing no memory, floating ones in ``dtype``."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating point type, got {dtype}")
    packed, seen = {}, set()
    for name, tensor in state_dict.items():
        tensor = _cast(tensor.detach().cpu(), dtype).contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    return packed


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def check_same(got: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Compare two state dicts bit by bit (NaN equals itself).

    Raises:
        OSError: naming what the file at ``path`` does not give back.
    """
    differing = sorted(got.keys() ^ wanted.keys())
    differing += [name for name in wanted if name in got and not _same(got[name], wanted[name])]
    if differing:
        raise OSError(f"{path}: what was written does not read back: {', '.join(differing)}")


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
