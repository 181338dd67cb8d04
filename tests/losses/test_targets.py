"""pack_targets: padding, and the errors that name the image."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.losses import pack_targets

LIKE = torch.zeros(1)


def target(*boxes, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels if labels is not None else [0] * len(boxes)).long()}


def test_pads_to_the_largest_count():
    packed = pack_targets(
        [target([1, 2, 3, 4], labels=[4]), target(), target([0, 0, 5, 6], [1, 1, 2, 2], labels=[2, 0])], 5, LIKE
    )
    assert packed.counts.tolist() == [1, 0, 2]
    assert packed.counts.dtype == packed.labels.dtype == torch.int64
    assert packed.labels.tolist() == [[4, 0], [0, 0], [2, 0]]
    nothing = [0, 0, 0, 0]
    assert packed.boxes.tolist() == [[[1, 2, 3, 4], nothing], [nothing, nothing], [[0, 0, 5, 6], [1, 1, 2, 2]]]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_no_boxes_at_all(images):
    packed = pack_targets([target()] * images, 5, LIKE)
    assert packed.labels.shape == (images, 0)
    assert packed.boxes.shape == (images, 0, 4)
    assert packed.counts.tolist() == [0] * images


def test_boxes_take_the_dtype_asked_for():
    boxes = torch.tensor([[0.1, 0.2, 1.3, 2.4]], dtype=torch.float64)
    packed = pack_targets([{"boxes": boxes, "labels": torch.tensor([1])}], 5, LIKE.double())
    assert torch.equal(packed.boxes[0], boxes)


@pytest.mark.parametrize("columns", [0, 1, 2, 5])
def test_columns_are_a_least_number(columns):
    given = [target([1, 2, 3, 4], [0, 0, 5, 6], labels=[4, 2]), target([1, 1, 2, 2], labels=[3])]
    packed = pack_targets(given, 5, LIKE, columns)
    padding = max(columns, 2) - 2
    assert packed.labels.tolist() == [[4, 2, *[0] * padding], [3, 0, *[0] * padding]]
    assert packed.boxes.shape == (2, 2 + padding, 4) and not packed.boxes[:, 2:].any()
    assert packed.counts.tolist() == [2, 1]


def test_they_go_to_the_device_asked_for():
    packed = pack_targets([target([1, 2, 3, 4])], 5, torch.zeros(1, device="meta", dtype=torch.float64))
    assert packed.labels.is_meta and packed.boxes.is_meta and packed.counts.is_meta
    assert packed.boxes.dtype == torch.float64


def test_the_targets_are_copied():
    given = target([1, 2, 3, 4])
    pack_targets([given], 5, LIKE).boxes.zero_()
    assert given["boxes"].tolist() == [[1, 2, 3, 4]]


def test_more_keys_are_ignored():
    packed = pack_targets([{**target([1, 2, 3, 4]), "image_id": 7, "masks": None}], 5, LIKE)
    assert packed.counts.tolist() == [1]


GOOD = target([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (None, TypeError, "expected a dict with boxes and labels, got None"),
        ({"boxes": GOOD["boxes"]}, TypeError, "expected a dict with boxes and labels"),
        ({"labels": GOOD["labels"]}, TypeError, "expected a dict with boxes and labels"),
        ({**GOOD, "labels": [0]}, TypeError, r"\.labels: expected a tensor, got list"),
        ({**GOOD, "boxes": [[1.0, 2, 3, 4]]}, TypeError, r"\.boxes: expected a tensor, got list"),
        ({**GOOD, "labels": torch.tensor([0.0])}, TypeError, r"\.labels: expected int64 .* got torch.float32 \[1\]"),
        ({**GOOD, "labels": torch.tensor([[0]])}, TypeError, r"\.labels: expected int64 .* got torch.int64 \[1, 1\]"),
        ({**GOOD, "labels": torch.tensor([0, 1])}, TypeError, r"\.boxes: expected floating \[2, 4\], got .* \[1, 4\]"),
        ({**GOOD, "boxes": GOOD["boxes"].long()}, TypeError, r"\.boxes: expected floating \[1, 4\], got torch.int64"),
        (target([1, 2, 3, 4], labels=[5]), ValueError, r"\.labels: expected 0..4, got 5..5"),
        (target([1, 2, 3, 4], labels=[-1]), ValueError, r"\.labels: expected 0..4, got -1..-1"),
        (target([1, 2, 3, 4], [3, 2, 3, 4]), ValueError, r"\.boxes: expected x1 < x2 .* \[3.0, 2.0, 3.0, 4.0\] at 1"),
        (target([1, 2, 3, 1]), ValueError, r"\.boxes: expected x1 < x2 and y1 < y2, got \[1.0, 2.0, 3.0, 1.0\] at 0"),
        (target([1, 2, float("nan"), 4]), ValueError, r"\.boxes: expected x1 < x2"),
        (target([1, 2, float("inf"), 4]), ValueError, r"\.boxes: expected x1 < x2"),
    ],
)
def test_errors_name_the_image(bad, error, message):
    with pytest.raises(error, match=rf"^targets\[1\].*{message}"):
        pack_targets([GOOD, bad, GOOD], 5, LIKE)
