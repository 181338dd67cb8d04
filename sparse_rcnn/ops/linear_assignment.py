"""Batched optimal assignment of targets to proposals (Kuhn 1955; Jonker and Volgenant 1987)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_rcnn.ops._check import check_floating, check_integral, check_same_device


def linear_assignment(cost: Tensor, counts: Tensor) -> Tensor:
    """For every problem of a batch, the proposal that each target takes at the least total cost.

    Source: ``scipy.optimize.linear_sum_assignment``, whose indices it gives, ties included.

    Args:
        cost: [..., N, M] finite floating-point costs.
        counts: int64, broadcastable to the leading dimensions of ``cost``: columns at and after it are padding.

    Returns:
        [..., M] int64: the proposal of each target; -1 for padding, and for the targets left over when there are
        more of them than proposals.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or a cost that is not finite.
    """
    if cost.dim() < 2:
        raise ValueError(f"cost: expected shape [..., N, M], got {list(cost.shape)}")
    check_floating("cost", cost)
    check_integral("counts", counts)
    check_same_device(cost=cost, counts=counts)
    batch = cost.shape[:-2]
    ends = zip(reversed(counts.shape), reversed(batch), strict=False)
    if counts.dim() > len(batch) or any(size not in (1, wanted) for size, wanted in ends):
        raise ValueError(f"counts: expected a shape that broadcasts to {list(batch)}, got {list(counts.shape)}")
    return linear_assignment_reference(cost, counts)


def linear_assignment_reference(cost: Tensor, counts: Tensor) -> Tensor:
    """The specification of :func:`linear_assignment`: SciPy, one problem after the other."""
    from scipy.optimize import linear_sum_assignment

    *batch, N, M = cost.shape
    sizes = counts.expand(batch).reshape(-1).tolist()
    problems = cost.detach().double().cpu().reshape(len(sizes), N, M).numpy()
    proposals = torch.full((len(sizes), M), -1, dtype=torch.int64)
    for problem, size, row in zip(problems, sizes, proposals, strict=True):
        if not 0 <= size <= M:
            raise ValueError(f"counts: expected 0..{M}, the columns of cost, got {size}")
        if not np.isfinite(problem[:, :size]).all():  # SciPy lets a positive infinity pass
            raise ValueError("cost: expected finite numbers, got NaN or infinity")
        taken, targets = linear_sum_assignment(problem[:, :size])
        row[torch.from_numpy(targets)] = torch.from_numpy(taken)
    return proposals.view(*batch, M).to(cost.device)
