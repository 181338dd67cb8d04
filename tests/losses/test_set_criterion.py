"""SetCriterion against a slow implementation of the losses, stage by stage and pair by pair, in float64."""

from __future__ import annotations

import pytest
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.losses import HungarianMatcher, PackedTargets, SetCriterion, pack_targets
from sparse_rcnn.losses.set_criterion import mean_box_count

K = 4
SIZES = torch.tensor([[100.0, 120.0], [90.0, 80.0]], dtype=torch.float64)


def make_boxes(*shape, generator):
    corners = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 60
    return torch.cat([corners, corners + 3 + 40 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)], -1)


def make_problem(counts=(3, 1), S=3, N=5, classes=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(S, len(counts), N, classes, generator=generator, dtype=torch.float64)
    boxes = make_boxes(S, len(counts), N, generator=generator)
    targets = [
        {"boxes": make_boxes(count, generator=generator), "labels": torch.randint(K, (count,), generator=generator)}
        for count in counts
    ]
    return logits, boxes, targets


def make_criterion(classification="focal", **options):
    return SetCriterion(HungarianMatcher(classification=classification), K, **options)


def slow_match(logits, boxes, target, size, classification):
    """Pairs (proposal, target) of one image at one stage, the cost worked out entry by entry."""
    scale = torch.stack([size[1], size[0], size[1], size[0]])
    cost = torch.zeros(len(boxes), len(target["boxes"]), dtype=torch.float64)
    for n in range(len(boxes)):
        for m, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
            if classification == "focal":
                p = logits[n, label].sigmoid()
                class_cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            else:
                class_cost = -logits[n].softmax(-1)[label]
            giou = torchvision.ops.generalized_box_iou(boxes[n : n + 1], box[None])[0, 0]
            cost[n, m] = 2 * class_cost + 5 * ((boxes[n] - box) / scale).abs().sum() - 2 * giou
    return list(zip(*linear_sum_assignment(cost.numpy()), strict=True))


def slow_losses(logits, boxes, targets, classification="focal", no_object=0.1):
    """{(name, stage): value} of every stage."""
    S, B, N, _ = logits.shape
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    losses = {}
    for s in range(S):
        l1 = giou = torch.zeros((), dtype=torch.float64)
        classes = torch.full((B, N), K)
        for b in range(B):
            scale = torch.stack([SIZES[b, 1], SIZES[b, 0], SIZES[b, 1], SIZES[b, 0]])
            for n, m in slow_match(logits[s, b].detach(), boxes[s, b].detach(), targets[b], SIZES[b], classification):
                box, target = boxes[s, b, n], targets[b]["boxes"][m]
                classes[b, n] = targets[b]["labels"][m]
                l1 = l1 + ((box - target) / scale).abs().sum()
                giou = giou + 1 - torchvision.ops.generalized_box_iou(box[None], target[None])[0, 0]
        if classification == "focal":
            one_hot = F.one_hot(classes, K + 1)[..., :K].double()
            ce = torchvision.ops.sigmoid_focal_loss(logits[s], one_hot, 0.25, 2.0, "sum") / num_boxes
        else:
            weights = torch.ones(B, N, dtype=torch.float64).masked_fill(classes == K, no_object)
            picked = logits[s].log_softmax(-1).gather(2, classes[..., None])[..., 0]
            ce = -(weights * picked).sum() / weights.sum()
        losses |= {("loss_ce", s): 2 * ce, ("loss_bbox", s): 5 * l1 / num_boxes, ("loss_giou", s): 2 * giou / num_boxes}
    return losses


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (7, 6), (0, 0)])
def test_equals_the_slow_implementation(counts, classification, backend):
    logits, boxes, targets = make_problem(counts, classes=K + (classification == "softmax"))
    with ops.backend(backend):
        check_against_slow(logits, boxes, targets, classification)


def check_against_slow(logits, boxes, targets, classification):
    actual = make_criterion(classification)(logits, boxes, pack_targets(targets, K, boxes), SIZES)
    expected = slow_losses(logits, boxes, targets, classification)
    assert len(actual) == len(expected) == 9
    for (name, stage), value in expected.items():
        ours = actual[name if stage == 2 else f"{name}_{stage}"]
        tolerance = 1e-6 if (name, classification) == ("loss_ce", "focal") else 1e-10  # float32, as the official loss
        assert ours.item() == pytest.approx(value.item(), rel=tolerance, abs=1e-12), (name, stage)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("counts", [(3, 1), (7, 6), (0, 0)])
def test_gradients_are_those_of_the_slow_implementation(counts, classification, backend):
    logits, boxes, targets = make_problem(counts, classes=K + (classification == "softmax"))
    with ops.backend(backend):
        check_gradients_against_slow(logits, boxes, targets, classification)


def check_gradients_against_slow(logits, boxes, targets, classification):
    logits.requires_grad_()
    boxes.requires_grad_()
    losses = make_criterion(classification)(logits, boxes, pack_targets(targets, K, boxes), SIZES)
    actual = torch.autograd.grad(sum(losses.values()), (logits, boxes))
    with torch.enable_grad():
        detached = [t.detach().requires_grad_() for t in (logits, boxes)]
        total = sum(slow_losses(*detached, targets, classification).values())
        expected = torch.autograd.grad(total, detached, materialize_grads=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if classification == "focal" else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-10, atol=1e-12)


def test_the_matchers_weights_are_the_losses():
    logits, boxes, targets = make_problem(S=1)
    packed = pack_targets(targets, K, boxes)
    base = SetCriterion(HungarianMatcher(2.0, 5.0, 2.0), K)(logits, boxes, packed, SIZES)
    scaled = SetCriterion(HungarianMatcher(4.0, 10.0, 4.0), K)(logits, boxes, packed, SIZES)  # the same matches
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert scaled[name].item() == pytest.approx(2 * base[name].item(), rel=1e-6)


def test_weight_of_no_object():
    logits, boxes, targets = make_problem(classes=K + 1)
    packed = pack_targets(targets, K, boxes)
    for weight in (0.0, 0.5, 1.0):
        losses = make_criterion("softmax", no_object_weight=weight)(logits, boxes, packed, SIZES)
        expected = slow_losses(logits, boxes, targets, "softmax", weight)
        assert losses["loss_ce"].item() == pytest.approx(expected["loss_ce", 2].item(), rel=1e-10)


@pytest.mark.parametrize("classes", [1, 1203])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_one_class_and_those_of_lvis(classes, gamma):
    logits, boxes, targets = make_problem(classes=classes)
    for target in targets:
        target["labels"] = target["labels"] * (classes - 1) // (K - 1)
    criterion = SetCriterion(HungarianMatcher(focal_gamma=gamma), classes)
    packed = pack_targets(targets, classes, boxes)
    losses = criterion(logits.requires_grad_(), boxes, packed, SIZES)
    matches = criterion.matcher(logits, boxes, packed, SIZES)
    one_hot = torch.zeros_like(logits, requires_grad=False)
    for s, b, m in (
        (s, b, m) for s in range(3) for b, target in enumerate(targets) for m in range(len(target["labels"]))
    ):
        one_hot[s, b, matches[s, b, m], targets[b]["labels"][m]] = 1
    expected = 2 * torchvision.ops.sigmoid_focal_loss(logits, one_hot, 0.25, gamma, "none").flatten(1).sum(1) / 4
    for s, name in enumerate(("loss_ce_0", "loss_ce_1", "loss_ce")):
        assert losses[name].item() == pytest.approx(expected[s].item(), rel=1e-6)
    grads = [torch.autograd.grad(total, logits)[0] for total in (sum(losses.values()), expected.sum())]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_without_objects_and_without_their_weight_there_is_no_softmax_loss():
    logits, boxes, targets = make_problem((0, 0), classes=K + 1)
    losses = make_criterion("softmax", no_object_weight=0.0)(logits, boxes, pack_targets(targets, K, boxes), SIZES)
    assert [value.item() for value in losses.values()] == [0] * 9


@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("counts", [(3, 1), (0, 0), (7, 6)])
def test_predictions_that_are_not_finite_show_in_the_losses_of_their_stage(counts, bad, classification):
    """One logit, or one box, of an unmatched proposal is enough."""
    clean = make_problem(counts, classes=K + (classification == "softmax"))
    criterion = make_criterion(classification)
    packed = pack_targets(clean[2], K, clean[1])
    before = criterion(*clean[:2], packed, SIZES)
    for index, names in enumerate((("loss_ce_1",), ("loss_bbox_1", "loss_giou_1"))):
        tensors = [tensor.clone() for tensor in clean[:2]]
        tensors[index][1, 1, 4, 3] = bad
        losses = criterion(*tensors, packed, SIZES)
        assert {name for name, value in losses.items() if not value.isfinite()} == set(names)
        assert all(losses[name] == before[name] for name in losses if not name.endswith("_1"))


def test_half_precision_predictions():
    logits, boxes, targets = make_problem((3, 1))
    packed = pack_targets(targets, K, boxes.float())
    expected = make_criterion()(logits.bfloat16().float(), boxes.float(), packed, SIZES.float())
    losses = make_criterion()(logits.bfloat16(), boxes.float(), packed, SIZES.float())
    assert all(value.dtype == torch.float32 for value in losses.values())
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


def test_without_deep_supervision():
    logits, boxes, targets = make_problem()
    packed = pack_targets(targets, K, boxes)
    last = make_criterion(deep_supervision=False)(logits, boxes, packed, SIZES)
    every = make_criterion()(logits, boxes, packed, SIZES)
    assert set(last) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert set(every) == {f"{name}{suffix}" for name in last for suffix in ("", "_0", "_1")}
    for name, value in last.items():
        assert value.item() == pytest.approx(every[name].item(), rel=1e-12)


def test_a_batch_without_boxes_has_a_class_loss_only():
    logits, boxes, targets = make_problem((0, 0))
    logits.requires_grad_()
    boxes.requires_grad_()
    losses = make_criterion()(logits, boxes, pack_targets(targets, K, boxes), SIZES)
    assert all(losses[f"{name}{s}"] == 0 for name in ("loss_bbox", "loss_giou") for s in ("", "_0", "_1"))
    assert all(losses[f"loss_ce{s}"] > 0 for s in ("", "_0", "_1"))
    sum(losses.values()).backward()
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))
    assert (logits.grad > 0).all()  # every score is pushed down


@pytest.mark.parametrize(("counts", "divisor"), [([0, 0], 1), ([1], 1), ([2, 3], 5), ([], 1)])
def test_mean_box_count(counts, divisor):
    count = mean_box_count(torch.tensor(counts, dtype=torch.int64), torch.float64)
    assert count.dtype == torch.float64
    assert count.item() == divisor


@pytest.mark.parametrize(("mine", "others", "expected"), [([2, 3], 4.0, 4.5), ([0, 0], 1.0, 1.0), ([0], 8.0, 4.0)])
def test_mean_box_count_over_two_processes(monkeypatch, mine, others, expected):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(others))
    assert mean_box_count(torch.tensor(mine), torch.float32).item() == expected


def test_the_count_of_all_processes_divides_every_loss(monkeypatch):
    logits, boxes, targets = make_problem((3, 1))
    packed = pack_targets(targets, K, boxes)
    alone = make_criterion()(logits, boxes, packed, SIZES)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(12))
    both = make_criterion()(logits, boxes, packed, SIZES)
    for name, value in alone.items():
        assert both[name].item() == pytest.approx(value.item() * 4 / 8, rel=1e-6), name


def test_padding_does_not_matter():
    logits, boxes, targets = make_problem((3, 1))
    packed = pack_targets(targets, K, boxes)
    wide = PackedTargets(F.pad(packed.labels, (0, 3)), F.pad(packed.boxes, (0, 0, 0, 3)), packed.counts)
    for name, value in make_criterion()(logits, boxes, packed, SIZES).items():
        assert make_criterion()(logits, boxes, wide, SIZES)[name].item() == pytest.approx(value.item(), rel=1e-12)
