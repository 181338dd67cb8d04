"""From the matcher to the gradients, no value of a tensor is read by the host."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.losses import HungarianMatcher, PackedTargets, SetCriterion
from tests.host_reads import HostRead, forbid_host_reads

S, B, N, K = 3, 2, 6, 4


def make_arguments(M, classes, counts):
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape):
        corners = torch.rand(*shape, 2, generator=generator) * 60
        return torch.cat([corners, corners + 5 + torch.rand(*shape, 2, generator=generator) * 40], dim=-1)

    logits = torch.randn(S, B, N, classes, generator=generator).requires_grad_()
    labels = torch.randint(K, (B, M), generator=generator)
    targets = PackedTargets(labels, boxes(B, M), torch.tensor(counts))
    return logits, boxes(S, B, N).requires_grad_(), targets, torch.tensor([[100.0, 120.0], [90.0, 80.0]])


@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize(("M", "counts"), [(4, (4, 1)), (4, (0, 4)), (4, (0, 0)), (0, (0, 0)), (9, (9, 8))])
def test_matcher_criterion_and_backward(M, counts, classification):
    arguments = make_arguments(M, K + (classification == "softmax"), counts)
    criterion = SetCriterion(HungarianMatcher(classification=classification), K)
    with forbid_host_reads():
        losses = criterion(*arguments)
        torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    assert arguments[0].grad.abs().sum() > 0
    assert (arguments[1].grad.abs().sum() > 0) == (sum(counts) > 0)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_the_references_that_serve_where_there_is_no_triton(gamma):
    logits, boxes, targets, sizes = make_arguments(4, K, (4, 1))
    matches = torch.tensor([3, 0, 5, -1]).expand(S, B, 4)
    with ops.backend("reference"), forbid_host_reads():
        labels = targets.labels
        cost = ops.matching_cost(logits, boxes, labels, targets.boxes, targets.counts, sizes, gamma=gamma)
        l1, giou = ops.set_box_loss(boxes, matches, targets.boxes, sizes)
        total = ops.set_focal_loss(logits, matches, labels, gamma=gamma) + l1 + giou
        total.sum().backward()
    assert cost.isfinite().all() and boxes.grad.abs().sum() > 0 and logits.grad.abs().sum() > 0


def test_scipy_does_read():
    """So that the test above would see it."""
    counts = torch.tensor([3, 2])
    with ops.backend("reference"), pytest.raises(HostRead, match="tolist"), forbid_host_reads():
        ops.linear_assignment(torch.rand(2, 3, 3), counts)
