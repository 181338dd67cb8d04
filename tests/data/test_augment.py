from __future__ import annotations

import pytest
import torch

from sparse_rcnn.data import augment
from sparse_rcnn.data.augment import SmallDataTransform


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marked(height: int = 96, width: int = 140) -> tuple[torch.Tensor, dict]:
    """A black picture with bright rectangles that are its boxes, one per colour channel."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 12, 50, 40], [60, 20, 130, 90], [30, 50, 58, 80]])
    for channel, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        image[channel, y0:y1, x0:x1] = 255
    return image, {"boxes": boxes, "labels": torch.arange(3), "image_id": 4, "size": (height, width)}


def transform(**more) -> SmallDataTransform:
    return SmallDataTransform(**{"min_sizes": (80, 100, 128), "max_size": 200, **more})


@pytest.fixture
def without_colours():
    """Colours say which rectangle is whose; they must stay to be looked at."""
    made = transform()
    made.colours = torch.nn.Identity()
    return made


class Numbered:
    """Pictures of one colour each, which says their number, as their label does; the whole is their box."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, number: int) -> tuple[torch.Tensor, dict]:
        size = (60 + 2 * number, 150 - number)
        image = torch.full((3, *size), 5 * number, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0, size[1], size[0]]])
        return image, {"boxes": boxes, "labels": torch.tensor([number]), "image_id": number, "size": size}


@pytest.mark.parametrize("seed", range(40))
def test_boxes_follow_the_pixels(without_colours, seed):
    """Whatever was done, every box that is left still frames what is left of the rectangle that was painted for it."""
    image, target = marked()
    new_image, new = without_colours(image, target, generator(seed))
    assert new_image.dtype == torch.uint8 and type(new_image) is torch.Tensor and type(new["boxes"]) is torch.Tensor
    height, width = new_image.shape[1:]
    assert max(height, width) <= 200 and (min(height, width) in (80, 100, 128) or max(height, width) == 200)
    assert new["image_id"] == 4 and len(new["boxes"]) == len(new["labels"]) and new["labels"].dtype == torch.int64
    assert (new["boxes"] >= 0).all() and (new["boxes"] <= torch.tensor([width, height] * 2) + 1e-4).all()
    for box, label in zip(new["boxes"], new["labels"], strict=True):
        if (box[2:] - box[:2]).min() < 4:
            continue  # a crop left a sliver that the blur of resizing wipes out
        bright = new_image[label] > 190  # of 255; the canvas of a zoom-out is at most 124
        rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
        seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # The blur of an enlarged edge, of a quarter of its width each way from 190 of 255.
        assert (seen - box).abs().max() <= 2.5
    assert target["boxes"].equal(marked()[1]["boxes"]) and image.equal(marked()[0])  # nothing given is changed


def test_everything_happens_and_objects_get_smaller_and_larger(without_colours):
    image, target = marked()
    zoomed = lost = flipped = 0
    scales = []
    for seed in range(200):
        new_image, new = without_colours(image, target, generator(seed))
        zoomed += bool((new_image.permute(1, 2, 0) == torch.tensor([124, 116, 104])).all(-1).any())
        lost += len(new["labels"]) < 3
        kept = new["labels"].tolist()
        if {0, 1} <= set(kept):
            flipped += bool(new["boxes"][kept.index(0), 0] > new["boxes"][kept.index(1), 0])
        if 2 in kept:
            box = new["boxes"][kept.index(2)]
            scales.append(float((box[3] - box[1]) / 30 / min(new_image.shape[1:]) * 96))
    assert 35 < zoomed < 85  # of 60 expected; some are cropped away again
    assert 40 < lost < 180 and 30 < flipped < 120
    assert min(scales) < 0.7 and max(scales) > 1.6


@pytest.mark.parametrize("seed", range(10))
def test_a_mosaic_is_the_image_and_three_others_about_a_point(monkeypatch, seed):
    monkeypatch.setattr(augment, "_MOSAICS", 1)
    monkeypatch.setattr(augment, "_SEEN", 0)
    given, small = Numbered(), transform(min_sizes=(120, 200), max_size=400, others=Numbered())
    small.colours = torch.nn.Identity()
    image, new = small(*given[7], generator(seed))
    assert image.dtype == torch.uint8 and image.shape == (3, 200, round(200 / 74 * 143))  # at the largest size
    assert new["image_id"] == 7 and new["size"] == (74, 143) and new["labels"].tolist()[0] == 7
    x, y = new["boxes"][0, 2:].int().tolist()
    height, width = image.shape[1:]
    assert 0.29 < x / width < 0.71 and 0.29 < y / height < 0.71
    quarters = [[0, 0, x, y], [x, 0, width, y], [0, y, x, height], [x, y, width, height]]
    torch.testing.assert_close(new["boxes"], torch.tensor(quarters, dtype=torch.float32))
    for (x0, y0, x1, y1), label in zip(quarters, new["labels"].tolist(), strict=True):
        assert (image[:, y0:y1, x0:x1] == 5 * label).all()


def test_mosaics_take_every_image_and_are_half_of_all(monkeypatch):
    monkeypatch.setattr(augment, "_SEEN", 0)
    small, taken, mosaics = transform(others=Numbered()), set(), 0
    for seed in range(200):
        _, new = small(*Numbered()[49], generator(seed))
        taken |= set(new["labels"].tolist())
        mosaics += bool(set(new["labels"].tolist()) - {49})
    assert 80 < mosaics < 120 and len(taken) == 50


@pytest.mark.parametrize("size", [(60, 60), (50, 90), (70, 30), (130, 40)])
def test_a_window_shows_a_part_of_the_image_and_its_boxes(size):
    """The image says in red and green where each of its pixels is, and so which window was taken."""
    height, width = 120, 200
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([x, y, y]).to(torch.uint8)
    boxes = torch.tensor([[10.0, 20, 60, 90], [100, 0, 120, 30], [150, 60, 200, 120], [0, 0, 200, 120]])
    small, flips, zooms, left_out = transform(), 0, [], 0
    for seed in range(60):
        piece, new, labels = small._window(image, {"boxes": boxes, "labels": torch.arange(4)}, size, generator(seed))
        assert piece.shape == (3, *size) and piece.dtype == torch.uint8
        # Positions at a quarter and three quarters of the piece, where no border bends them.
        near, far = (piece[:, size[0] * k // 4, size[1] * k // 4].float() for k in (1, 3))
        apart = torch.tensor([size[1] * 3 // 4 - size[1] // 4, size[0] * 3 // 4 - size[0] // 4])
        step = (far - near)[:2] / apart  # pixels of the image to one of the piece, negative where it is mirrored
        flips += bool(step[0] < 0)
        zooms.append(float(min(height / size[0], width / size[1]) / step[1]))
        first = near[:2] + 0.5 - step * (torch.tensor([size[1] // 4, size[0] // 4]) + 0.5)
        corners = ((boxes.view(4, 2, 2) - first) / step).view(4, 4)
        x0, x1 = corners[:, ::2].aminmax(dim=1)
        expected = torch.stack([x0, corners[:, 1], x1, corners[:, 3]], dim=1)
        clipped = expected.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
        share = (clipped[:, 2:] - clipped[:, :2]).prod(1) / (expected[:, 2:] - expected[:, :2]).prod(1)
        found = dict(zip(labels.tolist(), new, strict=True))
        for label in range(4):
            if label in found:
                assert share[label] > 0.2 and (found[label] - clipped[label]).abs().max() < 3
            else:
                assert share[label] < 0.3
                left_out += 1
    assert 15 < flips < 45 and left_out > 20
    assert 0.9 < min(zooms) < 1.2 and 1.7 < max(zooms) < 2.3


def test_a_window_leaves_out_slivers():
    """A box so thin that it has no width any more where it comes to lie in the canvas would end a training."""
    image, labels = torch.zeros(3, 50, 50, dtype=torch.uint8), torch.arange(2)
    boxes = torch.tensor([[20.0, 0, 20.0001, 50], [0, 0, 50, 50]])
    for seed in range(10):
        _, _, found = transform()._window(image, {"boxes": boxes, "labels": labels}, (50, 50), generator(seed))
        assert 0 not in found.tolist()


@pytest.mark.parametrize("others", [None, Numbered()])
def test_all_randomness_comes_from_the_generator(others):
    image, target = marked()
    small, results = transform(others=others), []
    for seed in (3, 3, 4, 5, 6):
        state = torch.get_rng_state()
        results.append(small(image, target, generator(seed)))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(len(results))  # what the global generator is at does not matter
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])
    assert len({(tuple(new.shape), int(new.sum())) for new, _ in results}) == 4


def test_colours_change_and_the_boxes_do_not():
    image, target = torch.full((3, 100, 100), 130, dtype=torch.uint8), {"boxes": torch.zeros(0, 4)}
    image[0] = 200
    target["labels"] = torch.zeros(0, dtype=torch.int64)
    small = transform(min_sizes=(100,), flip=0)
    colours = {tuple(small(image, target, generator(seed))[0][:, 50, 50].tolist()) for seed in range(30)}
    assert len(colours) > 20
    plain, boxes = marked()
    # The same draws of shapes, with and without colours.
    new = transform()
    with_colours = new(plain, boxes, generator(9))
    new.colours = torch.nn.Identity()
    assert torch.equal(with_colours[1]["boxes"], new(plain, boxes, generator(9))[1]["boxes"])


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (40, 40), (15, 900)])
@pytest.mark.parametrize("mosaics", [False, True])
def test_small_images_panoramas_and_images_without_boxes(size, mosaics):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator(0))
    whole = torch.tensor([[0.0, 0, size[1], size[0]]])
    for boxes in (whole, whole[:0]):
        for seed in range(5):
            target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
            small = transform(min_sizes=(32,), max_size=64, others=[(image, target)] if mosaics else None)
            new_image, new = small(image, target, generator(seed))
            assert max(new_image.shape[1:]) <= 64 and new["boxes"].shape == (len(new["labels"]), 4)
            assert bool(len(new["labels"])) == bool(len(boxes)) or min(size) >= 16
            assert mosaics or len(new["labels"]) <= len(boxes)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^min_sizes: "):
        transform(min_sizes=[])
