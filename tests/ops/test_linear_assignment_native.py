"""The CPU kernel of linear_assignment, and the CUDA kernel run on the CPU, index for index against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_rcnn import ops


def _problems(seed: int, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of random problems; costs are integers with many ties, integers with few, or normal."""
    rng = np.random.default_rng(seed)
    batch, proposals, targets = rng.integers(1, 8), rng.integers(0, largest), rng.integers(0, largest)
    shape = (batch, proposals, targets)
    costs = [rng.integers(0, 3, shape), rng.integers(-20, 20, shape), rng.standard_normal(shape)][seed % 3]
    dtype = torch.float64 if seed % 2 else torch.float32
    return torch.tensor(costs, dtype=dtype), torch.tensor(rng.integers(0, targets + 1, batch))


def test_a_thousand_problems_equal_scipy(backend) -> None:
    solved = 0  # of integers, among which there are ties
    for seed in range(600):
        cost, counts = _problems(seed, 24)
        assert torch.equal(ops.linear_assignment(cost, counts), ops.linear_assignment_reference(cost, counts)), seed
        solved += len(counts) if seed % 3 < 2 else 0
    assert solved >= 1000


@pytest.mark.parametrize(
    ("proposals", "targets"),
    [(300, 63), (63, 300), (100, 100), (1, 200), (200, 1), (500, 40), (3500, 2)],
    ids=lambda size: str(size),
)
def test_large_problems_equal_scipy(backend, proposals: int, targets: int) -> None:
    """The last sizes do not fit in shared memory: the costs, then the state too, lie in global memory."""
    generator = torch.Generator().manual_seed(proposals)
    cost = torch.randint(0, 50, (2, proposals, targets), generator=generator).float()
    counts = torch.tensor([targets, targets // 2])
    assert torch.equal(ops.linear_assignment(cost, counts), ops.linear_assignment_reference(cost, counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_costs_are_widened(backend, dtype: torch.dtype) -> None:
    cost = torch.randn(2, 3, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    counts = torch.tensor([5, 2, 0])
    assert torch.equal(ops.linear_assignment(cost, counts), ops.linear_assignment_reference(cost, counts))


def test_operator_is_registered_right(backend) -> None:
    operator = getattr(torch.ops, backend.namespace).linear_assignment
    cost = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    torch.library.opcheck(operator, (cost, torch.tensor([4, 0, 2])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_cost_that_is_not_finite(backend, bad: float) -> None:
    cost = torch.arange(12.0).view(1, 4, 3)
    cost[0, 1, 1] = bad
    if backend.name == "native":
        with pytest.raises(ValueError, match="cost: expected finite numbers, got NaN or infinity"):
            ops.linear_assignment(cost, torch.tensor([3]))
    else:  # the device cannot raise: a pair that is never worth taking
        cost[0, 1, 1] = 1e30
        expected = ops.linear_assignment_reference(cost, torch.tensor([3]))
        cost[0, 1, 1] = bad
        assert torch.equal(ops.linear_assignment(cost, torch.tensor([3])), expected)


def test_counts_out_of_range(backend) -> None:
    cost = torch.arange(12.0).view(1, 4, 3)
    if backend.name == "native":
        with pytest.raises(ValueError, match="counts: expected 0..3, the columns of cost, got 4"):
            ops.linear_assignment(cost, torch.tensor([4]))
    else:
        all_of_them = ops.linear_assignment(cost, torch.tensor([3]))
        assert torch.equal(ops.linear_assignment(cost, torch.tensor([4])), all_of_them)
        assert torch.equal(ops.linear_assignment(cost, torch.tensor([-1])), torch.full((1, 3), -1))


def test_thread_order_does_not_matter(emulator) -> None:
    generator = torch.Generator().manual_seed(3)
    cost = torch.randint(0, 4, (4, 40, 20), generator=generator).float()
    counts = torch.tensor([20, 11, 1, 20])
    expected = ops.linear_assignment_reference(cost, counts)
    with ops.backend("emulated"):
        for seed in range(5):
            emulator.set_seed(seed)
            assert torch.equal(ops.linear_assignment(cost, counts), expected)
