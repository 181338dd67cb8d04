"""linear_assignment against SciPy, problem by problem."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sparse_rcnn.ops import linear_assignment


def expected_assignment(cost, count):
    """SciPy's answer for one problem [N, M] as the proposal of each target."""
    proposals = np.full(cost.shape[1], -1)
    rows, columns = linear_sum_assignment(cost[:, :count].double().numpy())
    proposals[columns] = rows
    return proposals.tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 9), M=st.integers(0, 9), batch=st.integers(1, 3), ties=st.booleans(), seed=st.integers(0, 10**6)
)
def test_equals_scipy(N, M, batch, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    if ties:
        cost = torch.randint(-3, 4, (batch, N, M), generator=generator).float()
    else:
        cost = torch.randn(batch, N, M, generator=generator)
    counts = torch.randint(0, M + 1, (batch,), generator=generator)
    assigned = linear_assignment(cost, counts)
    assert assigned.dtype == torch.int64
    assert assigned.tolist() == [expected_assignment(c, n) for c, n in zip(cost, counts, strict=True)]


@pytest.mark.parametrize(("N", "M"), [(4, 3), (3, 4), (4, 4), (5, 2)])
def test_is_the_least_of_all_assignments(N, M):
    cost = torch.randn(N, M, generator=torch.Generator().manual_seed(N * 10 + M), dtype=torch.float64)
    assigned = linear_assignment(cost, torch.tensor(M))
    total = sum(cost[n, m].item() for m, n in enumerate(assigned.tolist()) if n >= 0)
    assert (assigned >= 0).sum() == min(N, M)
    if N >= M:
        best = min(sum(cost[n, m] for m, n in enumerate(p)) for p in itertools.permutations(range(N), M))
    else:
        best = min(sum(cost[n, m] for n, m in enumerate(p)) for p in itertools.permutations(range(M), N))
    assert total == pytest.approx(best.item())


def test_more_targets_than_proposals():
    cost = torch.tensor([[5.0, 1, 4, 3], [5, 4, 2, 3]])
    assert linear_assignment(cost, torch.tensor(4)).tolist() == [-1, 0, 1, -1]


def test_padding_is_not_assigned_even_when_cheapest():
    cost = torch.tensor([[1.0, 3, -100], [4, 1, -100], [9, 9, -100]]).expand(3, 3, 3)
    assigned = linear_assignment(cost, torch.tensor([2, 0, 3]))
    assert assigned[0].tolist() == [0, 1, -1]
    assert assigned[1].tolist() == [-1, -1, -1]
    assert assigned[2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0), (2, 0, 0), (6, 0, 3, 2)])
def test_empty(shape):
    assigned = linear_assignment(torch.zeros(shape), torch.full(shape[:-2], shape[-1]))
    assert torch.equal(assigned, torch.full((*shape[:-2], shape[-1]), -1))


def test_counts_broadcast_over_stages():
    cost = torch.randn(6, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([3, 1])
    assigned = linear_assignment(cost, counts)
    assert assigned.shape == (6, 2, 3)
    for stage in range(6):
        assert torch.equal(assigned[stage], linear_assignment(cost[stage], counts))
        assert assigned[stage, 1, 1:].tolist() == [-1, -1]


def test_a_non_contiguous_cost():
    cost = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    counts = torch.tensor([3, 2])
    assert torch.equal(linear_assignment(cost, counts), linear_assignment(cost.contiguous(), counts))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_cost_that_is_not_finite_raises(bad):
    cost = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    cost[1, 2, 0] = bad
    with pytest.raises(ValueError, match="cost"):
        linear_assignment(cost, torch.tensor([3, 3]))


def test_padding_need_not_be_finite():
    cost = torch.tensor([[[2.0, float("nan")], [1, float("inf")]]])
    assert linear_assignment(cost, torch.tensor([1])).tolist() == [[1, -1]]


def test_a_cost_with_a_gradient_is_accepted():
    cost = torch.tensor([[2.0, 1], [1, 2]], requires_grad=True)
    assert linear_assignment(cost, torch.tensor(2)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("cost", "counts", "error", "message"),
    [
        (torch.zeros(3), torch.tensor(3), ValueError, r"cost: expected shape \[..., N, M\], got \[3\]"),
        (torch.zeros(2, 3, 2).long(), torch.tensor([2, 2]), TypeError, "cost: expected a floating-point tensor"),
        (torch.zeros(2, 3, 2), torch.tensor([2.0, 2]), TypeError, "counts: expected an int64 tensor"),
        (torch.zeros(2, 3, 2), torch.tensor([3, 2]), ValueError, "counts: expected 0..2, the columns of cost, got 3"),
        (torch.zeros(2, 3, 2), torch.tensor([-1, 2]), ValueError, "counts: expected 0..2, the columns of cost, got -1"),
        (torch.zeros(2, 3, 2), torch.tensor([2, 2, 2]), ValueError, "counts: "),
        (torch.zeros(2, 3, 2), torch.tensor([[2, 2]]).T[:, :, None], ValueError, "counts: "),
    ],
)
def test_argument_errors(cost, counts, error, message):
    with pytest.raises(error, match=message):
        linear_assignment(cost, counts)
