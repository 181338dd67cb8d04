"""Training checkpoints: one file with everything an exact resume needs, replaced atomically."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_rcnn.weights.atomic import atomic_write

_KEYS = ("model", "optimizer", "step", "best_ap", "rng", "model_config", "train_config")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that at every moment ``path`` is either the old file or the complete new one.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of :func:`save_checkpoint`, on the CPU, without unpickling any code.

    Raises:
        ValueError: the file is missing, damaged, or not a training checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a training checkpoint, found no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected a training checkpoint, could not read it ({reason})") from error
    missing = [key for key in _KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"{path}: expected a training checkpoint, it lacks {', '.join(missing)}")
    return state


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
