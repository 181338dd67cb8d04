"""The learned proposals' initial boxes."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn.models.proposals import initial_boxes, to_pixels


@pytest.mark.parametrize("count", [1, 7])
def test_image_and_center(count):
    assert initial_boxes("image", count).tolist() == [[0.5, 0.5, 1.0, 1.0]] * count
    torch.testing.assert_close(initial_boxes("center", count), torch.tensor([[0.5, 0.5, 0.1, 0.1]] * count))


def test_grid_of_a_square_number():
    quarter = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert initial_boxes("grid", 4).tolist() == [[*center, 0.5, 0.5] for center in quarter]


@pytest.mark.parametrize("count", [1, 5, 9, 100])
def test_grid_tiles_without_overlap(count):
    boxes = initial_boxes("grid", count)
    assert boxes.shape == (count, 4)
    pixels = to_pixels(boxes, torch.tensor([[1.0, 1.0]]))[0]
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert len({tuple(center) for center in boxes[:, :2].tolist()}) == count
    distance = torch.cdist(boxes[:, :2], boxes[:, :2], p=torch.inf).fill_diagonal_(1)
    assert distance.min() >= boxes[0, 2] - 1e-6


def test_random_is_spread_inside_its_bounds_and_follows_the_seed():
    torch.manual_seed(0)
    boxes = initial_boxes("random", 4000)
    torch.manual_seed(0)
    assert torch.equal(initial_boxes("random", 4000), boxes)
    assert not torch.equal(initial_boxes("random", 4000), boxes)
    assert boxes[:, :2].min() >= 0.05
    assert boxes[:, :2].max() <= 0.95
    assert boxes[:, 2:].min() >= 0.05
    assert boxes[:, 2:].max() <= 1.0
    torch.testing.assert_close(boxes.mean(0), torch.tensor([0.5, 0.5, 0.4, 0.4]), rtol=0, atol=0.02)
    torch.testing.assert_close(boxes.std(0), torch.full((4,), 0.2), rtol=0, atol=0.03)


def test_tiles_are_grids_of_several_sizes():
    boxes = initial_boxes("tiles", 15)  # 3 x 3, 2 x 2, and the image for the rest
    fine = initial_boxes("grid", 9) * torch.tensor([1, 1, 1.4, 1.4])
    coarse = initial_boxes("grid", 4) * torch.tensor([1, 1, 1.4, 1.4])
    torch.testing.assert_close(boxes, torch.cat([fine, coarse, initial_boxes("image", 2)]))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 50, 100, 200, 300, 500])
def test_tiles_of_every_size_cover_the_image_and_the_finest_are_as_many_as_fit(count):
    boxes = initial_boxes("tiles", count)
    assert boxes.shape == (count, 4) and boxes.max() <= 1
    grids = {}
    for x, y, width, height in boxes.tolist():
        assert width == height
        grids.setdefault(width, set()).add((x, y))
    for size, centers in grids.items():
        side = 1 if size == 1 else round(1.4 / size)
        expected = [((i + 0.5) / side, (j + 0.5) / side) for i in range(side) for j in range(side)]
        torch.testing.assert_close(torch.tensor(sorted(centers)), torch.tensor(expected))
    whole = int((boxes[:, 2] == 1).sum())
    finest = round(1.4 / min(grids)) if len(grids) > 1 else 1
    assert whole - 1 < (finest + 1) ** 2


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind: expected image, center, grid, random or tiles, got 'corner'"):
        initial_boxes("corner", 3)


def test_to_pixels():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2]])
    sizes = torch.tensor([[100.0, 200.0], [40.0, 20.0]])  # height, width
    expected = [[[0, 0, 200, 100], [0, 40, 100, 60]], [[0, 0, 20, 40], [0, 16, 10, 24]]]
    torch.testing.assert_close(to_pixels(boxes, sizes), torch.tensor(expected, dtype=torch.float32))


def test_to_pixels_passes_the_gradient():
    boxes = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sizes = torch.tensor([[100.0, 200.0], [40.0, 20.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda b: to_pixels(b, sizes), (boxes,))
