"""Batched optimal assignment of targets to proposals (Kuhn 1955; Jonker and Volgenant 1987)."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from sparse_rcnn.ops import _library
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
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; on the CPU also a count out of
            range or a cost that is not finite. On a GPU, which the host would have to wait for to know, such a count
            is clamped and such a cost counts as 1e30.
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
    native = _library.kernels("linear_assignment", cost.device)
    if native is None:
        return linear_assignment_reference(cost, counts)
    problems = (
        cost.detach().reshape(math.prod(batch), *cost.shape[-2:]).to(torch.promote_types(cost.dtype, torch.float32))
    )
    sizes = counts.expand(batch).reshape(-1)
    try:
        return native.linear_assignment(problems, sizes).view(*batch, cost.shape[-1])
    except RuntimeError as error:
        found = re.search(r"(cost|counts): expected .*", str(error))  # what only a look at the values can tell
        if found is None:
            raise
        raise ValueError(found[0]) from None


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


def _fake(cost: Tensor, counts: Tensor) -> Tensor:
    return counts.new_empty(cost.shape[0], cost.shape[2])


_library.declare("linear_assignment", fake=_fake)
