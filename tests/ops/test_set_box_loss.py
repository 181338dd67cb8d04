"""set_box_loss against torchvision's GIoU loss and an L1 written out, pair by pair."""

from __future__ import annotations

import pytest
import torch
import torchvision

from sparse_rcnn.ops import set_box_loss

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning:triton"),
]


def make_boxes(*shape, generator):
    corners = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 80
    sizes = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 50 + 1
    return torch.cat([corners, corners + sizes], dim=-1)


def make_arguments(S=2, B=2, N=5, M=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(S, B, max(N, M), generator=generator).argsort(-1)[..., :M]
    missing = (order >= N) | (torch.rand(S, B, M, generator=generator) < 0.3)
    boxes, targets = make_boxes(S, B, N, generator=generator), make_boxes(B, M, generator=generator)
    sizes = torch.rand(B, 2, generator=generator, dtype=torch.float64) * 100 + 50
    return boxes, order.masked_fill(missing, -1), targets, sizes


def expected_losses(boxes, matches, targets, sizes):
    S, B, M = matches.shape
    l1 = torch.zeros(S, dtype=torch.float64)
    giou = torch.zeros(S, dtype=torch.float64)
    for s in range(S):
        for b in range(B):
            height, width = sizes[b]
            for m in range(M):
                if matches[s, b, m] < 0:
                    continue
                box, target = boxes[s, b, matches[s, b, m]], targets[b, m]
                difference = (box - target).abs()
                l1[s] += (difference[0] + difference[2]) / width + (difference[1] + difference[3]) / height
                giou[s] += torchvision.ops.generalized_box_iou_loss(box[None], target[None], "sum", eps=0)
    return l1, giou


@pytest.mark.parametrize(
    ("S", "B", "N", "M"), [(1, 1, 1, 1), (6, 2, 10, 4), (2, 3, 4, 6), (3, 2, 5, 0), (2, 2, 0, 3), (2, 0, 4, 0)]
)
def test_equals_torchvision(S, B, N, M):
    arguments = make_arguments(S, B, N, M)
    for actual, expected in zip(set_box_loss(*arguments), expected_losses(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_by_hand():
    boxes = torch.tensor([[[[0.0, 0, 2, 2], [0, 0, 9, 9]]]])
    targets = torch.tensor([[[1.0, 1, 3, 3]]])
    l1, giou = set_box_loss(boxes, torch.tensor([[[0]]]), targets, torch.tensor([[10.0, 20]]))
    torch.testing.assert_close(l1, torch.tensor([2 / 20 + 2 / 10]))
    torch.testing.assert_close(giou, torch.tensor([1 - (1 / 7 - 2 / 9)]))


def test_targets_without_a_proposal_cost_nothing():
    boxes, matches, targets, sizes = make_arguments()
    matches[:, :, 2] = -1
    expected = set_box_loss(boxes, matches[..., :2], targets[:, :2], sizes)
    targets[:, 2] = 1e6
    torch.testing.assert_close(set_box_loss(boxes, matches, targets, sizes), expected)
    none = set_box_loss(boxes, torch.full_like(matches, -1), targets, sizes)
    assert [value.tolist() for value in none] == [[0, 0], [0, 0]]


def test_only_matched_boxes_get_a_gradient():
    boxes, _, targets, sizes = make_arguments(1, 1, 4, 2)
    boxes.requires_grad_()
    l1, giou = set_box_loss(boxes, torch.tensor([[[2, -1]]]), targets, sizes)
    (l1 + giou).sum().backward()
    assert boxes.grad[0, 0].abs().sum(-1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(("N", "M"), [(4, 0), (0, 3)])
def test_without_pairs_the_gradient_is_zero(N, M):
    boxes, matches, targets, sizes = make_arguments(2, 2, N, M)
    l1, giou = set_box_loss(boxes.requires_grad_(), matches, targets, sizes)
    (l1 + giou).sum().backward()
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))


def test_padding_leaves_no_trace_in_the_gradient():
    """Unmatched targets read the first proposal, whose size may have shrunk to nothing."""
    boxes = torch.tensor([[[[0.0, 0, 0, 0], [0, 0, 8, 8]]]], requires_grad=True)
    targets = torch.tensor([[[1.0, 1, 5, 5], [0, 0, 0, 0]]])
    l1, giou = set_box_loss(boxes, torch.tensor([[[1, -1]]]), targets, torch.tensor([[10.0, 10]]))
    (l1 + giou).sum().backward()
    assert boxes.grad[0, 0, 0].tolist() == [0, 0, 0, 0]
    assert boxes.grad[0, 0, 1].abs().min() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("M", [0, 3])
def test_a_box_that_is_not_finite_shows_in_the_losses_of_its_stage(bad, M):
    boxes, matches, targets, sizes = make_arguments(3, 2, 5, M)
    clean = set_box_loss(boxes, matches, targets, sizes)
    boxes[1, 1, 4, 2] = bad
    matches[1, 1] = -1  # nor does it need a target
    for loss, before in zip(set_box_loss(boxes, matches, targets, sizes), clean, strict=True):
        assert loss.isnan().tolist() == [False, True, False]
        assert torch.equal(loss[::2], before[::2])


@pytest.mark.parametrize("match", [5, 10**9, -7])
def test_a_match_out_of_range_is_none(match):
    boxes, matches, targets, sizes = make_arguments(2, 2, 5, 3)
    matches[:] = torch.tensor([0, 1, -1])
    expected = set_box_loss(boxes.requires_grad_(), matches, targets, sizes)
    matches[..., 2] = match
    actual = set_box_loss(boxes, matches, targets, sizes)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert torch.autograd.grad(sum(actual).sum(), boxes)[0][:, :, 2:].abs().max() == 0


DEGENERATE = {
    "point": [20.0, 20, 20, 20],
    "line": [20.0, 10, 20, 50],
    "inverted": [50.0, 50, 20, 10],
    "half inverted": [50.0, 10, 20, 50],
    "real": [10.0, 10, 40, 50],
}


@pytest.mark.parametrize("target", DEGENERATE)
@pytest.mark.parametrize("predicted", DEGENERATE)
def test_boxes_and_targets_without_area(predicted, target):
    """Losses by hand, in float32, and finite gradients."""
    box, other = torch.tensor(DEGENERATE[predicted]), torch.tensor(DEGENERATE[target])
    boxes = box.view(1, 1, 1, 4).clone().requires_grad_()
    l1, giou = set_box_loss(boxes, torch.zeros(1, 1, 1).long(), other.view(1, 1, 4), torch.tensor([[100.0, 100]]))
    assert l1.item() == pytest.approx((box - other).abs().sum().item() / 100, rel=1e-6)

    def area(corners):
        return max(corners[2] - corners[0], 0) * max(corners[3] - corners[1], 0)

    low, high = torch.maximum(box[:2], other[:2]).tolist(), torch.minimum(box[2:], other[2:]).tolist()
    overlap = area(low + high)
    union = area(box.tolist()) + area(other.tolist()) - overlap
    hull = area(torch.minimum(box[:2], other[:2]).tolist() + torch.maximum(box[2:], other[2:]).tolist())
    expected = 1 - (overlap / union if union else 0) + ((hull - union) / hull if hull else 0)
    assert giou.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad((l1 + giou).sum(), boxes)
    assert grad.isfinite().all() and grad.abs().max() < 1


def test_half_precision_boxes_are_computed_in_float32():
    boxes, matches, targets, sizes = (t.bfloat16() if t.is_floating_point() else t for t in make_arguments())
    boxes.requires_grad_()
    l1, giou = set_box_loss(boxes, matches, targets, sizes)
    assert l1.dtype == giou.dtype == torch.float32
    expected = set_box_loss(boxes.float(), matches, targets.float(), sizes.float())
    torch.testing.assert_close((l1, giou), expected, rtol=0, atol=0)
    assert torch.autograd.grad((l1 + giou).sum(), boxes)[0].dtype == torch.bfloat16


def test_gradcheck():
    boxes, matches, targets, sizes = make_arguments(2, 2, 3, 2)
    assert (matches >= 0).any()
    assert (matches < 0).any()
    inputs = (boxes.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda b: set_box_loss(b, matches, targets, sizes), inputs)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 2, 5, 5), ValueError, r"boxes: expected shape \[S, B, N, 4\], got \[2, 2, 5, 5\]"),
        (0, torch.zeros(2, 2, 5, 4).int(), TypeError, "boxes: expected a floating-point tensor"),
        (1, torch.zeros(2, 3, 3).long(), ValueError, r"matches: expected shape \[2, 2, M\], got \[2, 3, 3\]"),
        (1, torch.zeros(2, 2, 3), TypeError, "matches: expected an int64 tensor"),
        (2, torch.zeros(2, 2, 4), ValueError, r"target_boxes: expected shape \[2, 3, 4\], got \[2, 2, 4\]"),
        (3, torch.zeros(2, 3), ValueError, r"image_sizes: expected shape \[2, 2\], got \[2, 3\]"),
        (2, torch.zeros(2, 3, 4), TypeError, "target_boxes: expected torch.float64, got torch.float32"),
        (3, torch.zeros(2, 2), TypeError, "image_sizes: expected torch.float64, got torch.float32"),
        (1, torch.zeros(2, 2, 3, device="meta").long(), ValueError, "matches: expected it on cpu like boxes, got meta"),
        (3, torch.zeros(2, 2, device="meta"), ValueError, "image_sizes: expected it on cpu like boxes"),
    ],
)
def test_argument_errors(index, value, error, message):
    arguments = list(make_arguments())
    arguments[index] = value
    with pytest.raises(error, match=message):
        set_box_loss(*arguments)
