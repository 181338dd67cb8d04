"""The model that a training run starts from: a preset with ImageNet weights, or a checkpoint to fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_rcnn.engine.checkpoint import load_finetune_weights
from sparse_rcnn.models import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.models.backbone import load_backbone_weights

if TYPE_CHECKING:
    from sparse_rcnn.engine.config import TrainConfig


def build_model(config: TrainConfig, class_names: Sequence[str]) -> tuple[SparseRCNN, list[str]]:
    """The model of ``config`` for ``class_names``, and a line for each thing its user should know.

    With ``config.weights`` the checkpoint gives configuration and weights. Its class layers are kept if it has the
    same classes in the same order (or the same number, where it has no names), and start anew otherwise. Of another
    number of proposals the first are kept, see :func:`fit_proposals`. Everything else must fit.

    Raises:
        ValueError: an unknown preset, field or backbone, or weights that do not fit.
    """
    overrides = dict(config.set)
    fixed = [name for name in ("num_classes", "class_names") if name in overrides]
    if fixed:
        raise ValueError(f"set: {fixed[0]} comes from the data set and cannot be set")
    if config.weights is not None:
        if config.backbone is not None:
            raise ValueError("backbone: cannot be given with weights, which bring their own")
        return _fine_tuned(config.weights, tuple(class_names), overrides)
    if config.backbone is not None:
        overrides["backbone"] = config.backbone
    preset = SparseRCNNConfig.preset(config.preset)
    model = SparseRCNN(_with_classes(preset, tuple(class_names), overrides))
    return model, _load_backbone(model, config.backbone_weights)


def _with_classes(
    config: SparseRCNNConfig, class_names: tuple[str, ...], overrides: dict[str, Any]
) -> SparseRCNNConfig:
    values = {**config.to_dict(), **overrides, "num_classes": len(class_names), "class_names": class_names}
    return SparseRCNNConfig.from_dict(values)


def _fine_tuned(path: str, class_names: tuple[str, ...], overrides: dict[str, Any]) -> tuple[SparseRCNN, list[str]]:
    from sparse_rcnn.weights import load_pretrained

    source, state_dict = load_pretrained(path)
    model = SparseRCNN(_with_classes(source, class_names, overrides))
    if source.class_names is None:
        same = source.num_classes == len(class_names)
    else:
        same = tuple(source.class_names) == class_names
    anew = model.config.proposal_init != source.proposal_init
    state_dict, fitted = fit_proposals(model, state_dict, anew)
    fresh = load_finetune_weights(model, state_dict, reset_classes=not same)
    notes = [f"fine-tuning {path}", *fitted]
    if fresh:
        notes.append(
            f"class_logits re-initialised in {model.config.num_stages} stages: {source.num_classes} classes in the "
            f"weights, {len(class_names)} {'others ' if source.num_classes == len(class_names) else ''}in the data"
        )
    return model, notes


def fit_proposals(
    model: SparseRCNN, state_dict: dict[str, Tensor], anew: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of another number of proposals for the proposals of ``model``, and a line that says so.

    Those that both have are taken in their order, or with ``anew`` none. What the model has more of keeps its fresh
    initialisation: boxes as ``proposal_init`` says, features from the standard normal distribution.
    """
    fitted, own = dict(state_dict), model.state_dict()
    for name in ("init_proposal_boxes.weight", "init_proposal_features.weight"):
        given, fresh = state_dict.get(name), own[name]
        # Anything else that does not fit is for the loading of the weights to report.
        if given is not None and given.shape[1:] == fresh.shape[1:]:
            common = 0 if anew else min(len(given), len(fresh))
            fitted[name] = torch.cat([given[:common].to(fresh.dtype), fresh[common:]])
    given, wanted = len(state_dict.get("init_proposal_boxes.weight", ())), model.config.num_proposals
    if given and anew:
        return fitted, [f"proposals: all {wanted} start anew ({model.config.proposal_init} boxes, random features)"]
    if given in (0, wanted):
        return fitted, []
    if given > wanted:
        rest = f"the first {wanted} are kept, {given - wanted} dropped"
    else:
        rest = f"{wanted - given} start anew ({model.config.proposal_init} boxes, random features)"
    return fitted, [f"proposals: {given} in the weights, {wanted} here; {rest}"]


def _load_backbone(model: SparseRCNN, source: str) -> list[str]:
    if source == "none":
        return [f"backbone {model.config.backbone}: random weights"]
    try:
        return [f"backbone {model.config.backbone}: {load_backbone_weights(model.backbone, source)}"]
    except ValueError as error:
        if source != "auto":
            raise
        return [f"warning: backbone {model.config.backbone} starts from random weights ({error})"]
