"""HungarianMatcher: each weight moves the assignment its own way."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.measure import peak_memory
from sparse_rcnn import ops
from sparse_rcnn.losses import HungarianMatcher, PackedTargets
from sparse_rcnn.ops import matching_cost

SIZES = torch.tensor([[100.0, 100.0]])


def one_target(box, label=0):
    return PackedTargets(torch.tensor([[label]]), torch.tensor([[box]]), torch.tensor([1]))


def test_each_weight_alone():
    target = one_target([10.0, 10, 30, 30])
    boxes = torch.tensor(
        [[
            [60.0, 60, 90, 90],  # far, but sure of the class
            [22.0, 22, 42, 42],  # overlaps, 48 px of L1 away
            [10.0, 10, 30, 14],  # 16 px of L1 away, overlaps by a fifth
            [0.0, 0, 30, 42],  # IoU 400/1260, 32 px of L1 away
        ]]
    )[None]  # fmt: skip
    logits = torch.tensor([[[[4.0], [0.0], [0.0], [-2.0]]]])
    expected = {(1.0, 0.0, 0.0): 0, (0.0, 1.0, 0.0): 2, (0.0, 0.0, 1.0): 3}
    for weights, proposal in expected.items():
        matcher = HungarianMatcher(*weights)
        assert matcher(logits, boxes, target, SIZES).tolist() == [[[proposal]]], weights


def test_softmax_takes_the_likeliest_of_the_targets_class():
    boxes = torch.tensor([10.0, 10, 30, 30]).expand(1, 1, 3, 4)
    logits = torch.tensor([[[[1.0, 0.0, 5.0], [0.0, 2.0, 0.0], [0.5, 3.0, 9.0]]]])  # the last is "no object"
    softmax = HungarianMatcher(classification="softmax")
    focal = HungarianMatcher()
    assert softmax(logits, boxes, one_target([10.0, 10, 30, 30], label=1), SIZES).tolist() == [[[1]]]
    assert focal(logits, boxes, one_target([10.0, 10, 30, 30], label=1), SIZES).tolist() == [[[2]]]


def random_problem(S=2, B=2, N=4, K=3, counts=(3, 2)):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(S, B, N, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 5 + 30 * torch.rand(S, B, N, 2, generator=generator)], dim=-1)
    corners = torch.rand(B, max(counts), 2, generator=generator) * 60
    target_boxes = torch.cat([corners, corners + 5 + 30 * torch.rand(B, max(counts), 2, generator=generator)], dim=-1)
    labels = torch.randint(K, (B, max(counts)), generator=generator)
    sizes = torch.tensor([[100.0, 120.0], [90.0, 80.0]])
    logits = torch.randn(S, B, N, K, generator=generator)
    return logits, boxes, PackedTargets(labels, target_boxes, torch.tensor(counts)), sizes


def test_total_cost_is_the_least_of_all_assignments():
    logits, boxes, targets, sizes = random_problem()
    matches = HungarianMatcher(1.5, 4.0, 3.0, 0.4, 1.0)(logits, boxes, targets, sizes)
    cost = matching_cost(
        logits, boxes, targets.labels, targets.boxes, targets.counts, sizes, (1.5, 4.0, 3.0), 0.4, 1.0
    )  # fmt: skip
    for s, b in itertools.product(range(2), range(2)):
        count = targets.counts[b].item()
        totals = {
            order: sum(cost[s, b, n, m].item() for m, n in enumerate(order))
            for order in itertools.permutations(range(4), count)
        }
        assert tuple(matches[s, b, :count].tolist()) == min(totals, key=totals.get)
        assert (matches[s, b, count:] == -1).all()


def test_no_targets_and_more_targets_than_proposals():
    logits, boxes, targets, sizes = random_problem()
    nothing = PackedTargets(torch.zeros(2, 0).long(), torch.zeros(2, 0, 4), torch.zeros(2).long())
    assert HungarianMatcher()(logits, boxes, nothing, sizes).shape == (2, 2, 0)
    matches = HungarianMatcher()(logits[:, :, :1], boxes[:, :, :1], targets, sizes)
    assert (matches == 0).sum(-1).tolist() == [[1, 1], [1, 1]]
    assert matches.min() == -1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_matched_last(bad):
    logits, boxes, targets, sizes = random_problem()
    boxes[0, 0, 1] = bad
    matches = HungarianMatcher()(logits, boxes, targets, sizes)
    assert sorted(matches[0, 0].tolist()) == [0, 2, 3]
    boxes[:] = bad
    matches = HungarianMatcher()(logits, boxes, targets, sizes)
    assert all(len(set(row)) == 3 for row in matches[:, 0].tolist())


AWKWARD = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30)


@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_any_predictions_have_a_valid_assignment(backend, classification):
    generator = torch.Generator().manual_seed(0)
    logits, boxes, targets, sizes = random_problem(N=6, K=4, counts=(4, 2))
    targets.labels.clamp_(max=2)
    matcher = HungarianMatcher(classification=classification)
    for share in (0.05, 0.3, 0.7, 1.0) * 5:
        broken = []
        for tensor in (logits, boxes):
            values = torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), tensor.shape, generator=generator)]
            broken.append(torch.where(torch.rand(tensor.shape, generator=generator) < share, values, tensor))
        with ops.backend(backend):
            matches = matcher(*broken, targets, sizes)
        for row, count in ((row, count) for stage in matches for row, count in zip(stage, (4, 2), strict=True)):
            assert len(set(row[:count].tolist())) == count and set(row[:count].tolist()) <= set(range(6))
            assert (row[count:] == -1).all()


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_half_precision_predictions_that_are_not_finite(classification):
    """Of float16, whose range the cost of such a pair leaves."""
    logits, boxes, targets, sizes = random_problem()
    targets = PackedTargets(targets.labels.clamp(max=1), targets.boxes.half(), targets.counts)
    logits[0, 0, 1] = float("nan")
    matches = HungarianMatcher(classification=classification)(logits.half(), boxes.half(), targets, sizes.half())
    assert sorted(matches[0, 0].tolist()) == [0, 2, 3]


def test_memory_is_that_of_the_padded_cost():
    """S * B * N * max(M), where concatenated targets take N * sum(M) for each image of each stage."""
    counts = (63, *[3] * 15)
    logits, boxes, targets, sizes = random_problem(S=6, B=16, N=300, K=80, counts=counts)
    matcher = HungarianMatcher()
    cost_bytes, results = 6 * 16 * 300 * 63 * 4, 6 * 16 * 63 * 8
    peak = peak_memory(lambda: matcher(logits, boxes, targets, sizes.repeat(8, 1)), torch.device("cpu"))
    if peak is None:
        pytest.skip("the system does not tell the peak of resident memory")
    scratch = 2 * torch.get_num_threads() * 300 * 63 * 8  # one problem of each thread in float64, and its pages
    assert 0.5 * cost_bytes < peak < cost_bytes + results + scratch + 2**20
    assert peak < 0.75 * 6 * 16 * 300 * sum(counts) * 4


def test_no_gradient():
    logits, boxes, targets, sizes = random_problem()
    matches = HungarianMatcher()(logits.requires_grad_(), boxes.requires_grad_(), targets, sizes)
    assert not matches.requires_grad
