"""Writing a detector as a checkpoint of the official code or of mmdetection."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.weights import mmdet
from sparse_rcnn.weights.atomic import atomic_write
from sparse_rcnn.weights.check import check_state_dict
from sparse_rcnn.weights.pretrained import FAMILIES, check_same, pack
from sparse_rcnn.weights.safe_load import safe_load, tensors

# Fields that the other two codes have no counterpart for.
_FIXED = {"interaction": "dynamic", "classification": "focal", "self_attention": True}


def export_checkpoint(
    config: SparseRCNNConfig,
    state_dict: dict[str, Tensor],
    path: str | os.PathLike[str],
    family: str,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a ``.pth`` that the official code (``official``) or mmdetection (``mmdet``) loads.

    The file is read back, renamed back and compared bit by bit before it is put in place. BatchNorm's counters go to
    mmdetection only, as zeros where the source has none.

    Args:
        config: the detector's configuration.
        state_dict: its tensors under our names.
        path: the file; replaced only on success.
        family: ``official`` or ``mmdet``.
        dtype: as in :func:`~sparse_rcnn.weights.save_pretrained`.

    Raises:
        ValueError: the other code cannot hold such a detector, or the tensors are not those of ``config``.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".pth":
        raise ValueError(f"{path}: expected a file name with the suffix .pth for {family}, got {path.suffix!r}")
    _check_exportable(config, family)
    check_state_dict(config, state_dict, path)
    adapt = mmdet.with_counters if family == "mmdet" else mmdet.without_counters
    packed = pack(adapt(state_dict), dtype)
    module = FAMILIES[family]
    renamed = {module.KEYS.from_ours(name): tensor for name, tensor in packed.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save would write its name into the file
            torch.save(module.wrap(config, renamed), file)
        written = tensors(safe_load(temporary)[module.CONTAINER], path)
        check_same({module.KEYS.to_ours(key): tensor for key, tensor in written.items()}, packed, path)
    return path


def _check_exportable(config: SparseRCNNConfig, family: str) -> None:
    """Raise ``ValueError`` where the code of ``family`` has no such detector."""
    from sparse_rcnn.models.backbone import RESNETS

    if config.backbone not in RESNETS:
        raise ValueError(f"backbone: expected one of {', '.join(RESNETS)} for {family}, got {config.backbone!r}")
    for field, wanted in _FIXED.items():
        if getattr(config, field) != wanted:
            raise ValueError(f"{field}: expected {wanted!r} for {family}, got {getattr(config, field)!r}")
