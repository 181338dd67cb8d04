"""Names and container of mmdetection's Sparse R-CNN checkpoints (github.com/open-mmlab/mmdetection).

mmdetection reads images as BGR and its ``bgr_to_rgb`` turns them before the network: like the official and like our
network, it sees RGB, so no channel of ``conv1`` moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.weights.key_map import KeyMap

COUNTER = ".num_batches_tracked"  # a buffer of nn.BatchNorm2d that frozen ones do not have

# Parts of a stage, ours and theirs.
_STAGE = (
    ("self_attn.{rest}", "attention.attn.{rest}"),
    ("norm1.{p}", "attention_norm.{p}"),
    ("inst_interact.dynamic_layer.{p}", "instance_interactive_conv.dynamic_layer.{p}"),
    ("inst_interact.norm1.{p}", "instance_interactive_conv.norm_in.{p}"),
    ("inst_interact.norm2.{p}", "instance_interactive_conv.norm_out.{p}"),
    ("inst_interact.out_layer.{p}", "instance_interactive_conv.fc_layer.{p}"),
    ("inst_interact.norm3.{p}", "instance_interactive_conv.fc_norm.{p}"),
    ("norm2.{p}", "instance_interactive_conv_norm.{p}"),
    ("linear1.{p}", "ffn.layers.0.0.{p}"),
    ("linear2.{p}", "ffn.layers.1.{p}"),
    ("norm3.{p}", "ffn_norm.{p}"),
    ("cls_module.{j}.{p}", "cls_fcs.{j}.{p}"),
    ("reg_module.{j}.{p}", "reg_fcs.{j}.{p}"),
    ("class_logits.{p}", "fc_cls.{p}"),
    ("bboxes_delta.{p}", "fc_reg.{p}"),
)


def _rules() -> Iterator[tuple[str, str]]:
    yield "backbone.fpn.inner_blocks.{i}.0.{p}", "neck.lateral_convs.{i}.conv.{p}"
    yield "backbone.fpn.layer_blocks.{i}.0.{p}", "neck.fpn_convs.{i}.conv.{p}"
    yield "backbone.body.{rest}", "backbone.{rest}"
    yield "init_proposal_boxes.{p}", "rpn_head.init_proposal_bboxes.{p}"
    yield "init_proposal_features.{p}", "rpn_head.init_proposal_features.{p}"
    for ours, theirs in _STAGE:
        yield f"head.stages.{{i}}.{ours}", f"roi_head.bbox_head.{{i}}.{theirs}"


KEYS = KeyMap(_rules())
CONTAINER = "state_dict"  # where the weights stand in a file


def is_sparse_rcnn(keys: list[str]) -> bool:
    """Whether ``keys`` are those of mmdetection's Sparse R-CNN (its other detectors have ``bbox_head`` too)."""
    return any(key.startswith("roi_head.bbox_head.") and ".instance_interactive_conv." in key for key in keys)


def with_counters(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` (our names) with the batch counters that mmdetection's BatchNorm expects, 0 where absent."""
    complete = {}
    for key, tensor in state_dict.items():
        complete[key] = tensor
        counter = key.removesuffix(".running_var") + COUNTER
        if key.endswith(".running_var") and counter not in state_dict:
            complete[counter] = torch.zeros((), dtype=torch.int64)
    return complete


def without_counters(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` without batch counters, which no frozen BatchNorm uses."""
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith(COUNTER)}


def class_names(contents: dict[str, Any]) -> tuple[str, ...] | None:
    """The class names that mmdetection 3 and 2 write into ``meta``, or None."""
    meta = contents.get("meta")
    if not isinstance(meta, dict):
        return None
    dataset = meta.get("dataset_meta")
    names = (dataset if isinstance(dataset, dict) else meta).get("CLASSES")
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def wrap(config: SparseRCNNConfig, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The file's content as mmdetection's loader expects it, for a state dict under mmdetection's names.

    mmdetection ignores ``model_config``; it tells us what the tensors cannot (heads, proposal initialisation).
    """
    meta = {"dataset_meta": {"CLASSES": config.class_names}} if config.class_names else {}
    return {"meta": meta, CONTAINER: state_dict, "model_config": config.to_dict()}
