from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_rcnn.data.transforms import TrainTransform, crop_boxes, flip_boxes, network_size, resize, resize_boxes

sides = st.integers(1, 3000)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator(seed))


def some_boxes(height: int, width: int, count: int, seed: int = 0) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=generator(seed)) * torch.tensor([width, height])
    low, high = corners.amin(1), corners.amax(1)
    return torch.cat([low, torch.maximum(high, low + 0.01)], 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # 1066.67 rounds up
        ((640, 480), (1067, 800)),
        ((500, 353), (1133, 800)),  # 1133.14 down
        ((427, 640), (800, 1199)),
        ((300, 900), (444, 1333)),  # the longer side limits: 444.33
        ((800, 800), (800, 800)),
        ((1, 10000), (1, 1333)),  # 0.13 would round to nothing
    ],
)
def test_network_size(size, expected):
    assert network_size(*size, 800, 1333) == expected


@given(sides, sides, st.integers(1, 900), st.integers(1, 1400))
@settings(max_examples=200, deadline=None)
def test_network_size_keeps_the_limits_and_the_shape(height, width, min_size, max_size):
    new_height, new_width = network_size(height, width, min_size, max_size)
    assert min(new_height, new_width) >= 1 and max(new_height, new_width) <= max_size
    assert min(new_height, new_width) <= min_size
    assert min(new_height, new_width) == min_size or max(new_height, new_width) == max_size
    assert new_height * width == pytest.approx(new_width * height, abs=0.51 * (height + width) + max(height, width))
    assert network_size(width, height, min_size, max_size) == (new_width, new_height)


def test_network_size_of_nothing():
    with pytest.raises(ValueError, match="at least one pixel"):
        network_size(0, 5, 800, 1333)


@pytest.mark.parametrize("size", [(23, 31), (100, 64), (7, 200), (1, 1)])
def test_resize_equals_pillow(size):
    image = picture(50, 41)
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    rows_first = pixels.resize((size[1], 50), Image.Resampling.BILINEAR).resize(size[::-1], Image.Resampling.BILINEAR)
    resized = resize(image, size)
    assert resized.dtype == torch.uint8 and resized.is_contiguous()
    assert np.array_equal(resized.permute(1, 2, 0).numpy(), np.asarray(rows_first))
    at_once = np.asarray(pixels.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resized.permute(1, 2, 0).numpy() - at_once).max() <= 1  # in an order that is Pillow's to choose


def test_resize_values():
    image = torch.tensor([[[0, 100]]], dtype=torch.uint8).repeat(3, 1, 1)
    assert resize(image, (1, 4))[0].tolist() == [[0, 25, 75, 100]]
    assert resize(image, (1, 1))[0].tolist() == [[50]]
    assert resize(image, (1, 2)) is image


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)])
def test_resize_refuses_other_tensors(image):
    with pytest.raises(ValueError, match="image: expected uint8"):
        resize(image, (2, 2))


def test_box_values():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert resize_boxes(boxes, (100, 100), (50, 200)).tolist() == [[20, 10, 60, 30]]
    assert flip_boxes(boxes, 100).tolist() == [[70, 20, 90, 60]]
    inside, keep = crop_boxes(boxes, 30, 15, 20, 40)
    assert inside.tolist() == [[0, 0, 15, 20]] and keep.tolist() == [True]
    assert crop_boxes(boxes, 60, 0, 40, 40)[1].tolist() == [False]  # it only touches


@given(st.integers(0, 2**31), sides, sides)
@settings(max_examples=200, deadline=None)
def test_flipping_twice_changes_nothing(seed, height, width):
    boxes = some_boxes(height, width, 5, seed)
    torch.testing.assert_close(flip_boxes(flip_boxes(boxes, width), width), boxes, rtol=1e-6, atol=3e-4)


@given(st.integers(0, 2**31), sides, sides, sides, sides)
@settings(max_examples=200, deadline=None)
def test_resizing_keeps_the_relative_boxes(seed, height, width, new_height, new_width):
    boxes = some_boxes(height, width, 5, seed)
    resized = resize_boxes(boxes, (height, width), (new_height, new_width))
    old, new = torch.tensor([width, height] * 2), torch.tensor([new_width, new_height] * 2)
    torch.testing.assert_close(resized / new, boxes / old, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**31), st.data())
@settings(max_examples=200, deadline=None)
def test_cropped_boxes_are_the_intersection(seed, data):
    height, width = data.draw(sides), data.draw(sides)
    crop_height, crop_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - crop_height)), data.draw(st.integers(0, width - crop_width))
    boxes = some_boxes(height, width, 6, seed)
    cropped, keep = crop_boxes(boxes, top, left, crop_height, crop_width)
    x0, y0 = boxes[:, 0].clamp(min=left), boxes[:, 1].clamp(min=top)
    x1, y1 = boxes[:, 2].clamp(max=left + crop_width), boxes[:, 3].clamp(max=top + crop_height)
    overlap = (x1 > x0) & (y1 > y0)
    assert torch.equal(keep, overlap)
    expected = torch.stack([x0 - left, y0 - top, x1 - left, y1 - top], 1)
    torch.testing.assert_close(cropped[keep], expected[overlap], rtol=1e-6, atol=1e-3)
    assert (cropped >= 0).all() and (cropped <= torch.tensor([crop_width, crop_height] * 2)).all()


def marked(height: int, width: int) -> tuple[torch.Tensor, dict]:
    """A black picture with bright rectangles that are its boxes, one per colour channel."""
    image, boxes = torch.zeros(3, height, width, dtype=torch.uint8), some_boxes(height, width, 3, seed=height).round()
    boxes[:, 2:] = torch.minimum(boxes[:, 2:] + 12, torch.tensor([width, height]))
    boxes[:, :2] = torch.minimum(boxes[:, :2], boxes[:, 2:] - 12)
    for channel, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        image[channel, y0:y1, x0:x1] = 255
    return image, {"boxes": boxes, "labels": torch.arange(3), "image_id": 4, "size": (height, width)}


@pytest.mark.parametrize("crop", [None, (60, 90)])
@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_the_pixels(crop, seed):
    """After flip, crop and resize every box still frames the rectangle that was painted for it."""
    transform = TrainTransform((80, 100, 128), 160, crop=crop)
    image, target = marked(90 + seed, 140)
    new_image, new = transform(image, target, generator(seed))
    assert new_image.dtype == torch.uint8 and new_image.is_contiguous()
    height, width = new_image.shape[1:]
    assert max(height, width) <= 160 and (min(height, width) in (80, 100, 128) or max(height, width) == 160)
    assert new["image_id"] == 4 and new["size"] == (90 + seed, 140) and len(new["boxes"]) == len(new["labels"])
    for box, label in zip(new["boxes"], new["labels"], strict=True):
        bright = new_image[label] > 127
        if (box[2:] - box[:2]).min() < 3:
            continue  # a crop left a sliver that the blur of resizing wipes out
        rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
        seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert (seen - box).abs().max() <= 1.01
    for label in set(range(3)) - set(new["labels"].tolist()):
        assert (new_image[label] > 250).sum() == 0  # what is gone from the boxes is gone from the picture
    assert target["boxes"].equal(marked(90 + seed, 140)[1]["boxes"])  # the given target is not changed


def test_no_augmentation_is_the_test_resize():
    image, target = marked(60, 90)
    new_image, new = TrainTransform((120,), 999, flip=0)(image, target, generator(0))
    assert torch.equal(new_image, resize(image, (120, 180)))
    assert torch.equal(new["boxes"], target["boxes"] * 2) and torch.equal(new["labels"], target["labels"])


def test_flip_is_the_mirror_image():
    image, target = marked(60, 90)
    new_image, new = TrainTransform((60,), 999, flip=1)(image, target, generator(0))
    assert torch.equal(new_image, image.flip(2)) and torch.equal(new["boxes"], flip_boxes(target["boxes"], 90))


def test_probabilities_and_sizes_are_as_asked():
    image, target = marked(60, 90)
    flips = crops = 0
    shorter = set()
    for seed in range(300):
        new_image, new = TrainTransform((48, 60, 72), 999, crop=(30, 40))(image, target, generator(seed))
        shorter.add(min(new_image.shape[1:]))
        crops += new_image.shape[2] != round(new_image.shape[1] * 1.5)
        plain, _ = TrainTransform((60,), 999)(image, target, generator(seed))
        flips += torch.equal(plain, image.flip(2))
    assert shorter == {48, 60, 72}
    assert 115 < flips < 185 and 110 < crops < 185  # of 300; four standard deviations are 35


def test_all_randomness_comes_from_the_generator():
    image, target = marked(120, 90)
    transform = TrainTransform((80, 100, 128), 200, crop=(50, 90))
    results = []
    for _ in range(2):
        state = torch.get_rng_state()
        results.append(transform(image, target, generator(3)))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(0)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])
    others = [transform(image, target, generator(seed))[0] for seed in range(8)]
    assert len({(tuple(o.shape), int(o.sum())) for o in others}) > 4


def test_images_smaller_than_the_crop_or_without_boxes():
    transform = TrainTransform((32,), 64, crop=(384, 600), crop_probability=1)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for size in ((1, 1), (3, 200), (40, 40)):
        image, target = transform(picture(*size), empty, generator(1))
        assert max(image.shape[1:]) <= 64 and target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"min_sizes": []}, "min_sizes"),
        ({"min_sizes": [0]}, "min_sizes"),
        ({"max_size": 0}, "max_size"),
        ({"crop": (600, 384)}, "crop"),
        ({"flip": 1.5}, "flip"),
        ({"crop_probability": -0.1}, "crop_probability"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        TrainTransform(**{"min_sizes": [10], "max_size": 20, **arguments})
