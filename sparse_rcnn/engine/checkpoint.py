"""Training checkpoints: one file with everything an exact resume needs, replaced atomically."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_rcnn.weights.atomic import atomic_write
from sparse_rcnn.weights.safe_load import safe_load

# Raised when a checkpoint gets or loses an entry, or gives one another meaning. The first version had no number.
FORMAT_VERSION = 2
_ENTRIES = {
    **{"model": dict, "optimizer": dict, "step": int, "best_ap": float, "skipped": list, "rng": dict, "data": dict},
    **{"ema": dict, "model_config": dict, "train_config": dict},
}


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that at every moment ``path`` is either the old file or the complete new one.

    Args:
        path: the file.
        state: ``model``, ``ema`` (empty without one) and ``optimizer`` (state dicts), ``step`` (completed ones: the
            schedule and the data order follow from it and the configuration), ``best_ap``, ``skipped`` (in a row,
            altogether), ``rng`` (:func:`rng_state`), ``data`` (:func:`~sparse_rcnn.data.fingerprint.fingerprint`),
            ``model_config`` and ``train_config``.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
    except (OSError, RuntimeError) as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        kept = "the one before is as it was" if path.exists() else "there is none before"
        raise OSError(f"{path}: cannot write the checkpoint ({cause.strerror or cause}); {kept}") from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said: torch's writer, closing a file that it could not write, hides it behind its own error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of :func:`save_checkpoint`, on the CPU, without unpickling any code.

    Raises:
        ValueError: the file is missing, damaged, not a training checkpoint, or one of another format version.
    """
    path = Path(path)
    wanted = f"{path}: expected a training checkpoint"
    if path.is_file() and zipfile.is_zipfile(path):  # as torch.save writes it; torch.load does not look at the sums
        _check_sums(path, wanted)
    state = safe_load(path, "a training checkpoint")
    missing = [name for name in _ENTRIES if name not in state]
    version = state.get("format_version", 1)
    if {"model", "optimizer", "step", "train_config"} <= state.keys() and version != FORMAT_VERSION:
        raise ValueError(
            f"{wanted} of format version {FORMAT_VERSION}, got version {version!r}: another release wrote it and can "
            f"resume it; with this one, a new run can start from its weights (--weights {path})"
        )
    if missing:
        raise ValueError(f"{wanted}, it lacks {', '.join(missing)}")
    for name, kind in _ENTRIES.items():
        if not isinstance(state[name], kind):
            raise ValueError(f"{wanted}, its {name} is a {type(state[name]).__name__} instead of a {kind.__name__}")
    return state


def _check_sums(path: Path, wanted: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{wanted}, it is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"{wanted}, it is damaged: {damaged} does not have the check sum that it was written with")


def rng_state() -> dict[str, torch.Tensor]:
    """States of torch's generators. The data order needs none: it is a function of (seed, step)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`rng_state` returned; a CUDA state is ignored where there is no GPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def load_finetune_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], reset_classes: bool) -> list[str]:
    """Load ``state_dict`` into ``model``, leaving the class layers as they are if ``reset_classes``.

    Returns:
        The names of the parameters that kept their fresh initialisation.

    Raises:
        ValueError: any other key is missing, unexpected, or of another shape; each is listed, nothing is loaded.
    """
    own = model.state_dict()
    fresh = [name for name in own if ".class_logits." in name] if reset_classes else []
    given = {name: value for name, value in state_dict.items() if name not in fresh}
    expected = {name: value for name, value in own.items() if name not in fresh}
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(value.shape)}"
        for name, value in given.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"weights do not fit the model: {'; '.join(problems)}")
    model.load_state_dict(given, strict=False)
    return fresh
