"""normalize_pad's reference by hand, against Pillow to the last bit and against the model; bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_rcnn import ops
from sparse_rcnn.data.transforms import network_size, resize
from sparse_rcnn.models.batch import normalize_pixels, pad_images

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # shows the grey levels themselves
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def reference():
    with ops.backend("reference"):
        yield


def make_image(height, width, seed=0, contrast=False):
    """uint8 [3, height, width], rows of interleaved pixels in memory as a decoder leaves them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return (pixels // 128 * 255 if contrast else pixels).permute(2, 0, 1)


def pillow(image, *sizes):
    """Resized to one size after the other: a call that changes one side makes one pass."""
    pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    for height, width in sizes:
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def levels_of(image, size):
    sizes = torch.tensor([[*image.shape[1:], *size]])
    return ops.normalize_pad([image], sizes, size, **LEVELS)[0].to(torch.uint8)


def model_input(images, dtype=torch.float32):
    """What the model makes of images at network size, in their order of memory and without its weights."""
    return normalize_pixels(*pad_images(images, torch.float32), MEAN, STD).to(dtype)


def test_by_hand():
    image = torch.tensor([[[10, 20]], [[0, 255]], [[7, 7]]], dtype=torch.uint8)
    # Half size: both pixels alike. Double size: a quarter of the neighbour, cut and normalised at the rim.
    sizes = torch.tensor([[1, 2, 1, 1], [1, 2, 1, 4], [0, 0, 0, 0]])
    batch = ops.normalize_pad([image, image, image], sizes, (2, 5), (10.0, 0.0, 0.0), (2.0, 1.0, 1.0))
    assert batch.shape == (3, 3, 2, 5) and batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[0, :, 0, 0].tolist() == [(15 - 10) / 2, 128, 7]
    assert batch[1, :, 0].tolist() == [[0, 1.5, 4, 5, 0], [0, 64, 191, 255, 0], [7, 7, 7, 7, 0]]
    assert not batch[0, :, 0, 1:].any() and not batch[:, :, 1].any() and not batch[2].any()


@pytest.mark.parametrize("seed", range(40))
def test_equals_pillow(seed):
    rng = np.random.default_rng(seed)
    largest = (8, 60, 300)[seed % 3]
    height, width, new_height, new_width = (int(side) for side in rng.integers(1, largest + 1, 4))
    image = make_image(height, width, seed, contrast=seed % 2 == 0)
    expected = pillow(image, (height, new_width), (new_height, new_width))
    assert torch.equal(levels_of(image, (new_height, new_width)), expected)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (91, 37), (30, 31), (150, 200), (200, 150), (1, 90)], ids=str)
def test_equals_the_resize_of_the_data(size):
    image, network = make_image(*size), network_size(*size, 60, 100)
    assert torch.equal(levels_of(image, network), resize(image, network).int())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_equals_the_models_own_input(dtype):
    images = [make_image(33, 64, 1), make_image(50, 40, 2)]
    networks = [pillow(images[0], (33, 70), (35, 70)), images[1]]
    expected = model_input(networks, dtype)
    sizes = torch.tensor([[33, 64, 35, 70], [50, 40, 50, 40]])
    actual = ops.normalize_pad(images, sizes, (64, 96), MEAN, STD, dtype)
    assert expected.shape == (2, 3, 64, 96) and actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_flat_images_are_rows_of_pixels():
    image = make_image(7, 5)
    flat = torch.cat([image.permute(1, 2, 0).flatten(), torch.full((50,), 9, dtype=torch.uint8)])
    sizes = torch.tensor([[7, 5, 10, 8]])
    assert torch.equal(
        ops.normalize_pad([flat], sizes, (12, 8), MEAN, STD), ops.normalize_pad([image], sizes, (12, 8), MEAN, STD)
    )


def test_the_upper_left_part_is_used():
    image = make_image(9, 8)
    sizes = torch.tensor([[6, 5, 7, 7]])
    part = ops.normalize_pad([image[:, :6, :5].clone()], sizes, (7, 7), MEAN, STD)
    assert torch.equal(ops.normalize_pad([image], sizes, (7, 7), MEAN, STD), part)


IMAGE, SIZES = make_image(4, 6), torch.tensor([[4, 6, 5, 7]])
GOOD = {"images": [IMAGE], "sizes": SIZES, "shape": (8, 8), "mean": MEAN, "std": STD, "dtype": torch.float32}
WITHIN = (
    r"sizes\[0\]: expected a size within images\[0\], of shape \[3, 4, 6\], and one within shape, \(8, 8\), or four"
)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"images": IMAGE}, ValueError, "images: expected a list of at least one image"),
        ({"images": []}, ValueError, "images: expected a list of at least one image"),
        ({"images": [IMAGE.float()]}, TypeError, r"images\[0\]: expected torch.uint8, got torch.float32"),
        ({"images": ["a"]}, TypeError, r"images\[0\]: expected torch.uint8, got str"),
        ({"images": [IMAGE[0]]}, ValueError, r"images\[0\]: expected shape \[3, h, w\] or \[bytes\], got \[4, 6\]"),
        ({"images": [IMAGE[:2]]}, ValueError, r"images\[0\]: expected shape \[3, h, w\] .*, got \[2, 4, 6\]"),
        (
            {"images": [IMAGE.permute(1, 2, 0).flatten()[::2]]},
            ValueError,
            r"images\[0\]: expected the bytes .* in a row",
        ),
        ({"images": [IMAGE[:, :1].expand(3, 2**20, 6)]}, ValueError, r"images\[0\]: expected sides of at most 1048575"),
        ({"sizes": SIZES.to("meta")}, ValueError, r"sizes: expected it on cpu like images\[0\], got meta"),
        ({"images": [IMAGE, IMAGE.to("meta")]}, ValueError, r"images\[1\]: expected it on cpu like images\[0\]"),
        ({"images": [IMAGE, IMAGE]}, ValueError, r"sizes: expected shape \[2, 4\], got \[1, 4\]"),
        ({"sizes": SIZES[0]}, ValueError, r"sizes: expected shape \[1, 4\], got \[4\]"),
        ({"sizes": SIZES.int()}, TypeError, "sizes: expected an int64 tensor, got torch.int32"),
        ({"sizes": [[4, 6, 5, 7]]}, TypeError, "sizes: expected a tensor, got list"),
        ({"sizes": torch.tensor([[5, 6, 5, 7]])}, ValueError, WITHIN + r" zeros, got \[5, 6, 5, 7\]"),
        ({"sizes": torch.tensor([[4, 7, 5, 7]])}, ValueError, WITHIN),
        ({"sizes": torch.tensor([[4, 6, 9, 7]])}, ValueError, WITHIN),
        ({"sizes": torch.tensor([[4, 6, 5, 9]])}, ValueError, WITHIN),
        ({"sizes": torch.tensor([[0, 6, 5, 7]])}, ValueError, WITHIN),
        ({"sizes": torch.tensor([[4, 6, 0, 7]])}, ValueError, WITHIN),
        ({"sizes": torch.tensor([[-4, -6, 5, 7]])}, ValueError, WITHIN),
        ({"images": [torch.zeros(71, dtype=torch.uint8)]}, ValueError, r"sizes\[0\]: expected a size .*shape \[71\]"),
        ({"shape": (8, 0)}, ValueError, r"shape: expected \(height, width\) of 1 to 1048575 pixels, got \(8, 0\)"),
        ({"shape": (8, 2**20)}, ValueError, "shape: expected"),
        ({"shape": (8.0, 8)}, ValueError, "shape: expected"),
        ({"shape": (8,)}, ValueError, "shape: expected"),
        ({"mean": MEAN[:2]}, ValueError, "mean: expected three finite numbers, got"),
        ({"std": (1.0, float("nan"), 1.0)}, ValueError, "std: expected three finite numbers, got"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std: expected numbers other than zero"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_bad_arguments(wrong, error, message):
    ops.normalize_pad(**GOOD)
    with pytest.raises(error, match=message):
        ops.normalize_pad(**(GOOD | wrong))
