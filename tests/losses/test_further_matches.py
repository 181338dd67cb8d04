"""Further matches against a slow search, and the losses of them against the slow losses of the same pairs."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn import functional as F

from sparse_rcnn.losses import HungarianMatcher, PackedTargets, SetCriterion, pack_targets
from sparse_rcnn.losses.further_matches import MAX_FURTHER, further_matches
from tests.host_reads import forbid_host_reads

K = 4
SIZES = torch.tensor([[100.0, 120.0], [90.0, 80.0]], dtype=torch.float64)


def near(boxes, generator, spread):
    """Boxes around the given ones, ``spread`` of their size away."""
    size = boxes[..., 2:] - boxes[..., :2]
    shift = (torch.rand(boxes.shape, generator=generator, dtype=boxes.dtype) - 0.5) * spread
    return boxes + shift * size.repeat(*[1] * (boxes.dim() - 1), 2)


def make_problem(counts, S=3, N=30, seed=0):
    """Logits, boxes around the targets, and the targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40
        size = 10 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 30
        labels = torch.randint(K, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + size], 1), "labels": labels})
    boxes = torch.zeros(S, len(counts), N, 4, dtype=torch.float64)
    for b, target in enumerate(targets):
        if len(target["boxes"]):
            boxes[:, b] = near(target["boxes"][torch.arange(N) % counts[b]].expand(S, N, 4), generator, 0.5)
        else:
            boxes[:, b] = torch.tensor([1.0, 1.0, 9.0, 9.0])
    return torch.randn(S, len(counts), N, K, generator=generator, dtype=torch.float64), boxes, targets


def slow_pairs(matches, boxes, target, iou):
    """Pairs (proposal, target) of one image at one stage: the given ones and the further ones."""
    pairs = [(int(n), m) for m, n in enumerate(matches[: len(target["boxes"])]) if n >= 0]
    taken = {n for n, _ in pairs}
    candidates = {m: [] for m in range(len(target["boxes"]))}
    for n in range(len(boxes)):
        if n in taken or not candidates:
            continue
        overlaps = torchvision.ops.box_iou(boxes[n : n + 1], target["boxes"])[0]
        if overlaps.max() >= iou:
            candidates[int(overlaps.argmax())].append((float(overlaps.max()), n))
    return pairs + [(n, m) for m, found in candidates.items() for _, n in sorted(found, reverse=True)[:MAX_FURTHER]]


def matches_of(logits, boxes, packed):
    return HungarianMatcher()(logits, boxes, packed, SIZES)


@pytest.mark.parametrize("iou", [0.3, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (12, 7), (40, 1)])
def test_equals_a_slow_search(counts, iou):
    logits, boxes, targets = make_problem(counts)
    packed = pack_targets(targets, K, boxes)
    matches = matches_of(logits, boxes, packed)
    found, repeated = further_matches(matches, boxes, packed, iou)
    M = max(counts)
    assert torch.equal(found[..., :M], matches) and found.shape == (3, 2, M * (1 + MAX_FURTHER))
    assert torch.equal(repeated.counts, packed.counts)
    further = 0
    for s in range(3):
        for b, target in enumerate(targets):
            pairs = [(int(n), column % M) for column, n in enumerate(found[s, b]) if n >= 0]
            expected = slow_pairs(matches[s, b], boxes[s, b], target, iou)
            assert sorted(pairs) == sorted(expected), (s, b)
            further += len(pairs) - int((matches[s, b] >= 0).sum())
            for column in range(found.shape[2]):
                assert torch.equal(repeated.boxes[b, column], packed.boxes[b, column % M])
                assert repeated.labels[b, column] == packed.labels[b, column % M]
    assert (further > 0) == (iou < 1.0)


def test_a_target_takes_its_best():
    box = torch.tensor([10.0, 10.0, 20.0, 20.0])
    offsets = torch.arange(10) * 0.2
    boxes = (box + offsets.flip(0)[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])).view(1, 1, 10, 4)
    packed = PackedTargets(torch.zeros(1, 1).long(), box.view(1, 1, 4), torch.tensor([1]))
    found, _ = further_matches(torch.tensor([[[9]]]), boxes, packed, 0.5)
    assert found.tolist() == [[[9, 8, 7, 6, 5, 4, 3, 2]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_box_that_is_not_finite_is_no_match(bad):
    _, boxes, targets = make_problem((2, 2), N=6)
    boxes[0, 0, 5] = bad
    packed = pack_targets(targets, K, boxes)
    found, _ = further_matches(torch.full((3, 2, 2), -1), boxes, packed, 0.01)
    assert 5 not in found[0, 0] and 5 in found[1, 0]


def slow_losses(logits, boxes, targets, iou):
    """Sum of the weighted losses, pair by pair."""
    packed = pack_targets(targets, K, boxes)
    matches, total = matches_of(logits.detach(), boxes.detach(), packed), 0.0
    for s in range(len(logits)):
        for b, target in enumerate(targets):
            classes = torch.full((boxes.shape[2],), K)
            scale = torch.stack([SIZES[b, 1], SIZES[b, 0], SIZES[b, 1], SIZES[b, 0]])
            for n, m in slow_pairs(matches[s, b], boxes[s, b].detach(), target, iou):
                box, goal = boxes[s, b, n], target["boxes"][m]
                classes[n] = target["labels"][m]
                total = total + 5 * ((box - goal) / scale).abs().sum()
                total = total + 2 * (1 - torchvision.ops.generalized_box_iou(box[None], goal[None])[0, 0])
            one_hot = F.one_hot(classes, K + 1)[..., :K].double()
            total = total + 2 * torchvision.ops.sigmoid_focal_loss(logits[s, b], one_hot, 0.25, 2.0, "sum")
    return total / max(sum(len(target["labels"]) for target in targets), 1)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)])
def test_losses_and_gradients(counts):
    logits, boxes, targets = make_problem(counts)
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    criterion = SetCriterion(HungarianMatcher(), K, match_iou=0.6)
    loss = sum(criterion(*leaves, pack_targets(targets, K, boxes), SIZES).values())
    expected = slow_losses(*leaves, targets, 0.6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the focal loss is a float32 sum
    actual = torch.autograd.grad(loss, leaves, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, materialize_grads=True)
    torch.testing.assert_close(actual[0], wanted[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_reads_nothing_on_the_host(counts):
    logits, boxes, targets = make_problem(counts)
    packed = pack_targets(targets, K, boxes, columns=4)
    criterion = SetCriterion(HungarianMatcher(), K, match_iou=0.6)
    with forbid_host_reads():
        sum(criterion(logits.requires_grad_(), boxes.requires_grad_(), packed, SIZES).values()).backward()
    assert logits.grad.isfinite().all() and boxes.grad.isfinite().all()


def test_the_images_of_a_step_divided():
    """Two images at once, and one after the other with the counts of both."""
    logits, boxes, targets = make_problem((3, 5))
    criterion = SetCriterion(HungarianMatcher(), K, match_iou=0.6)
    together = sum(criterion(logits, boxes, pack_targets(targets, K, boxes), SIZES).values())
    apart = 0.0
    for b in range(2):
        packed = pack_targets(targets[b : b + 1], K, boxes)
        packed.step_counts = torch.tensor([3, 5])
        apart = apart + sum(criterion(logits[:, b : b + 1], boxes[:, b : b + 1], packed, SIZES[b : b + 1]).values())
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)


def test_not_with_softmax():
    with pytest.raises(ValueError, match="match_iou: expected None with softmax classification, got 0.5"):
        SetCriterion(HungarianMatcher(classification="softmax"), K, match_iou=0.5)
