"""The published checkpoints' names and shapes, at full size: tensors of stride 0 take no memory, in a file neither."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.coco_classes import COCO_NAMES
from sparse_rcnn.weights import load_pretrained, read_checkpoint
from sparse_rcnn.weights.mmdet import KEYS as MMDET
from sparse_rcnn.weights.mmdet import with_counters, without_counters
from sparse_rcnn.weights.official import KEYS as OFFICIAL

TABLES = {
    "official_sparse_rcnn_r50_100": SparseRCNNConfig(class_names=COCO_NAMES),
    "official_sparse_rcnn_r50_300": SparseRCNNConfig(class_names=COCO_NAMES, num_proposals=300),
    "official_sparse_rcnn_r101_300": SparseRCNNConfig(class_names=COCO_NAMES, num_proposals=300, backbone="resnet101"),
    "official_sparse_rcnn_crowdhuman_r50_500": SparseRCNNConfig.preset("crowdhuman_r50_500"),
    "mmdet_sparse_rcnn_r50_300": SparseRCNNConfig(
        class_names=COCO_NAMES,
        num_proposals=300,
        level_rule="mmdet",
        delta_clamp=(-math.log(1000 / 16), math.log(1000 / 16)),
    ),
}


def write_table(table, path):
    """A checkpoint with these names and shapes; returns the tensors as they stand in it."""
    state = {}
    for index, (name, shape) in enumerate(table.items()):
        value = torch.tensor(index) if name.endswith("num_batches_tracked") else torch.tensor(float(index))
        state[name] = value.expand(shape)
    torch.save({"state_dict" if "mmdet" in path.name else "model": state, "optimizer": {"lr": 1.0}}, path)
    return state


@pytest.mark.parametrize("name", TABLES)
def test_published_checkpoint_loads_without_missing_or_unexpected_keys(name, key_tables, tmp_path):
    write_table(key_tables[name], tmp_path / f"{name}.pth")
    config, state = load_pretrained(tmp_path / f"{name}.pth")
    assert config == TABLES[name]
    with torch.device("meta"):
        model = SparseRCNN(config)
    result = model.load_state_dict({key: tensor.to("meta") for key, tensor in state.items()})
    assert not result.missing_keys and not result.unexpected_keys


@pytest.mark.parametrize("name", TABLES)
def test_published_checkpoint_and_back(name, key_tables, tmp_path, assert_same):
    written = write_table(key_tables[name], tmp_path / f"{name}.pth")
    checkpoint = read_checkpoint(tmp_path / f"{name}.pth")
    keys = MMDET if "mmdet" in name else OFFICIAL
    assert_same({keys.from_ours(key): tensor for key, tensor in checkpoint.state_dict.items()}, written)


def test_key_maps_agree_with_the_table_of_both_families(key_tables):
    table = key_tables["mmdet_to_official"]
    counters = [key for key, official in table.items() if official is None]
    assert len(counters) == 53 and all(key.endswith(".num_batches_tracked") for key in counters)
    for key, official in table.items():
        ours = MMDET.to_ours(key)
        assert MMDET.from_ours(ours) == key
        if official is not None:
            assert OFFICIAL.from_ours(ours) == official
            assert OFFICIAL.to_ours(official) == ours


def test_official_to_mmdet_has_exactly_mmdets_keys(key_tables):
    official = {
        key: torch.empty(shape, device="meta") for key, shape in key_tables["official_sparse_rcnn_r50_300"].items()
    }
    ours = with_counters({OFFICIAL.to_ours(key): tensor for key, tensor in official.items()})
    shapes = {MMDET.from_ours(key): list(tensor.shape) for key, tensor in ours.items()}
    assert shapes == key_tables["mmdet_sparse_rcnn_r50_300"]
    assert {OFFICIAL.from_ours(key) for key in without_counters(ours)} == set(official)


@pytest.mark.parametrize(
    "ours, official, mmdet",
    [
        ("backbone.body.bn1.bias", "backbone.bottom_up.stem.conv1.norm.bias", "backbone.bn1.bias"),
        (
            "backbone.body.layer3.22.bn2.running_var",
            "backbone.bottom_up.res4.22.conv2.norm.running_var",
            "backbone.layer3.22.bn2.running_var",
        ),
        (
            "backbone.body.layer1.0.downsample.1.weight",
            "backbone.bottom_up.res2.0.shortcut.norm.weight",
            "backbone.layer1.0.downsample.1.weight",
        ),
        ("backbone.fpn.inner_blocks.0.0.bias", "backbone.fpn_lateral2.bias", "neck.lateral_convs.0.conv.bias"),
        ("backbone.fpn.layer_blocks.3.0.weight", "backbone.fpn_output5.weight", "neck.fpn_convs.3.conv.weight"),
        (
            "head.stages.11.inst_interact.norm2.weight",
            "head.head_series.11.inst_interact.norm2.weight",
            "roi_head.bbox_head.11.instance_interactive_conv.norm_out.weight",
        ),
        ("head.stages.0.norm3.bias", "head.head_series.0.norm3.bias", "roi_head.bbox_head.0.ffn_norm.bias"),
        ("init_proposal_boxes.weight", "init_proposal_boxes.weight", "rpn_head.init_proposal_bboxes.weight"),
    ],
)
def test_single_names(ours, official, mmdet):
    assert OFFICIAL.from_ours(ours) == official
    assert OFFICIAL.to_ours(official) == ours
    assert MMDET.from_ours(ours) == mmdet
    assert MMDET.to_ours(mmdet) == ours


def test_unknown_names_have_no_rule():
    assert OFFICIAL.to_ours("head.time_mlp.1.weight") is None
    assert OFFICIAL.to_ours("backbone.bottom_up.res6.0.conv1.weight") is None
    assert MMDET.to_ours("roi_head.mask_head.0.conv.weight") is None
    assert MMDET.from_ours("backbone.unknown.weight") is None
