"""AdamW and the learning-rate schedule of the Sparse R-CNN recipe (section 4.1 of the paper, detectron2's solver)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparse_rcnn.ops._library import is_reference


def parameter_groups(
    model: nn.Module, lr: float, backbone_lr_factor: float = 1.0, weight_decay: float = 1e-4
) -> list[dict]:
    """Split the trainable parameters into the backbone's body and everything else.

    Frozen parameters are left out. Weight decay applies to every parameter, norms and biases included, as in the
    official code. The FPN counts as part of the detector: it never has pretrained weights of its own.

    Args:
        model: a detector whose feature extractor is called ``backbone.body``.
        lr: base learning rate.
        backbone_lr_factor: multiplies ``lr`` for ``backbone.body``.
        weight_decay: AdamW's decoupled weight decay.

    Returns:
        Groups for a torch optimizer, each with ``name``, ``params``, ``lr``, ``base_lr`` and ``weight_decay``.

    Raises:
        ValueError: no parameter is trainable.
    """
    backbone, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if name.startswith("backbone.body.") else rest).append(parameter)
    if not backbone and not rest:
        raise ValueError("model: expected at least one parameter with requires_grad=True, got none")
    groups = []
    for name, parameters, group_lr in (("backbone", backbone, lr * backbone_lr_factor), ("detector", rest, lr)):
        if parameters:
            groups.append(
                {"name": name, "params": parameters, "lr": group_lr, "base_lr": group_lr, "weight_decay": weight_decay}
            )
    return groups


def in_official_order(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters as the official model registers its own: FPN, body, proposals, head.

    The gradient's norm is a float32 sum over the parameters, whose last bit depends on their order, and AdamW's first
    steps, of the gradient's sign, turn one bit into 1e-3 of the loss within three steps.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [parameter for _, parameter in sorted(named, key=lambda pair: _official_place(pair[0]))]


def _official_place(name: str) -> tuple:
    if match := re.match(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.", name):
        return 0, int(match[2]), match[1] == "layer"  # level by level: lateral, then output
    if match := re.match(r"backbone\.body\.layer(\d)\.(\d+)\.(downsample)?", name):
        return 1, int(match[1]), int(match[2]), match[3] is None  # the shortcut before the convolutions
    return (1,) if name.startswith("backbone.") else (2,)


def build_optimizer(
    model: nn.Module, lr: float, backbone_lr_factor: float = 1.0, weight_decay: float = 1e-4
) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, with torch's default betas and epsilon, as in the official code.

    It is the fused one, which leaves everything as it is where a tensor ``found_inf`` that one gives it is 1. On a GPU
    its learning rates are tensors, which a captured CUDA graph reads anew in each replay. In the reference backend it
    is the plain one, of the official code's rounding.
    """
    fused = not is_reference()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, backbone_lr_factor, weight_decay), fused=fused)
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type == "cuda" and fused:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments and step counts of a ``state_dict``, and keep the optimizer's own options, rates and decay.

    Raises:
        ValueError: the state is of other parameters.
    """
    own, saved = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
        raise ValueError("optimizer: the state in the checkpoint is of another set of parameters")
    groups = [{**group, "params": other["params"]} for group, other in zip(own, saved, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def lr_factor(
    step: int,
    warmup_steps: int = 1000,
    warmup_factor: float = 0.01,
    decay_steps: Sequence[int] = (),
) -> float:
    """What multiplies the base learning rate in the update that follows ``step`` completed ones.

    Linear warm-up from ``warmup_factor`` at step 0 to 1 at ``warmup_steps``; a tenth from each decay step on.
    """
    factor = 0.1 ** sum(step >= decay_step for decay_step in decay_steps)
    if step < warmup_steps:
        progress = step / warmup_steps
        factor *= warmup_factor * (1 - progress) + progress
    return factor


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group ``factor`` times its base learning rate."""
    for group in optimizer.param_groups:
        lr = group["base_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
