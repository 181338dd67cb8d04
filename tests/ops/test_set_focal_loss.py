"""set_focal_loss against torchvision's focal loss with a one-hot target written out."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.ops import set_focal_loss
from sparse_rcnn.ops.set_focal_loss import matched_classes

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning:triton"),
]


def make_arguments(S=2, B=2, N=5, M=3, K=4, seed=0):
    """Each target has a proposal of its own, but about a third of them have none."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(S, B, N, K, generator=generator, dtype=torch.float64) * 3
    order = torch.rand(S, B, max(N, M), generator=generator).argsort(-1)[..., :M]
    missing = (order >= N) | (torch.rand(S, B, M, generator=generator) < 0.3)
    return logits, order.masked_fill(missing, -1), torch.randint(K, (B, M), generator=generator)


def expected_loss(logits, matches, labels, alpha=0.25, gamma=2.0):
    S, B, _, _ = logits.shape
    targets = torch.zeros_like(logits)
    for s in range(S):
        for b in range(B):
            for m, proposal in enumerate(matches[s, b].tolist()):
                if proposal >= 0:
                    targets[s, b, proposal, labels[b, m]] = 1
    return torch.stack(
        [torchvision.ops.sigmoid_focal_loss(x, t, alpha, gamma, "sum") for x, t in zip(logits, targets, strict=True)]
    )


@pytest.mark.parametrize(
    ("S", "B", "N", "M", "K"),
    [(1, 1, 1, 1, 1), (6, 2, 10, 4, 80), (2, 3, 4, 6, 3), (1, 2, 3, 2, 1203), (3, 2, 5, 0, 4), (2, 2, 0, 3, 4)],
)
def test_equals_torchvision(S, B, N, M, K):
    arguments = make_arguments(S, B, N, M, K)
    torch.testing.assert_close(set_focal_loss(*arguments), expected_loss(*arguments), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 0.0), (0.9, 2.0), (0.5, 1.0), (0.0, 3.0), (1.0, 2.0)])
def test_alpha_and_gamma(alpha, gamma):
    arguments = make_arguments()
    expected = expected_loss(*arguments, alpha, gamma)
    torch.testing.assert_close(set_focal_loss(*arguments, alpha, gamma), expected, rtol=1e-10, atol=1e-10)


def test_gamma_zero_and_alpha_half_is_half_the_cross_entropy():
    logits, matches, labels = make_arguments(1, 1, 3, 2, 4)
    matches = torch.tensor([[[2, 0]]])
    targets = torch.zeros(3, 4, dtype=torch.float64)
    targets[2, labels[0, 0]] = targets[0, labels[0, 1]] = 1
    p = logits[0, 0].sigmoid()
    expected = -0.5 * (targets * p.log() + (1 - targets) * (1 - p).log()).sum()
    torch.testing.assert_close(set_focal_loss(logits, matches, labels, 0.5, 0.0)[0], expected)


def test_unmatched_targets_do_not_matter():
    logits, _, _ = make_arguments(1, 1, 4, 3, 4)
    labels = torch.tensor([[1, 3, 2]])
    some = set_focal_loss(logits, torch.tensor([[[2, -1, -1]]]), labels)
    fewer = set_focal_loss(logits, torch.tensor([[[2]]]), labels[:, :1])
    torch.testing.assert_close(some, fewer)
    none = set_focal_loss(logits, torch.full((1, 1, 3), -1), labels)
    torch.testing.assert_close(none, expected_loss(logits, torch.empty(1, 1, 0), labels[:, :0]))
    assert none != some


def test_matched_classes():
    matches = torch.tensor([[[3, -1, 0]], [[-1, -1, 1]]])
    labels = torch.tensor([[7, 5, 2]])
    classes = matched_classes(matches, labels, proposals=4, background=9)
    assert classes.tolist() == [[[2, 9, 9, 7]], [[9, 2, 9, 9]]]


def test_huge_logits_stay_finite():
    logits = torch.tensor([[[[1e4, -1e4], [-1e4, 1e4]]]], requires_grad=True)
    loss = set_focal_loss(logits, torch.tensor([[[0, 1]]]), torch.tensor([[0, 0]]))
    loss.sum().backward()
    # Proposal 0 is right; proposal 1 misses its class by 1e4 and is sure of the other: (0.25 + 0.75) * 1e4.
    torch.testing.assert_close(loss.detach(), torch.tensor([1e4]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_logit_that_is_not_finite_shows_in_the_loss_of_its_stage(bad, gamma):
    logits, matches, labels = make_arguments(3, 2, 5, 3, 4)
    clean = set_focal_loss(logits, matches, labels, 0.25, gamma)
    logits[1, 1, 4, 3] = bad
    loss = set_focal_loss(logits, matches, labels, 0.25, gamma)
    assert loss.isfinite().tolist() == [True, False, True]
    assert torch.equal(loss[::2], clean[::2])


@pytest.mark.parametrize(("match", "label"), [(5, 1), (10**9, 1), (-7, 1), (2, 4), (2, -1), (2, 10**9)])
def test_a_match_or_a_label_out_of_range_is_none(match, label):
    logits, matches, labels = make_arguments(2, 1, 5, 3, 4)
    matches[:] = torch.tensor([0, 1, -1])
    expected = set_focal_loss(logits, matches, labels)
    matches[..., 2], labels[..., 2] = match, label
    assert torch.equal(set_focal_loss(logits, matches, labels), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, matches, labels = make_arguments(2, 2, 30, 3, 4)
    half, wide = (logits.to(dtype).requires_grad_(), logits.to(dtype).float().requires_grad_())
    loss, expected = set_focal_loss(half, matches, labels), set_focal_loss(wide, matches, labels)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    loss.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(half.grad, wide.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("K", [1, 7])
def test_float32_over_the_whole_range_of_logits(gamma, K):
    """Also where 1 - sigmoid(x) and 1 + exp(x) have rounded everything away."""
    logits = torch.linspace(-100, 100, 81)[:, None, None, None].expand(81, 1, 2, K).contiguous()
    matches, labels = torch.zeros(81, 1, 1, dtype=torch.int64), torch.full((1, 1), K - 1)
    x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = set_focal_loss(x, matches, labels, 0.25, gamma)
    sign = torch.ones_like(wide)
    sign[:, 0, 0, K - 1] = -1  # the matched one
    weight = torch.where(sign > 0, 0.75, 0.25)
    expected = (weight * F.softplus(sign * wide, threshold=200) * (sign * wide).sigmoid() ** gamma).flatten(1).sum(1)
    (grad,), (exact,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close((loss.double(), grad.double()), (expected, exact), rtol=1e-5, atol=1e-5)
    if ops._library.serving("set_focal_loss", "cpu") != "reference":  # of the kernels easy negatives keep their digits
        torch.testing.assert_close(grad[:40, 0, 1].double(), exact[:40, 0, 1], rtol=1e-5, atol=1e-36)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_gradcheck(gamma):
    logits, matches, labels = make_arguments(2, 2, 3, 2, 3)
    logits = (logits / 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: set_focal_loss(x, matches, labels, 0.25, gamma), (logits,))


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 5, 4), ValueError, r"logits: expected shape \[S, B, N, K\], got \[2, 5, 4\]"),
        (0, torch.zeros(2, 2, 5, 4).int(), TypeError, "logits: expected a floating-point tensor"),
        (1, torch.zeros(3, 2, 3).long(), ValueError, r"matches: expected shape \[2, 2, M\], got \[3, 2, 3\]"),
        (1, torch.zeros(2, 2, 3), TypeError, "matches: expected an int64 tensor"),
        (2, torch.zeros(2, 2).long(), ValueError, r"target_labels: expected shape \[2, 3\], got \[2, 2\]"),
        (2, torch.zeros(2, 3).int(), TypeError, "target_labels: expected an int64 tensor, got torch.int32"),
        (1, torch.zeros(2, 2, 3, device="meta").long(), ValueError, "matches: expected it on cpu like logits"),
    ],
)
def test_argument_errors(index, value, error, message):
    arguments = list(make_arguments())
    arguments[index] = value
    with pytest.raises(error, match=message):
        set_focal_loss(*arguments)
