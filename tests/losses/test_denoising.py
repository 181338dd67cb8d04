"""Noisy copies of the targets: what an image gets, who attends to whom, and the losses against slow ones."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn import functional as F

from sparse_rcnn.losses import HungarianMatcher, SetCriterion, pack_targets
from sparse_rcnn.losses.denoising import FAR, NEAR, mended, noisy_proposals
from tests.host_reads import forbid_host_reads

K, N = 4, 7
SIZES = torch.tensor([[100.0, 120.0], [90.0, 80.0], [64.0, 64.0]], dtype=torch.float64)


def make_targets(counts, seed=0):
    """Boxes in the middle of the images, so that no noise is cut off at the border."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        corners = 22 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 6
        size = 6 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 8
        labels = torch.randint(K, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + size], 1), "labels": labels})
    return pack_targets(targets, K, SIZES)


def make(counts, count, seed=0):
    targets = make_targets(counts, seed)
    return targets, noisy_proposals(targets, SIZES[: len(counts)], count, N)


@pytest.mark.parametrize("count", [2, 3, 12, 40])
def test_each_group_has_every_target_once_to_mend_and_as_many_to_refuse(count):
    targets, noisy = make((3, 1, 0), count)
    assert [tensor.shape for tensor in noisy.tensors()] == [(3, count, 4), *[(3, count)] * 3]
    for m, origins, groups in zip((3, 1, 0), noisy.targets, noisy.groups, strict=True):
        taken = min(m, count // 2)
        sizes = groups.unique(return_counts=True)[1].tolist()
        if taken == 0:
            assert (origins == -1).all() and sizes == [1] * count
            continue
        groups_of_all = count // (2 * taken)
        assert sorted(sizes, reverse=True) == [2 * taken] * groups_of_all + [1] * (count - 2 * taken * groups_of_all)
        chosen = None
        for group in range(groups_of_all):
            members = origins[groups == group].tolist()
            assert members.count(-1) == taken
            targets_of_group = sorted(t for t in members if t >= 0)
            assert len(set(targets_of_group)) == taken and targets_of_group[-1] < m
            assert chosen in (None, targets_of_group)
            chosen = targets_of_group
        assert (origins[groups >= groups_of_all] == -1).all()
    assert mended(targets.counts, count).tolist() == (noisy.targets >= 0).sum(1).tolist()


def test_of_more_targets_than_places_every_one_has_its_chance():
    seen = set()
    for seed in range(30):
        targets, noisy = make((9,), 6, seed)
        origins = noisy.targets[0]
        assert (origins >= 0).sum() == 3 == mended(targets.counts, 6)
        seen.update(origins[origins >= 0].tolist())
    assert seen == set(range(9))


def test_how_far_the_sides_are_moved():
    targets, noisy = make((3, 1), 3000)
    for b, (boxes, origins) in enumerate(zip(noisy.boxes, noisy.targets, strict=True)):
        near = origins >= 0
        true = targets.boxes[b][origins[near]]
        half = (true[:, 2:] - true[:, :2]).repeat(1, 2) / 2
        moved = (boxes[near] - true) / half
        # A far corner can pass the other one only beyond a whole side: near ones are as they were moved.
        assert NEAR - 0.01 < moved.abs().max() <= NEAR + 1e-9
        assert abs(moved.mean()) < 0.03 and abs(moved.abs().mean() - NEAR / 2) < 0.03
        overlaps = torchvision.ops.box_iou(boxes, targets.boxes[b])
        assert overlaps[near, origins[near]].mean() > 0.45
    alone = noisy.targets[1] < 0  # of the image with one target
    iou = torchvision.ops.box_iou(noisy.boxes[1][alone], targets.boxes[1][:1])
    assert iou.mean() < 0.12 and iou.max() < 0.6
    size = noisy.boxes[1][alone][:, 2:] - noisy.boxes[1][alone][:, :2]
    whole = targets.boxes[1][0, 2:] - targets.boxes[1][0, :2]
    assert (size <= whole * (1 + FAR) + 1e-9).all()


def test_boxes_stay_in_the_image_and_have_an_area():
    size = torch.tensor([[20.0, 30.0]])
    boxes = torch.tensor([[0.0, 0, 30, 20], [29.5, 19.5, 30, 20], [0, 0, 0.01, 0.01]])
    targets = pack_targets([{"boxes": boxes, "labels": torch.tensor([0, 1, 2])}], K, size)
    for counts in (targets, pack_targets([{"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)}], K, size)):
        found = noisy_proposals(counts, size, 400, N).boxes[0]
        assert found.min() >= 0 and (found[:, [0, 2]] <= 30).all() and (found[:, [1, 3]] <= 20).all()
        assert (found[:, 2:] - found[:, :2] >= 1 - 1e-5).all()


def test_the_noise_is_of_the_image_and_not_of_its_batch():
    targets, noisy = make((3, 2), 20)
    last = noisy_proposals(targets, SIZES[:2], 20, N)
    assert all(torch.equal(a, b) for a, b in zip(noisy.tensors(), last.tensors(), strict=True))
    boxes, labels = targets.boxes[1, :2], targets.labels[1, :2]
    alone = noisy_proposals(pack_targets([{"boxes": boxes, "labels": labels}], K, SIZES), SIZES[1:2], 20, N)
    assert all(torch.equal(a[1:], b) for a, b in zip(noisy.tensors(), alone.tensors(), strict=True))
    moved = pack_targets([{"boxes": boxes + 1e-3, "labels": labels}], K, SIZES)
    other = noisy_proposals(moved, SIZES[1:2], 20, N)
    assert (other.boxes - alone.boxes).abs().max() > 1 and not torch.equal(other.features, alone.features)


def test_features_are_of_all_learned_proposals():
    _, noisy = make((3, 1, 0), 200)
    assert set(noisy.features.flatten().tolist()) == set(range(N))


def test_who_may_not_attend_to_whom():
    _, noisy = make((2, 1, 0), 9)
    forbidden = noisy.forbidden(N)
    assert forbidden.shape == (3, N + 9, N + 9)
    for b in range(3):
        for one in range(N + 9):
            for other in range(N + 9):
                learned = one < N, other < N
                same = all(learned) or (not any(learned) and noisy.groups[b, one - N] == noisy.groups[b, other - N])
                assert forbidden[b, one, other] == (not same)


def slow_losses(logits, boxes, origins, targets, sizes, step_counts=None):
    """Of one stage, a proposal at a time: class, L1 and GIoU loss, weighted as by default."""
    D = logits.shape[1]
    ce = l1 = giou = torch.zeros((), dtype=torch.float64)
    for b in range(len(logits)):
        for d in range(D):
            goal = torch.zeros(K, dtype=torch.float64)
            origin = int(origins[b, d])
            if origin >= 0:
                goal[targets.labels[b, origin]] = 1
                scale = sizes[b].flip(0).repeat(2)
                l1 = l1 + F.l1_loss(boxes[b, d] / scale, targets.boxes[b, origin] / scale, reduction="sum")
                giou = giou + torchvision.ops.generalized_box_iou_loss(boxes[b, d], targets.boxes[b, origin])
            ce = ce + torchvision.ops.sigmoid_focal_loss(logits[b, d], goal, reduction="sum")
    counts = targets.counts if step_counts is None else step_counts
    total = 0
    for count in counts.tolist():
        taken = min(count, D // 2)
        total += taken * (D // (2 * taken)) if taken else 0
    return torch.stack([2 * ce, 5 * l1, 2 * giou]) / max(total, 1)


@pytest.mark.parametrize("counts", [(3, 1, 0), (0, 0, 0), (9, 2, 1)])
@pytest.mark.parametrize("step_counts", [None, (3, 1, 0, 5, 8, 0)])
@pytest.mark.parametrize("deep", [True, False])
def test_losses_against_slow_ones(counts, step_counts, deep):
    targets, noisy = make(counts, 11)
    targets.step_counts = None if step_counts is None else torch.tensor(step_counts)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 11, K, generator=generator, dtype=torch.float64).requires_grad_()
    boxes = (noisy.boxes + torch.rand(2, 3, 11, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    criterion = SetCriterion(HungarianMatcher(), K, deep_supervision=deep)
    with forbid_host_reads():
        losses = criterion.denoising(logits, boxes, noisy.targets, targets, SIZES)
        torch.stack(list(losses.values())).sum().backward()
    suffixes = ["_0", ""] if deep else [""]
    assert set(losses) == {f"loss_{kind}{suffix}_dn" for kind in ("ce", "bbox", "giou") for suffix in suffixes}
    arguments = logits.detach().requires_grad_(), boxes.detach().requires_grad_()
    total = 0
    for stage, suffix in zip(range(len(suffixes))[::-1], suffixes[::-1], strict=True):
        stage = stage if deep else 1
        slow = slow_losses(*(a[stage] for a in arguments), noisy.targets, targets, SIZES, targets.step_counts)
        for name, value in zip(("ce", "bbox", "giou"), slow, strict=True):
            torch.testing.assert_close(losses[f"loss_{name}{suffix}_dn"].double(), value, rtol=1e-6, atol=1e-9)
        total = total + slow.sum()
    total.backward()
    for given, argument in zip((logits, boxes), arguments, strict=True):
        expected = torch.zeros_like(argument) if argument.grad is None else argument.grad
        torch.testing.assert_close(given.grad, expected, rtol=1e-5, atol=1e-8)
    assert (boxes.grad.abs().sum() > 0) == (sum(counts) > 0)
