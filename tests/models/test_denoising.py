"""The detector with noisy proposals in training: what they leave alone, and what reaches what."""

from __future__ import annotations

import pytest
import torch

VARIANTS = [
    {},
    {"interaction": "plain"},
    {"self_attention": False},
    {"classification": "softmax"},
    {"deep_supervision": False},
    {"match_iou": 0.3},
    {"num_stages": 1},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_learned_proposals_say_what_they_say_without(tiny, build, images, targets, changes):
    plain, noisy = build(tiny.replace(**changes)), build(tiny.replace(**changes, denoising=10))
    expected, actual = (model(images, targets, return_stages=True) for model in (plain, noisy))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-5, atol=1e-3)
    for name, value in expected.losses.items():
        torch.testing.assert_close(actual.losses[name], value, rtol=1e-5, atol=1e-5)
    assert set(actual.losses) == set(expected.losses) | {f"{name}_dn" for name in expected.losses}
    assert all(value > 0 for value in actual.losses.values())


def test_evaluation_has_none_and_the_weights_no_trace(tiny, build, images, targets):
    plain, noisy = build(tiny), build(tiny.replace(denoising=10))
    assert plain.state_dict().keys() == noisy.state_dict().keys()
    sum(noisy(images, targets).values()).backward()
    outputs = [model.eval()(images, return_stages=True).logits for model in (plain, noisy)]
    assert torch.equal(*outputs)


def noisy_outputs(model, batch):
    """Logits and boxes of the noisy proposals at every stage."""
    pixels = model._scale(batch.pixels, batch.sizes)
    logits, boxes, _ = model._stages(pixels, batch.sizes, batch.noisy)
    N = model.config.num_proposals
    return logits[:, :, N:], boxes[:, :, N:]


def test_a_group_knows_of_itself_alone(tiny, build, images, targets):
    model = build(tiny.replace(denoising=14))
    batch = model.prepare(images, targets)
    before = noisy_outputs(model, batch)
    batch.noisy.boxes[0, 2] += torch.tensor([-3.0, 2, 4, 5])  # of the first group of the first image
    after = noisy_outputs(model, batch)
    changed = [(a - b).abs().flatten(3).amax(3) > 1e-4 for a, b in zip(before, after, strict=True)]
    same_group = batch.noisy.groups[0] == batch.noisy.groups[0, 2]
    assert 1 < same_group.sum() < 14
    for each in changed:
        assert not each[:, 1].any() and not each[:, 0, ~same_group].any()
    assert changed[0][1:, 0, same_group].all(), "the others of its group see the change from the second stage on"


def test_the_features_and_the_boxes_are_those_that_the_batch_names(tiny, build, images, targets):
    model = build(tiny.replace(denoising=6))
    batch = model.prepare(images, targets)
    seen = []
    model.head.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments))
    model(batch)
    _, boxes, features, forbidden = seen
    N = model.config.num_proposals
    assert torch.equal(boxes[:, N:], batch.noisy.boxes)
    for b in range(2):
        assert torch.equal(features[b, N:], model.init_proposal_features.weight[batch.noisy.features[b]])
    assert torch.equal(forbidden, batch.noisy.forbidden(N))


def test_a_noisy_proposal_teaches_the_feature_it_started_with(tiny, build, images, targets):
    model = build(tiny.replace(denoising=2))
    batch = model.prepare(images, targets)
    logits, boxes = noisy_outputs(model, batch)
    sum(model.criterion.denoising(logits, boxes, batch.noisy.targets, batch.targets, batch.sizes).values()).backward()
    rows = model.init_proposal_features.weight.grad.abs().sum(1) > 0
    assert set(rows.nonzero().flatten().tolist()) == set(batch.noisy.features.flatten().tolist())
