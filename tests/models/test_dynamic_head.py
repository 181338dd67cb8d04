"""The iterative head: its stages written out with torch.nn.functional, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.models import DynamicHead

STRIDES = (4, 8)


@pytest.fixture
def config(tiny):
    return tiny.replace(num_stages=2, num_proposals=4)


@pytest.fixture
def inputs():
    """Maps, boxes and proposal features of two images, in float64."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 16, s, s, generator=generator, dtype=torch.float64) for s in (16, 8)]
    corners = torch.rand(2, 4, 2, generator=generator, dtype=torch.float64) * 40
    sizes = torch.rand(2, 4, 2, generator=generator, dtype=torch.float64) * 150 + 4
    boxes = torch.cat([corners, corners + sizes], dim=-1)
    return features, boxes, torch.randn(2, 4, 16, generator=generator, dtype=torch.float64)


def make_head(config):
    torch.manual_seed(0)
    head = DynamicHead(config, STRIDES).double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():  # the LayerNorms' too, so that none passes for another
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bboxes_delta.weight"):
                parameter.mul_(0.1)
    return head


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attention(x, state, heads):
    """Softmax attention of every proposal over all proposals of its image."""
    B, N, C = x.shape
    projected = F.linear(x, state["self_attn.in_proj_weight"], state["self_attn.in_proj_bias"])
    q, k, v = (t.view(B, N, heads, C // heads).transpose(1, 2) for t in projected.chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / math.sqrt(C // heads)).softmax(-1)
    return linear((weights @ v).transpose(1, 2).reshape(B, N, C), state, "self_attn.out_proj")


def interaction(features, boxes, x, state, config):
    """What joins the proposal features x with the RoI features."""
    prefix = "inst_interact"
    roi = ops.multiscale_roi_align(features, boxes, STRIDES, config.pooler_resolution)
    if config.interaction == "dynamic":
        parameters = linear(x, state, f"{prefix}.dynamic_layer").flatten(0, 1)
        norms = [state[f"{prefix}.norm{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")]
        roi = ops.dynamic_conv(roi.flatten(0, 1), parameters, *norms).view_as(roi)
        return x + F.relu(norm(linear(roi.flatten(2), state, f"{prefix}.out_layer"), state, f"{prefix}.norm3"))
    roi = F.relu(norm(linear(roi.flatten(2), state, f"{prefix}.roi.out_layer"), state, f"{prefix}.roi.norm"))
    if config.interaction == "plain":
        return roi
    return x + F.relu(norm(linear(torch.cat([roi, x], -1), state, f"{prefix}.merge"), state, f"{prefix}.norm"))


def expected_stage(features, boxes, x, state, config):
    if config.self_attention and config.interaction != "plain":
        x = norm(x + attention(x, state, config.num_heads), state, "norm1")
    x = norm(interaction(features, boxes, x, state, config), state, "norm2")
    x = norm(x + linear(F.relu(linear(x, state, "linear1")), state, "linear2"), state, "norm3")
    classes = deltas = x
    for layer in range(config.num_cls_layers):
        classes = F.relu(norm(linear(classes, state, f"cls_module.{3 * layer}"), state, f"cls_module.{3 * layer + 1}"))
    for layer in range(config.num_reg_layers):
        deltas = F.relu(norm(linear(deltas, state, f"reg_module.{3 * layer}"), state, f"reg_module.{3 * layer + 1}"))
    deltas = linear(deltas, state, "bboxes_delta")
    return linear(classes, state, "class_logits"), ops.apply_deltas(deltas, boxes, clamp=config.delta_clamp), x


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"self_attention": False},
        {"interaction": "concat"},
        {"interaction": "plain"},
        {"classification": "softmax", "num_cls_layers": 2, "num_reg_layers": 0},
        {"num_heads": 1, "dim_dynamic": 3, "pooler_resolution": 2},
    ],
    ids=str,
)
def test_stages_written_out(config, inputs, changes):
    config = config.replace(**changes)
    head = make_head(config)
    features, boxes, x = inputs
    with torch.no_grad():
        logits, stage_boxes = head(features, boxes, x)
        for index, stage in enumerate(head.stages):
            wanted_logits, boxes, x = expected_stage(features, boxes, x, stage.state_dict(), config)
            torch.testing.assert_close(logits[index], wanted_logits, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(stage_boxes[index], boxes, rtol=1e-8, atol=1e-8)
    assert logits.shape[-1] == 5 + (config.classification == "softmax")
    assert (stage_boxes[1] - stage_boxes[0]).abs().max() > 1


def test_initialisation(config):
    torch.manual_seed(0)
    head = DynamicHead(config.replace(num_classes=16), STRIDES)  # as many as channels: nothing else may be overwritten
    bias = -math.log(0.99 / 0.01)
    for stage in head.stages:
        torch.testing.assert_close(stage.class_logits.bias, torch.full((16,), bias))
        assert stage.class_logits.bias.sigmoid()[0].item() == pytest.approx(0.01)
        assert torch.equal(stage.norm1.weight, torch.ones(16))
        assert torch.equal(stage.norm1.bias, torch.zeros(16))
        for name, parameter in stage.named_parameters():
            if parameter.dim() > 1:
                bound = math.sqrt(6 / sum(parameter.shape))
                assert parameter.abs().max() <= bound, name
                assert parameter.abs().max() > 0.8 * bound, name
    assert not torch.equal(head.stages[0].linear1.weight, head.stages[1].linear1.weight)


def test_boxes_are_detached_between_stages_and_features_are_not(config, inputs):
    head = make_head(config)
    features, boxes, x = inputs
    boxes, x = boxes.requires_grad_(), x.requires_grad_()
    logits, stage_boxes = head(features, boxes, x)
    first = torch.autograd.grad(stage_boxes[0].sum(), boxes, retain_graph=True)[0]
    second = torch.autograd.grad(stage_boxes[1].sum(), boxes, retain_graph=True, allow_unused=True)[0]
    assert first.abs().min() > 0
    assert second is None or not second.any()
    delta = head.stages[0].bboxes_delta.weight
    reached = torch.autograd.grad(stage_boxes[1].sum(), delta, retain_graph=True, allow_unused=True)[0]
    assert reached is None or not reached.any()
    for value in (logits[1], stage_boxes[1]):
        assert torch.autograd.grad(value.sum(), x, retain_graph=True)[0].abs().sum() > 0
        weight = head.stages[0].linear1.weight
        assert torch.autograd.grad(value.sum(), weight, retain_graph=True)[0].abs().sum() > 0


@pytest.mark.parametrize("changes", [{}, {"interaction": "concat"}, {"classification": "softmax"}], ids=str)
def test_permuting_proposals_permutes_the_outputs(config, inputs, changes):
    head = make_head(config.replace(**changes))
    features, boxes, x = inputs
    order = [2, 0, 3, 1]
    with torch.no_grad():
        expected = head(features, boxes, x)
        actual = head(features, boxes[:, order], x[:, order])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, order], rtol=1e-9, atol=1e-9)


def test_an_image_of_a_batch_is_the_image_alone(config, inputs):
    head = make_head(config)
    features, boxes, x = inputs
    with torch.no_grad():
        expected = head(features, boxes, x)
        actual = head([f[1:] for f in features], boxes[1:], x[1:])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, 1:], rtol=1e-9, atol=1e-9)


def test_level_rule_and_delta_clamp_reach_the_operators(config, inputs):
    features, _, x = inputs
    boxes = torch.tensor([0.0, 0, 111.99999, 111.99999], dtype=torch.float64).expand(2, 4, 4)
    clamp = (-0.01, 0.01)
    head, mmdet = make_head(config), make_head(config.replace(level_rule="mmdet", delta_clamp=clamp))
    mmdet.load_state_dict(head.state_dict())
    with torch.no_grad():
        (logits, _), (mmdet_logits, mmdet_boxes) = head(features, boxes, x), mmdet(features, boxes, x)
    assert (logits[0] - mmdet_logits[0]).abs().max() > 1e-3  # another level was read
    ratio = (mmdet_boxes[0, ..., 2:] - mmdet_boxes[0, ..., :2]) / 111.99999
    assert ratio.log().abs().max() <= 0.01 + 1e-9
