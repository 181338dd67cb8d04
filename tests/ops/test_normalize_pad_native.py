"""The CPU kernel of normalize_pad, and the CUDA kernel run on the CPU, bit for bit against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_rcnn import ops

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).permute(2, 0, 1)


def check(images, sizes, shape, dtype=torch.float32):
    """The result, which is the reference's to the last bit."""
    sizes = torch.tensor(sizes)
    actual = ops.normalize_pad(images, sizes, shape, MEAN, STD, dtype)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(actual, ops.normalize_pad_reference(images, sizes, shape, MEAN, STD, dtype))
    return actual


def check_one(image, size, shape=None, dtype=torch.float32):
    return check([image], [[*image.shape[1:], *size]], shape or size, dtype)


@pytest.mark.parametrize("seed", range(60))
def test_random_batches(backend, seed):
    rng = np.random.default_rng(seed)
    largest = (5, 40, 150)[seed % 3]
    sizes = rng.integers(1, largest + 1, (int(rng.integers(1, 4)), 4))
    if seed % 4 == 0:
        sizes[:, 2:] = sizes[:, :2]  # nothing is resized
    elif seed % 4 == 1:
        sizes[:, 2 + seed // 4 % 2] = sizes[:, seed // 4 % 2]  # one side is not
    images = [make_image(h, w, seed + index) for index, (h, w, *_) in enumerate(sizes.tolist())]
    if seed % 2:
        images[0] = images[0].contiguous()
    shape = tuple(int(side) for side in sizes[:, 2:].max(0) + rng.integers(0, 20, 2))
    check(images, sizes.tolist(), shape, DTYPES[seed % len(DTYPES)])


# Around a vector and a group of pixels of the CPU kernel, a tile of the CUDA kernel, and odd ones.
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 128, 130]


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend, width):
    for source in (1, 3, 20, width, 2 * width + 1):
        check_one(make_image(3, source), (4, width))
        check_one(make_image(3, source), (3, width), (4, width + 3), torch.bfloat16)


@pytest.mark.parametrize("height", [1, 2, 15, 16, 17, 31, 32, 33, 65])
def test_heights(backend, height):
    for source in (1, 5, height, 2 * height + 1, 40 * height):
        check_one(make_image(source, 6), (height, 9), (height + 1, 12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_network_sizes(backend, dtype):
    landscape, portrait = make_image(120, 160, 1), make_image(270, 150, 2)
    check([landscape, portrait], [[120, 160, 200, 266], [270, 150, 240, 133]], (256, 288), dtype)


def test_strong_shrinking(backend):
    """More taps an output pixel than a table of the CUDA kernel holds, and more rows than its shared memory."""
    check_one(make_image(900, 1100), (3, 2))
    check_one(make_image(700, 9), (2, 70))
    check_one(make_image(9, 2500), (20, 5))
    check_one(make_image(1, 5000), (1, 1))


def test_one_pixel(backend):
    result = check_one(make_image(1, 1), (40, 70), (64, 96))
    assert (result[0, :, :40, :70] == result[0, :, :1, :1]).all() and result[0, 0, 0, 0] != 0


@pytest.mark.parametrize("level", [0, 255])
def test_even_images_stay_even(backend, level):
    result = check_one(torch.full((3, 37, 61), level, dtype=torch.uint8), (50, 20))
    assert (result == result[:, :, :1, :1]).all()


def test_every_level_is_normalised_as_the_reference_does(backend):
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for dtype in DTYPES:
        check_one(levels, (1, 256), dtype=dtype)


def test_views(backend):
    image = make_image(23, 31)
    expected = check_one(image, (30, 40))
    planar = image.contiguous()
    wide = torch.full((3, 30, 50), 9, dtype=torch.uint8)
    wide[:, 4:27, 10:41] = image
    rows = torch.full((23, 40, 3), 9, dtype=torch.uint8)
    rows[:, 5:36] = image.permute(1, 2, 0)
    rgba = torch.full((23, 31, 4), 9, dtype=torch.uint8)
    rgba[..., :3] = image.permute(1, 2, 0)
    columns = image.transpose(1, 2).contiguous().transpose(1, 2)
    views = [planar, wide[:, 4:27, 10:41], rows[:, 5:36].permute(2, 0, 1), rgba[..., :3].permute(2, 0, 1), columns]
    views += [image.flip(2).flip(2), planar[[2, 1, 0]].flip(0)]
    for view in views:
        assert torch.equal(view, image)
        assert torch.equal(check_one(view, (30, 40)), expected)
    grey = image[:1].expand(3, 23, 31)
    assert torch.equal(check_one(grey, (30, 40)), check_one(grey.clone(), (30, 40)))
    one_row = image[:, :1].expand(3, 23, 31)
    assert torch.equal(check_one(one_row, (23, 40)), check_one(one_row.clone(), (23, 40)))


@pytest.mark.parametrize("size", [(5, 6), (5, 9), (8, 6), (3, 2)])
def test_nothing_around_the_image_is_seen(backend, size):
    """The same numbers whatever lies behind the image's last byte, before its first, and between its rows."""
    results = []
    for around in (0, 255):
        memory = torch.full((9, 10, 3), around, dtype=torch.uint8)
        memory[2:7, 2:8] = make_image(5, 6).permute(1, 2, 0)
        part = memory[2:7, 2:8].permute(2, 0, 1)
        flat = torch.full((100,), around, dtype=torch.uint8)
        flat[:90] = make_image(5, 6).permute(1, 2, 0).flatten()
        whole = memory[2:].permute(2, 0, 1)[:, :, 2:]  # of which sizes names the part
        results += [check_one(part, size), *(check([image], [[5, 6, *size]], size) for image in (flat, whole))]
    assert all(torch.equal(results[0], result) for result in results)


def test_flat_buffers_are_read_anew(backend):
    """What a captured program does: the same buffers, other images and sizes, then one image less."""
    buffers = [torch.zeros(3 * 40 * 50, dtype=torch.uint8) for _ in range(3)]
    sizes = torch.zeros(3, 4, dtype=torch.int64)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for buffer, size in zip(buffers, sizes, strict=True):
            h, w = (int(side) for side in rng.integers(1, 40, 2))
            buffer[: 3 * h * w] = make_image(h, w, seed).permute(1, 2, 0).flatten()
            size.copy_(torch.tensor([h, w, *rng.integers(1, 60, 2)]))
        if seed == 2:
            sizes[1] = 0
        result = check(buffers, sizes.tolist(), (64, 64))
        assert result[0].any() and result[1].any() == (seed != 2) and result[2].any()


UNFIT = [[5, 6, 7, 7], [4, 7, 7, 7], [4, 6, 9, 7], [4, 6, 7, 10], [0, 6, 7, 7], [4, 6, 7, -1], [2**40, 2**40, 7, 7]]


def test_sizes_that_do_not_fit_are_padding(backend):
    """Of sizes that the host has not seen; those on the CPU are refused in Python."""
    native = getattr(torch.ops, backend.namespace).normalize_pad
    image = make_image(4, 6)
    flat = image.permute(1, 2, 0).flatten()
    for unfit in UNFIT:
        for other in (image, flat):
            sizes = torch.tensor([[4, 6, 7, 7], unfit, [4, 6, 8, 9]])
            result = native([image, other, image], sizes, 8, 9, MEAN, STD, torch.float32)
            assert result[0].any() and not result[1].any() and result[2].any(-1).all()


def test_more_images_than_a_launch_takes(backend):
    images = [make_image(2 + index % 5, 3 + index % 7, index) for index in range(70)]
    sizes = [[*image.shape[1:], 4 + index % 3, 5] for index, image in enumerate(images)]
    check(images, sizes, (7, 6), torch.bfloat16)


def test_offsets_of_more_than_32_bits(backend):
    pitch = 2**31 + 5
    try:
        memory = torch.empty(2 * pitch + 100, dtype=torch.uint8)  # of which a few pages are touched
    except RuntimeError:
        pytest.skip("the system does not promise so much memory")
    image = make_image(3, 6)
    far = memory.as_strided((3, 3, 6), (1, pitch, 3))
    far.copy_(image)
    assert torch.equal(check_one(far, (4, 5)), check_one(image, (4, 5)))
    channels = memory.as_strided((3, 3, 6), (pitch, 6, 1))
    channels.copy_(image)
    assert torch.equal(check_one(channels, (4, 5)), check_one(image, (4, 5)))


def test_results_do_not_depend_on_the_number_of_threads():
    image, threads = make_image(300, 400), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with ops.backend("native"):
                results.append(check([image, image], [[300, 400, 260, 333], [300, 400, 300, 400]], (320, 416)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def test_every_order_of_threads_gives_the_same(emulator):
    image = make_image(50, 70)
    with ops.backend("emulated"):
        for seed in range(4):
            emulator.set_seed(seed)
            check_one(image, (40, 90), (48, 96))


def test_no_output_is_left_unwritten(backend):
    """Under deterministic algorithms PyTorch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        for shape in ((33, 35), (40, 64), (20, 64)):
            check([make_image(9, 9), make_image(9, 9)], [[9, 9, 20, 33], [0, 0, 0, 0]], shape)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    operator = getattr(torch.ops, backend.namespace).normalize_pad
    sizes = torch.tensor([[5, 7, 6, 8], [4, 3, 9, 9]])
    images = [make_image(5, 7), make_image(4, 3).permute(1, 2, 0).flatten()]
    torch.library.opcheck(operator.default, (images, sizes, 9, 10, list(MEAN), list(STD), dtype))


def test_bad_input_of_the_native_operator(backend):
    native = getattr(torch.ops, backend.namespace).normalize_pad
    image, sizes = make_image(4, 6), torch.tensor([[4, 6, 5, 7]])
    good = {"images": [image], "sizes": sizes, "height": 8, "width": 8, "mean": MEAN, "std": STD}
    good["dtype"] = torch.float32
    native(**good)
    for wrong, message in (
        ({"images": []}, "images: expected at least one"),
        ({"images": [image.float()]}, "images: expected dtype Byte, got Float"),
        ({"images": [image[:2]]}, r"images: expected shape \[3, h, w\] .* got \[2, 4, 6\]"),
        ({"images": [image.reshape(-1)[::2]]}, "images: expected bytes in a row"),
        ({"sizes": sizes[:, :3]}, r"sizes: expected shape \[1, 4\], got \[1, 3\]"),
        ({"sizes": sizes.int()}, "sizes: expected dtype Long, got Int"),
        ({"height": 0}, "shape: expected 1..1048575, got 0 and 8"),
        ({"width": 2**20}, "shape: expected"),
        ({"mean": MEAN[:2]}, "mean, std: expected three numbers each"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native(**(good | wrong))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability):
    """The tests above in a process of its own, with the kernels that another processor would get."""
    if ops._library.serving("normalize_pad", "cpu") != "native":
        pytest.skip("no native library")
    chosen = "(batches or widths or views or shrinking or level) and native and not lesser"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__))]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
