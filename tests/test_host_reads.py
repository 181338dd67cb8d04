"""The instrument that finds host reads: each of them is caught and named, and nothing else is."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import tensor
from torch.nn import functional as F

from tests.host_reads import HostRead, forbid_host_reads

X = torch.tensor([0.5, -1.0, 2.0])
ONE = torch.tensor(1)
MASK = X > 0
COUNTS = torch.tensor([1, 0, 2])


def branch(value):
    return 1 if value else 0


def put_mask(value):
    value[MASK] = X[:2]


READS = {
    "item": (lambda: ONE.item(), "Tensor.item"),
    "tolist": (lambda: X.tolist(), "Tensor.tolist"),
    "cpu": (lambda: X.cpu(), "Tensor.cpu"),
    "to cpu": (lambda: X.to("cpu"), r'Tensor.to\("cpu"\)'),
    "to device=cpu": (lambda: X.to(device="cpu"), r'Tensor.to\("cpu"\)'),
    "numpy": (lambda: X.numpy(), "Tensor.numpy"),
    "np.asarray": (lambda: np.asarray(X), "Tensor.__array__"),
    "bool": (lambda: bool(ONE), "Tensor.__bool__"),
    "if": (lambda: branch(ONE), "Tensor.__bool__"),
    "and": (lambda: ONE and X, "Tensor.__bool__"),
    "int": (lambda: int(ONE), "Tensor.__int__"),
    "float": (lambda: float(ONE), "Tensor.__float__"),
    "complex": (lambda: complex(ONE), "Tensor.__complex__"),
    "range": (lambda: range(ONE), "Tensor.__index__"),
    "in": (lambda: 2.0 in X, "Tensor.__contains__"),
    "format": (lambda: f"{ONE}", "Tensor.__format__"),
    "repr": (lambda: repr(X), "Tensor.__repr__"),
    "max of Python": (lambda: max(ONE, ONE), "Tensor.__bool__"),
    "tensor": (lambda: torch.tensor([1, 2]), "torch.tensor"),
    "as_tensor": (lambda: torch.as_tensor([1, 2]), "torch.as_tensor"),
    "asarray": (lambda: torch.asarray([1, 2]), "torch.asarray"),
    "from_numpy": (lambda: torch.from_numpy(np.zeros(2)), "torch.from_numpy"),
    "new_tensor": (lambda: X.new_tensor([1.0, 2.0]), "Tensor.new_tensor"),
    "is_nonzero": (lambda: torch.is_nonzero(ONE), "aten::"),
    "equal": (lambda: torch.equal(X, X), "aten::equal"),
    "allclose": (lambda: torch.allclose(X, X), "aten::"),
    "nonzero": (lambda: X.nonzero(), "aten::nonzero"),
    "nonzero as tuple": (lambda: X.nonzero(as_tuple=True), "aten::nonzero"),
    "where of one argument": (lambda: torch.where(MASK), "aten::nonzero"),
    "argwhere": (lambda: torch.argwhere(X), "aten::"),
    "masked_select": (lambda: X.masked_select(MASK), "aten::masked_select"),
    "index by a mask": (lambda: X[MASK], "aten::index with a mask"),
    "assignment by a mask": (lambda: put_mask(X.clone()), "aten::index_put_ with a mask"),
    "index_put by a mask": (lambda: X.index_put((MASK,), X[:2]), "aten::index_put with a mask"),
    "index by a list": (lambda: X[[0, 2]], "aten::lift_fresh"),
    "index by a list among others": (lambda: X[None, [0, 2]], "aten::lift_fresh"),
    "index by an array": (lambda: X[np.array([0, 2])], "aten::lift_fresh"),
    "assignment by a list": (lambda: X.clone().__setitem__([0, 2], 1.0), "aten::lift_fresh"),
    "unique": (lambda: X.unique(), "aten::_unique2"),
    "unique of rows": (lambda: X[:, None].unique(dim=0), "aten::unique_dim"),
    "unique_consecutive": (lambda: X.unique_consecutive(), "aten::unique_consecutive"),
    "repeat_interleave": (lambda: X.repeat_interleave(COUNTS), "aten::repeat_interleave"),
    "bincount": (lambda: COUNTS.bincount(), "aten::bincount"),
    "one_hot of unknown classes": (lambda: F.one_hot(COUNTS), "aten::_local_scalar_dense"),
    "torch.tensor under another name": (lambda: tensor([1, 2]), "aten::lift_fresh"),
    "copy to another device": (lambda: X.to("meta"), "a copy from cpu to meta"),
    "copy_ from another device": (lambda: torch.empty(3, device="meta").copy_(X), "a copy from cpu to meta"),
}


@pytest.mark.parametrize("name", READS)
def test_each_read_is_caught_and_named(name):
    read, message = READS[name]
    with pytest.raises(HostRead, match=f"^host read: {message}"), forbid_host_reads():
        read()


def test_what_stays_on_the_device_passes():
    with forbid_host_reads():
        x = X.clone().requires_grad_()
        chosen = torch.where(MASK, x, 0.0).gather(0, COUNTS)[..., None][COUNTS[:1], 0]  # x[0], since x[1] is masked
        places = torch.zeros(2, 3, dtype=torch.int64).scatter(1, COUNTS.expand(2, 3), 1) + torch.arange(3)
        places[:, 0] = 5  # [5, 2, 3] twice
        repeated = x.repeat_interleave(COUNTS, output_size=3)  # x[0], x[2], x[2]
        filled = x.masked_fill(MASK, 3.0).clamp(max=1)[1:, None]  # x[1], and a constant
        total = 2 * chosen.sum() + (places * x).sum() / x.new_full((), 2.0) + repeated.sum() + filled.sum()
        total.backward()
        assert x.to(torch.float64).to(X).to(X.device).shape == (3,) and len(x) == 3
    assert x.grad.tolist() == [2 + 5 + 1, 2 + 1, 3 + 2]


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().tolist()


def test_the_backward_is_watched():
    for differentiate in (lambda y, x: y.backward(), torch.autograd.grad):
        x = X.clone().requires_grad_()
        y = ReadsInBackward.apply(x).sum()
        with pytest.raises(HostRead, match="Tensor.tolist"), forbid_host_reads():
            differentiate(y, x)


def test_reads_are_free_again_outside():
    with pytest.raises(HostRead), forbid_host_reads():
        X.sum().item()
    assert X.sum().item() == 1.5
    assert X[MASK].tolist() == [0.5, 2.0]
    # Nothing of the exchange is left in the class: to C code, such as NumPy's, a tensor had become a sequence.
    assert not ctypes.pythonapi.PySequence_Check(ctypes.py_object(X))
