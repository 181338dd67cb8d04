"""Names and container of the official checkpoints (github.com/PeizeSun/SparseR-CNN, on detectron2).

The official network sees the image as RGB, as ours does, so no channel of ``conv1`` moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sparse_rcnn.models.config import SparseRCNNConfig
from sparse_rcnn.weights.key_map import KeyMap


def _rules() -> Iterator[tuple[str, str]]:
    body, bottom_up = "backbone.body", "backbone.bottom_up"
    yield f"{body}.conv1.{{p}}", f"{bottom_up}.stem.conv1.{{p}}"
    yield f"{body}.bn1.{{p}}", f"{bottom_up}.stem.conv1.norm.{{p}}"
    for layer in range(1, 5):  # layer1 is res2
        ours, theirs = f"{body}.layer{layer}.{{i}}", f"{bottom_up}.res{layer + 1}.{{i}}"
        yield f"{ours}.conv{{j}}.{{p}}", f"{theirs}.conv{{j}}.{{p}}"
        yield f"{ours}.bn{{j}}.{{p}}", f"{theirs}.conv{{j}}.norm.{{p}}"
        yield f"{ours}.downsample.0.{{p}}", f"{theirs}.shortcut.{{p}}"
        yield f"{ours}.downsample.1.{{p}}", f"{theirs}.shortcut.norm.{{p}}"
    for level in range(4):  # our level 0, of stride 4, is P2
        yield f"backbone.fpn.inner_blocks.{level}.0.{{p}}", f"backbone.fpn_lateral{level + 2}.{{p}}"
        yield f"backbone.fpn.layer_blocks.{level}.0.{{p}}", f"backbone.fpn_output{level + 2}.{{p}}"
    for name in ("init_proposal_boxes", "init_proposal_features"):
        yield f"{name}.{{p}}", f"{name}.{{p}}"
    yield "head.stages.{i}.{rest}", "head.head_series.{i}.{rest}"


KEYS = KeyMap(_rules())
CONTAINER = "model"  # where the weights stand in a file


def is_sparse_rcnn(keys: list[str]) -> bool:
    """Whether ``keys`` are those of an official Sparse R-CNN."""
    return any(key.startswith("head.head_series.") for key in keys)


def wrap(config: SparseRCNNConfig, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The file's content as detectron2's checkpointer expects it, for a state dict under official names.

    detectron2 ignores ``model_config``; it tells us what the tensors cannot (class names, heads, level rule).
    """
    return {CONTAINER: state_dict, "__author__": "sparse_rcnn", "model_config": config.to_dict()}
