"""matching_cost against the official formulation: concatenated targets, image by image, in float64."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_rcnn import ops
from sparse_rcnn.ops import matching_cost
from sparse_rcnn.ops.matching_cost import NON_FINITE_COST

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning:triton"),
]


def make_boxes(*shape, generator):
    corners = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    sizes = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 50 + 1
    return torch.cat([corners, corners + sizes], dim=-1)


def make_arguments(S=2, counts=(3, 1), N=4, K=5, classes=None, seed=0):
    """``classes``: of the logits, if not those of the labels."""
    generator = torch.Generator().manual_seed(seed)
    B, M = len(counts), max(counts)
    logits = torch.randn(S, B, N, classes or K, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(K, (B, M), generator=generator)
    sizes = torch.rand(B, 2, generator=generator, dtype=torch.float64) * 100 + 100
    target_boxes = make_boxes(B, M, generator=generator)
    boxes = make_boxes(S, B, N, generator=generator)
    return [logits, boxes, labels, target_boxes, torch.tensor(counts), sizes]


def expected_cost(logits, boxes, labels, target_boxes, counts, sizes, weights=(2, 5, 2), alpha=0.25, gamma=2.0):
    """One stage at a time, as the official matcher: all targets concatenated, the images' blocks cut out."""
    S, B, N, _ = logits.shape
    M = labels.shape[1]
    out = torch.zeros(S, B, N, M, dtype=torch.float64)
    all_labels = torch.cat([labels[b, : counts[b]] for b in range(B)])
    all_boxes = torch.cat([target_boxes[b, : counts[b]] for b in range(B)])
    scales = torch.stack([sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]], dim=1)
    target_scales = torch.cat([scales[b].expand(counts[b], 4) for b in range(B)])
    for s in range(S):
        p = logits[s].flatten(0, 1).sigmoid()
        negative = (1 - alpha) * (p**gamma) * (-(1 - p + 1e-8).log())
        positive = alpha * ((1 - p) ** gamma) * (-(p + 1e-8).log())
        class_cost = positive[:, all_labels] - negative[:, all_labels]
        flat = boxes[s].flatten(0, 1)
        l1 = torch.cdist(flat / scales.repeat_interleave(N, 0), all_boxes / target_scales, p=1)
        giou = -torchvision.ops.generalized_box_iou(flat, all_boxes)
        cost = (weights[0] * class_cost + weights[1] * l1 + weights[2] * giou).view(B, N, -1)
        for b, block in enumerate(cost.split(list(counts), dim=-1)):
            out[s, b, :, : counts[b]] = block[b]
    return out


@pytest.mark.parametrize(
    ("S", "counts", "N", "K"),
    [(1, (1,), 1, 1), (6, (7, 3), 10, 80), (2, (0, 4, 2), 5, 3), (3, (2, 2), 1, 4), (1, (9,), 3, 1203)],
)
def test_equals_the_official_formulation(S, counts, N, K):
    arguments = make_arguments(S, counts, N, K)
    expected = expected_cost(*arguments[:4], counts, arguments[5])
    torch.testing.assert_close(matching_cost(*arguments), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    weights=st.tuples(*[st.floats(0, 10)] * 3), alpha=st.floats(0, 1), gamma=st.sampled_from([0.0, 0.5, 2.0, 3.0]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_weights_alpha_and_gamma(weights, alpha, gamma, seed):
    arguments = make_arguments(seed=seed)
    expected = expected_cost(*arguments[:4], (3, 1), arguments[5], weights, alpha, gamma)
    torch.testing.assert_close(matching_cost(*arguments, weights, alpha, gamma), expected, rtol=1e-9, atol=1e-9)


def test_softmax_costs_the_negated_probability():
    arguments = make_arguments(classes=6)  # five classes and "no object"
    logits, labels = arguments[0], arguments[2]
    actual = matching_cost(*arguments, weights=(1.0, 0.0, 0.0), classification="softmax")
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    for b, count in enumerate((3, 1)):
        expected = -probabilities[:, b][:, :, labels[b, :count]]
        torch.testing.assert_close(actual[:, b, :, :count], expected, rtol=1e-10, atol=1e-10)


def test_padding_costs_nothing_whatever_it_holds():
    arguments = make_arguments(counts=(3, 1))
    arguments[2][1, 1:] = torch.tensor([-5, 10**9])
    arguments[3][1, 1:] = torch.tensor([[1e30], [float("nan")]])
    cost = matching_cost(*arguments)
    assert torch.equal(cost[:, 1, :, 1:], torch.zeros(2, 4, 2, dtype=torch.float64))
    assert (cost[:, 1, :, 0] != 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_box_that_is_not_finite_costs_the_most(bad):
    arguments = make_arguments(counts=(3, 3))
    clean = matching_cost(*arguments)
    arguments[1][1, 0, 2, 3] = bad
    cost = matching_cost(*arguments)
    assert torch.equal(cost[1, 0, 2], torch.full((3,), NON_FINITE_COST, dtype=torch.float64))
    clean[1, 0, 2] = cost[1, 0, 2]
    torch.testing.assert_close(cost, clean)


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_a_logit_that_is_nan_costs_the_most(classification):
    arguments = make_arguments(counts=(3, 3), classes=6)
    arguments[0][0, 1, 3] = float("nan")
    cost = matching_cost(*arguments, classification=classification)
    assert torch.equal(cost[0, 1, 3], torch.full((3,), NON_FINITE_COST, dtype=torch.float64))
    assert (cost == NON_FINITE_COST).sum() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_huge_logits_stay_finite(dtype, classification):
    arguments = make_arguments(counts=(3, 3))
    arguments = [a.to(dtype) if a.is_floating_point() else a for a in arguments]
    arguments[0] = arguments[0].sign() * 1e4
    cost = matching_cost(*arguments, classification=classification)
    assert cost.isfinite().all()
    assert cost.abs().max() < 100
    if classification == "focal":  # a sure positive is cheaper than a sure negative by two saturated focal terms
        class_cost = matching_cost(*arguments, weights=(1.0, 0.0, 0.0))
        sure = arguments[0].gather(3, arguments[2].view(1, 2, 1, 3).expand(2, 2, 4, 3)) > 0
        log_eps = torch.tensor(1e-8).log().item()
        torch.testing.assert_close(class_cost[sure], torch.full_like(class_cost[sure], 0.75 * log_eps))
        torch.testing.assert_close(class_cost[~sure], torch.full_like(class_cost[~sure], -0.25 * log_eps))


@pytest.mark.parametrize(("S", "B", "N"), [(2, 2, 4), (6, 1, 0)])
def test_no_targets(S, B, N):
    arguments = make_arguments(S, (0,) * B, N)
    assert matching_cost(*arguments).shape == (S, B, N, 0)


def test_no_gradient():
    arguments = make_arguments()
    cost = matching_cost(arguments[0].requires_grad_(), arguments[1].requires_grad_(), *arguments[2:])
    assert not cost.requires_grad


def test_half_precision_logits_cost_in_the_precision_of_the_boxes():
    arguments = make_arguments()
    arguments = [a.float() if a.is_floating_point() else a for a in arguments]
    half = arguments[0].bfloat16()
    cost = matching_cost(half, *arguments[1:])
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost, matching_cost(half.float(), *arguments[1:]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 5), ValueError, r"logits: expected shape \[S, B, N, K\], got \[2, 4, 5\]"),
        (0, torch.zeros(2, 2, 4, 5).long(), TypeError, "logits: expected a floating-point tensor"),
        (1, torch.zeros(2, 2, 3, 4), ValueError, r"boxes: expected shape \[2, 2, 4, 4\], got \[2, 2, 3, 4\]"),
        (1, torch.zeros(2, 2, 4, 4).int(), TypeError, "boxes: expected a floating-point tensor"),
        (2, torch.zeros(3, 3).long(), ValueError, r"target_labels: expected shape \[2, M\], got \[3, 3\]"),
        (2, torch.zeros(2, 3), TypeError, "target_labels: expected an int64 tensor, got torch.float32"),
        (3, torch.zeros(2, 2, 4), ValueError, r"target_boxes: expected shape \[2, 3, 4\], got \[2, 2, 4\]"),
        (3, torch.zeros(2, 3, 4).long(), TypeError, "target_boxes: expected a floating-point tensor"),
        (4, torch.zeros(3).long(), ValueError, r"target_counts: expected shape \[2\], got \[3\]"),
        (4, torch.zeros(2), TypeError, "target_counts: expected an int64 tensor"),
        (5, torch.zeros(2, 4), ValueError, r"image_sizes: expected shape \[2, 2\], got \[2, 4\]"),
        (5, torch.zeros(2, 2, device="meta"), ValueError, "image_sizes: expected it on cpu like boxes, got meta"),
    ],
)
def test_argument_errors(index, value, error, message):
    arguments = make_arguments()
    arguments[index] = value
    with pytest.raises(error, match=message):
        matching_cost(*arguments)


def test_unknown_classification():
    with pytest.raises(ValueError, match="classification: expected focal or softmax, got 'sigmoid'"):
        matching_cost(*make_arguments(), classification="sigmoid")


def test_an_infinite_logit_costs_as_one_that_is_not_a_number():
    arguments = make_arguments()
    arguments[0][0, 0, 1] = float("inf")
    cost = matching_cost(*arguments)
    assert (cost[0, 0, 1, : arguments[4][0]] == NON_FINITE_COST).all()


@pytest.mark.parametrize("classification", ["focal", "softmax"])
@pytest.mark.parametrize("label", [-1, 5, 10**9])
def test_a_label_that_is_no_class_costs_the_most(label, classification):
    arguments = make_arguments(counts=(3, 3), K=5)
    clean = matching_cost(*arguments, classification=classification)
    arguments[2][1, 2] = label
    cost = matching_cost(*arguments, classification=classification)
    assert torch.equal(cost[:, 1, :, 2], torch.full((2, 4), NON_FINITE_COST, dtype=torch.float64))
    cost[:, 1, :, 2] = clean[:, 1, :, 2]
    assert torch.equal(cost, clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_boxes_cost_in_float32(dtype):
    """Of float16 neither an area nor the cost of what is not finite would be finite."""
    arguments = [a.to(dtype) if a.is_floating_point() else a for a in make_arguments(counts=(3, 3))]
    arguments[1][0, 0, 0, 0] = float("nan")
    cost = matching_cost(*arguments)
    assert cost.dtype == torch.float32 and cost.isfinite().all()
    assert (cost[0, 0, 0] == NON_FINITE_COST).all()
    wide = [a.float() if a.is_floating_point() else a for a in arguments]
    torch.testing.assert_close(cost, matching_cost(*wide), rtol=0, atol=0)


@pytest.mark.parametrize("box", [[20.0, 20, 20, 20], [20, 10, 20, 50], [50, 50, 20, 10], [-1e38, -1e38, 1e38, 1e38]])
def test_boxes_and_targets_without_area_or_beyond_all_areas_have_a_finite_cost(box):
    arguments = [a.float() if a.is_floating_point() else a for a in make_arguments(counts=(3, 3))]
    arguments[1][0, 1, 2] = arguments[3][0, 1] = torch.tensor(box)
    cost = matching_cost(*arguments)
    assert cost.isfinite().all()
    with ops.backend("reference"):
        torch.testing.assert_close(cost, matching_cost(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_float32_over_the_whole_range_of_logits(gamma):
    arguments = make_arguments(counts=(3, 3), N=81, S=1, K=1)
    arguments = [a.float() if a.is_floating_point() else a for a in arguments]
    arguments[0] = torch.linspace(-100, 100, 81)[:, None].expand(1, 2, 81, 1).contiguous()
    cost = matching_cost(*arguments, gamma=gamma)
    with ops.backend("reference"):
        exact = matching_cost(*[a.double() if a.is_floating_point() else a for a in arguments], gamma=gamma)
    torch.testing.assert_close(cost.double(), exact, rtol=1e-5, atol=1e-5)
