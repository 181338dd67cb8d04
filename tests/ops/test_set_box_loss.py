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
        (3, torch.zeros(2, 2, device="meta"), ValueError, "image_sizes: expected it on cpu like boxes"),
    ],
)
def test_argument_errors(index, value, error, message):
    arguments = list(make_arguments())
    arguments[index] = value
    with pytest.raises(error, match=message):
        set_box_loss(*arguments)
