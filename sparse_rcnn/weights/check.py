"""Whether a state dict is exactly the one of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.models.uninitialized import Uninitialized
from sparse_rcnn.weights.mmdet import COUNTER


def check_state_dict(
    config: SparseRCNNConfig,
    state_dict: dict[str, Tensor],
    source: str | os.PathLike[str],
    file_name: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Compare names, shapes and kinds of number with those of ``SparseRCNN(config)``; no memory is taken for it.

    BatchNorm's batch counters may come along, since mmdetection has them.

    Args:
        config: what the state dict is said to be of.
        state_dict: the tensors under our names (meta tensors will do).
        source: the file, for the message.
        file_name: our name to the one in the file, for the message.

    Raises:
        ValueError: listing every missing, unexpected or wrongly shaped tensor.
    """
    expected = _expected(config, state_dict, source)
    problems = [f"missing {file_name(name)}" for name in expected if name not in state_dict]
    for name, tensor in state_dict.items():
        shown = file_name(name) or name
        if name in expected:
            problems += _differences(shown, expected[name], tensor)
        elif name.endswith(COUNTER) and name.removesuffix(COUNTER) + ".running_var" in expected:
            problems += _differences(shown, torch.empty((), dtype=torch.int64), tensor)
        else:
            problems.append(f"unexpected {shown}")
    if problems:
        raise ValueError(f"{source}: does not fit the detector it is said to hold: {'; '.join(problems)}")


def _expected(
    config: SparseRCNNConfig, state_dict: dict[str, Tensor], source: str | os.PathLike[str]
) -> dict[str, Tensor]:
    from sparse_rcnn.models.sparse_rcnn import SparseRCNN  # it imports this package for its from_pretrained

    for field in ("num_stages", "num_cls_layers", "num_reg_layers"):  # the modules of a hostile config fill the memory
        if getattr(config, field) > len(state_dict):
            raise ValueError(f"{source}: {field} {getattr(config, field)} in a file of {len(state_dict)} tensors")
    try:
        with torch.device("meta"), Uninitialized():
            return SparseRCNN(config).state_dict()
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{source}: no detector can be built from its configuration: {error}") from error


def _differences(name: str, expected: Tensor, got: Tensor) -> list[str]:
    if got.shape != expected.shape:
        return [f"{name}: expected shape {list(expected.shape)}, got {list(got.shape)}"]
    if got.is_floating_point() != expected.is_floating_point() or got.is_complex():
        return [f"{name}: expected a kind of {expected.dtype}, got {got.dtype}"]
    return []
