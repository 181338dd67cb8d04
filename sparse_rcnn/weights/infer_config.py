"""The configuration that a state dict's names and shapes imply."""

from __future__ import annotations

import math
import re
from collections import Counter

from torch import Tensor

from sparse_rcnn.coco_classes import COCO_NAMES
from sparse_rcnn.models.config import MMDET_DELTA_CLAMP, SparseRCNNConfig

# (has bottleneck blocks, blocks of each stage); table 1 of the ResNet paper.
_DEPTHS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}
_STAGE = r"head\.stages\.\d+\."


def infer_config(
    state_dict: dict[str, Tensor], family: str, class_names: tuple[str, ...] | None = None
) -> SparseRCNNConfig:
    """The configuration of an official or mmdetection checkpoint.

    Every size is the one that most tensors agree on, so that one wrong or missing tensor is reported as such later.
    ``num_heads`` leaves no trace in the shapes: both families use 8.

    Args:
        state_dict: the tensors under our names; only names and shapes are looked at.
        family: ``official`` or ``mmdet`` (which differ in the level rule and the clamp of the deltas).
        class_names: of the file, used if there is one for each class.

    Raises:
        ValueError: no detector has such shapes.
    """
    default = SparseRCNNConfig()
    hidden = _size(state_dict, _STAGE + r"norm[23]\.\w+", 0, default.hidden_dim)
    flat = _size(state_dict, _STAGE + r"inst_interact\.out_layer\.weight", 1, default.pooler_resolution**2 * hidden)
    classes = _size(state_dict, _STAGE + r"class_logits\.\w+", 0, default.num_classes)
    proposals = _size(state_dict, r"init_proposal_\w+\.weight", 0, default.num_proposals)
    if class_names is None or len(class_names) != classes:
        class_names = _known_names(classes, proposals, family)
    differing = {"level_rule": "mmdet", "delta_clamp": MMDET_DELTA_CLAMP} if family == "mmdet" else {}
    return SparseRCNNConfig(
        num_classes=classes,
        class_names=class_names,
        num_proposals=proposals,
        num_stages=_stages(state_dict),
        hidden_dim=hidden,
        dim_dynamic=_size(state_dict, _STAGE + r"inst_interact\.norm1\.\w+", 0, default.dim_dynamic),
        dim_feedforward=_size(state_dict, _STAGE + r"linear1\.\w+", 0, default.dim_feedforward),
        num_cls_layers=_tower_layers(state_dict, "cls_module"),
        num_reg_layers=_tower_layers(state_dict, "reg_module"),
        pooler_resolution=math.isqrt(flat // hidden),
        backbone=_depth(state_dict),
        **differing,
    )


def _known_names(classes: int, proposals: int, family: str) -> tuple[str, ...] | None:
    if classes == len(COCO_NAMES):
        return COCO_NAMES
    if (classes, proposals, family) == (1, 500, "official"):  # the released CrowdHuman model
        return ("person",)
    return None


def _size(state_dict: dict[str, Tensor], pattern: str, axis: int, default: int) -> int:
    """The most frequent size of ``axis`` among the tensors whose names match ``pattern``."""
    matching = (tensor for name, tensor in state_dict.items() if re.fullmatch(pattern, name))
    sizes = Counter(tensor.shape[axis] for tensor in matching if tensor.dim() > axis)
    return max(1, sizes.most_common(1)[0][0]) if sizes else default


def _stages(state_dict: dict[str, Tensor]) -> int:
    matches = (re.fullmatch(r"head\.stages\.(\d+)\.(class_logits|bboxes_delta)\.\w+", name) for name in state_dict)
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def _tower_layers(state_dict: dict[str, Tensor], tower: str) -> int:
    """Layers of a tower (Linear, LayerNorm and ReLU each) in most stages."""
    stages: dict[str, set[int]] = {}
    for name in state_dict:
        if match := re.fullmatch(rf"head\.stages\.(\d+)\.{tower}\.(\d+)\.\w+", name):
            stages.setdefault(match[1], set()).add(int(match[2]) // 3)
    counts = Counter(len(layers) for layers in stages.values())
    return counts.most_common(1)[0][0] if counts else 0


def _depth(state_dict: dict[str, Tensor]) -> str:
    """The ResNet whose blocks come nearest; its missing or unexpected tensors are reported by the later check."""
    matches = [re.match(r"backbone\.body\.layer([1-4])\.(\d+)\.(conv3)?", name) for name in state_dict]
    found = [match for match in matches if match]
    bottleneck = any(match[3] for match in found)
    blocks = [1 + max((int(match[2]) for match in found if match[1] == str(i)), default=-1) for i in range(1, 5)]
    distance = {
        name: sum(abs(have - want) for have, want in zip(blocks, depths, strict=True))
        for name, (has_bottleneck, depths) in _DEPTHS.items()
        if has_bottleneck == bottleneck
    }
    return min(distance, key=distance.__getitem__)
