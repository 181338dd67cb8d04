from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_rcnn import SparseRCNN, SparseRCNNConfig
from sparse_rcnn.engine.optimizer import build_optimizer, in_official_order, lr_factor, parameter_groups, set_lr


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.backbone.fpn = nn.Linear(2, 2, bias=False)
        self.head = nn.LayerNorm(2)
        self.backbone.body[0].requires_grad_(False)


def test_groups_split_the_body_from_the_rest_and_skip_frozen_parameters():
    model = Toy()
    body, rest = parameter_groups(model, lr=0.1, backbone_lr_factor=0.25, weight_decay=0.01)
    assert (body["lr"], body["base_lr"], body["weight_decay"]) == (0.025, 0.025, 0.01)
    assert (rest["lr"], rest["base_lr"], rest["weight_decay"]) == (0.1, 0.1, 0.01)
    assert [id(p) for p in body["params"]] == [id(p) for p in model.backbone.body[1].parameters()]
    assert [id(p) for p in rest["params"]] == [id(model.backbone.fpn.weight), *map(id, model.head.parameters())]


def test_a_frozen_body_leaves_one_group():
    model = Toy()
    model.backbone.body.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, lr=0.1)] == ["detector"]


def test_official_order():
    with torch.device("meta"):
        model = SparseRCNN(SparseRCNNConfig.preset("r50_100"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for parameter in in_official_order(model)]
    assert sorted(ordered) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    fpn, body = "backbone.fpn", "backbone.body"
    assert ordered[:16:2] == [
        f"{fpn}.{kind}_blocks.{level}.0.weight" for level in range(4) for kind in ("inner", "layer")
    ]
    assert ordered[16:20] == [f"{body}.layer2.0.{name}.weight" for name in ("downsample.0", "conv1", "conv2", "conv3")]
    assert ordered[20] == f"{body}.layer2.1.conv1.weight"
    detector = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("backbone.")]
    assert ordered[-len(detector) :] == detector


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="requires_grad"):
        parameter_groups(Toy().requires_grad_(False), lr=0.1)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.01), (500, 0.505), (999, 0.99901), (1000, 1.0), (2999, 1.0), (3000, 0.1), (3999, 0.1), (4000, 0.01)],
)
def test_schedule_is_the_recipe_of_the_paper(step, factor):
    assert lr_factor(step, 1000, 0.01, (3000, 4000)) == pytest.approx(factor, rel=1e-12)


def test_no_warm_up_starts_at_the_full_rate():
    assert lr_factor(0, warmup_steps=0) == 1.0


def test_set_lr_is_relative_to_the_base_of_each_group():
    optimizer = build_optimizer(Toy(), lr=0.1, backbone_lr_factor=0.5)
    for factor in (0.01, 0.5):  # the second call must not compound with the first
        set_lr(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05]


def test_weight_decay_applies_to_norms_and_biases_too():
    model = Toy()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = model.head.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.head.weight.detach(), before * (1 - 0.1 * 0.5))
