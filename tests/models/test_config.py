"""SparseRCNNConfig: round trips, every validation message, presets."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.models import PRESETS

CHANGED = SparseRCNNConfig(
    num_classes=2, class_names=("cat", "dog"), num_proposals=7, num_stages=2, hidden_dim=32, dim_dynamic=8,
    dim_feedforward=64, num_heads=4, num_cls_layers=0, num_reg_layers=1, pooler_resolution=5, sampling_ratio=1,
    proposal_init="grid", self_attention=False, interaction="concat", classification="softmax",
    deep_supervision=False, backbone="resnet18", frozen_stages=0, level_rule="mmdet", delta_clamp=(-4.1, 4.1),
    pixel_mean=(1.0, 2.0, 3.0), pixel_std=(4.0, 5.0, 6.0), min_size=100, max_size=200, nms=0.6, votes=True,
    class_weight=1.0, l1_weight=3.0, giou_weight=4.0, focal_alpha=0.5, focal_gamma=1.0, no_object_weight=0.2,
    match_iou=0.7, denoising=8,
)  # fmt: skip


def test_changed_differs_from_the_default_in_every_field():
    default = SparseRCNNConfig()
    same = [f.name for f in dataclasses.fields(default) if getattr(CHANGED, f.name) == getattr(default, f.name)]
    assert same == []


@pytest.mark.parametrize("config", [SparseRCNNConfig(), CHANGED, *(SparseRCNNConfig.preset(name) for name in PRESETS)])
def test_json_round_trip(config):
    values = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert SparseRCNNConfig.from_dict(values) == config
    assert hash(SparseRCNNConfig.from_dict(values)) == hash(config)  # tuples again, not lists


finite = st.floats(-1e6, 1e6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    mean=st.tuples(finite, finite, finite), names=st.lists(st.text(), min_size=1, max_size=4).map(tuple),
    clamp=st.tuples(st.none() | finite, finite), heads=st.integers(1, 8), width=st.integers(1, 16),
)  # fmt: skip
def test_json_round_trip_of_any_value(mean, names, clamp, heads, width):
    config = SparseRCNNConfig(
        pixel_mean=mean, class_names=names, num_classes=len(names), delta_clamp=clamp, num_heads=heads,
        hidden_dim=heads * width,
    )  # fmt: skip
    assert SparseRCNNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_fields_take_their_defaults():
    assert SparseRCNNConfig.from_dict({}) == SparseRCNNConfig()
    assert SparseRCNNConfig.from_dict({"num_stages": 2}) == SparseRCNNConfig(num_stages=2)


def test_defaults_are_the_papers():
    config = SparseRCNNConfig()
    assert (config.num_classes, config.num_proposals, config.num_stages) == (80, 100, 6)
    assert (config.hidden_dim, config.dim_dynamic, config.dim_feedforward, config.num_heads) == (256, 64, 2048, 8)
    assert (config.class_weight, config.l1_weight, config.giou_weight) == (2.0, 5.0, 2.0)
    assert config.delta_clamp == (None, math.log(6250))


@pytest.mark.parametrize(
    "field",
    [
        *("num_classes", "num_proposals", "num_stages", "hidden_dim", "dim_dynamic", "dim_feedforward", "num_heads"),
        *("pooler_resolution", "sampling_ratio", "min_size", "max_size"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
def test_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected an integer >= 1, got {value!r}$"):
        SparseRCNNConfig(**{field: value})


@pytest.mark.parametrize("field", ["num_cls_layers", "num_reg_layers", "frozen_stages"])
def test_integers_from_zero(field):
    assert getattr(SparseRCNNConfig(**{field: 0}), field) == 0
    for value in (-1, 1.5, False):
        with pytest.raises(ValueError, match=f"^{field}: expected an integer >= 0, got {value!r}$"):
            SparseRCNNConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposal_init": "edge"}, "proposal_init: expected one of image, center, grid, random, tiles, got 'edge'"),
        ({"interaction": "static"}, "interaction: expected one of dynamic, concat, plain, got 'static'"),
        ({"classification": "sigmoid"}, "classification: expected one of focal, softmax, got 'sigmoid'"),
        ({"level_rule": "caffe"}, "level_rule: expected one of detectron2, mmdet, got 'caffe'"),
        ({"hidden_dim": 100}, "num_heads: expected a divisor of hidden_dim 100, got 8"),
        ({"num_classes": 3, "class_names": ("a",)}, "class_names: expected 3 names, got 1"),
        ({"delta_clamp": (None,)}, r"delta_clamp: expected 2 numbers, got \(None,\)"),
        ({"pixel_mean": [1.0, 2.0]}, r"pixel_mean: expected 3 numbers, got \(1.0, 2.0\)"),
        ({"pixel_std": (1.0, 2.0, 3.0, 4.0)}, "pixel_std: expected 3 numbers"),
        ({"pixel_std": (1.0, 0.0, 3.0)}, "pixel_std: expected positive numbers"),
        ({"l1_weight": "x"}, "l1_weight: expected a number, got 'x'"),
        ({"nms": 0}, "nms: expected above 0 and at most 1, got 0"),
        ({"nms": 1.01}, "nms: expected above 0 and at most 1, got 1.01"),
        ({"nms": "no"}, "nms: expected a number, got 'no'"),
        ({"match_iou": 0.0}, "match_iou: expected above 0 and at most 1, got 0.0"),
        ({"denoising": 1}, "denoising: expected 0, or at least 2 proposals, got 1"),
        ({"denoising": -2}, "denoising: expected an integer >= 0, got -2"),
        ({"match_iou": True}, "match_iou: expected a number, got True"),
        ({"giou_weight": float("nan")}, "giou_weight: expected a number, got nan"),
        ({"self_attention": "no"}, "self_attention: expected true or false, got 'no'"),
        ({"votes": 1}, "votes: expected true or false, got 1"),
        ({"delta_clamp": ("a", 2.0)}, "delta_clamp: expected a number, got 'a'"),
        ({"num_classes": 1, "class_names": (7,)}, "class_names: expected a list of names"),
        ({"backbone": 50}, "backbone: expected a name, got 50"),
    ],
)
def test_other_validation(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseRCNNConfig(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseRCNNConfig().replace(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseRCNNConfig.from_dict(changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 3, "anchor": 1}, "config: unknown fields anchor, num_layers"),
        ([1, 2], "config: expected a JSON object, got list"),
        ({"class_names": 5}, "class_names: expected a list of names, got 5"),
        ({"pixel_std": ["a", 1, 2]}, "pixel_std: expected a number, got 'a'"),
    ],
)
def test_from_dict_errors(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseRCNNConfig.from_dict(values)


def test_replace_changes_one_field_and_is_frozen():
    config = SparseRCNNConfig().replace(num_stages=3)
    assert config.num_stages == 3
    assert config.replace(num_stages=6) == SparseRCNNConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_stages = 4


# Summed from the tables of the released files; the frozen BatchNorms are buffers. No file is released for R101-100: it
# is R101-300 less 200 proposals of 256 + 4 numbers.
PARAMETERS = {
    "r50_100": (106_237_768, 106_240),
    "r50_300": (106_289_768, 106_240),
    "r101_100": (125_177_672, 210_688),
    "r101_300": (125_229_672, 210_688),
    "crowdhuman_r50_500": (106_219_950, 106_240),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_released_models_parameters(name):
    with torch.device("meta"):
        model = SparseRCNN(SparseRCNNConfig.preset(name))
    counts = sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())
    assert counts == PARAMETERS[name]


def test_preset_with_overrides():
    config = SparseRCNNConfig.preset("r101_300", num_classes=3, num_proposals=20)
    assert config == SparseRCNNConfig(backbone="resnet101", num_proposals=20, num_classes=3)
    assert SparseRCNNConfig.preset("crowdhuman_r50_500").class_names == ("person",)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of r50_100, r50_300, .*, got 'r152'"):
        SparseRCNNConfig.preset("r152")
