"""Batches: what the host makes of images and targets, and that the model takes it for them."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.models.batch import Batch, PaddedShape, normalize_pixels, pad_images


def test_a_prepared_batch_is_the_images_and_targets(tiny, build, images, targets):
    model = build(tiny)
    expected = model(images, targets, return_stages=True)
    actual = model(model.prepare(images, targets), return_stages=True)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.boxes, expected.boxes)
    assert torch.equal(actual.proposal_boxes, expected.proposal_boxes) and actual.detections == []
    assert actual.losses == expected.losses == model(model.prepare(images, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_boxes_and_sizes_are_wide_enough_for_pixels(tiny, build, images, targets, dtype):
    model = build(tiny).to(dtype)
    batch = model.prepare(images, targets)
    wide = torch.promote_types(dtype, torch.float32)
    assert batch.sizes.dtype == batch.targets.boxes.dtype == wide
    assert batch.sizes.tolist() == [list(image.shape[1:]) for image in images]


def test_pixels_are_uint8_where_all_images_are():
    whole = torch.full((3, 4, 5), 7, dtype=torch.uint8)
    pixels, sizes = pad_images([whole, whole[:, :2]], torch.float32)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 32, 32)
    assert sizes.tolist() == [[4, 5], [2, 5]]
    assert pixels[0, :, :4, :5].eq(7).all() and int(pixels[0].sum()) == 7 * 3 * 4 * 5
    assert pixels[1, :, :2, :5].eq(7).all() and int(pixels[1].sum()) == 7 * 3 * 2 * 5
    mixed, _ = pad_images([whole, torch.full((3, 4, 5), 0.5, dtype=torch.float64)], torch.float32)
    assert mixed.dtype == torch.float32
    assert mixed[0, :, :4, :5].eq(7).all() and mixed[1, :, :4, :5].eq(127.5).all()


def test_a_shape_that_is_too_small_is_refused(tiny, build, images, targets):
    with pytest.raises(ValueError, match=r"shape: expected at least 50 x 90 .* got 32 x 96"):
        build(tiny).prepare(images, targets, PaddedShape(32, 96, 8))


def test_normalised_pixels_by_hand():
    mean, std = (1, 2.0, 3.0), (2.0, 4.0, 8.0)
    pixels = torch.full((2, 3, 2, 3), 11, dtype=torch.uint8)
    sizes = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    values = torch.tensor([5.0, 2.25, 1.0])
    expected = torch.zeros(2, 3, 2, 3)
    expected[0, :, :, 0] = values.view(3, 1)
    expected[1, :, 0, :] = values.view(3, 1)
    actual = normalize_pixels(pixels, sizes, mean, std)
    assert torch.equal(actual, expected) and not torch.signbit(actual).any()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_the_pixel_scale_stays_float32_in_a_model_of_another_type(tiny, build, images, convert):
    model = build(tiny)
    expected, _ = model._normalize(images)
    actual, _ = getattr(model, convert)()._normalize(images)
    assert torch.equal(actual, expected.to(actual.dtype)) and actual.dtype != torch.float32


def test_targets_are_needed_to_prepare(tiny, build, images, targets):
    with pytest.raises(ValueError, match="targets: expected a dict an image in training mode, got None"):
        build(tiny).prepare(images, None)
    with pytest.raises(ValueError, match="targets: expected 2, one an image, got 1"):
        build(tiny).prepare(images, targets[:1])


def test_a_batch_moves_with_all_its_tensors(tiny, build, images, targets):
    batch = build(tiny).prepare(images, targets)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert [tensor.shape for tensor in moved.tensors()] == [tensor.shape for tensor in batch.tensors()]
    assert all(tensor.is_meta for tensor in moved.tensors()) and len(moved.tensors()) == 5
