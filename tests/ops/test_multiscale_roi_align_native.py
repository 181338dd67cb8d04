"""The kernels of multiscale_roi_align, forward and backward, against its reference in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.ops.multiscale_roi_align import new_grad_cells

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 192, 256  # of the image, in pixels
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)
inf, nan = math.inf, math.nan

SPECIAL_BOXES = {
    "whole image": [0, 0, 256, 192],
    "partly outside": [-60, -30, 90, 150],
    "outside": [400, 400, 500, 520],
    "around the image": [-500, -500, 900, 900],
    "tiny": [20.3, 30.7, 20.4, 30.8],
    "tiny at the far corner": [255.99, 191.99, 256, 192],
    "zero width": [40, 50, 40, 90],
    "a point": [77.7, 33.3, 77.7, 33.3],
    "on cell centres": [2, 2, 58, 58],
    "a sample one cell outside": [-6, -4, 106, 52],
    "a sample one cell outside at the far end": [150, 140, 262, 196],
    "just below level 1": [0, 0, 111.999, 111.999],
    "on level 1": [0, 0, 112, 112],
    "rounded up to level 2": [0, 0, 223.99999, 223.99999],
    "on level 3": [-100, -100, 348, 348],
    "turned inside out": [100, 120, 30, 20],
    "inverted in x": [100, 20, 30, 120],
    "inverted in y": [30, 120, 100, 20],
    "NaN": [nan, 0, 50, 50],
    "infinite side": [10, 10, inf, 60],
    "infinite": [-inf, -inf, inf, inf],
    "infinite times nothing": [0, 10, inf, 10],
    "huge": [-1e30, -1e30, 1e30, 1e30],
    "area beyond float32": [0, 0, 1e38, 1e38],
    "huge and far": [1e20, 1e20, 3e20, 3e20],
    "wide as the numbers": [-3e38, 0, 3e38, 100],
}
POOL_TO_ZEROS = {"outside", "inverted in x", "inverted in y", "NaN"} | {
    name for name in SPECIAL_BOXES if name.startswith(("infinite", "huge", "area beyond", "wide as"))
}  # the samples of the last few lie far apart, none of them in the map

# B, N, C, levels, output_size, sampling_ratio, layout
SHAPES = [
    (1, 0, 32, 4, 7, 2, "channels_last"),
    (0, 3, 32, 4, 7, 2, "channels_last"),
    (0, 0, 3, 1, 7, 2, "nchw"),
    (2, 0, 1, 1, 1, 1, "sliced"),
    (1, 1, 1, 1, 1, 1, "nchw"),
    (1, 1, 1, 4, 7, 2, "channels_last"),
    (1, 3, 1, 4, 7, 3, "sliced"),
    (2, 3, 1, 1, 7, 1, "nchw"),
    (1, 1, 3, 4, 7, 2, "nchw"),
    (1, 3, 3, 1, 1, 2, "channels_last"),
    (2, 1, 3, 4, 1, 3, "sliced"),
    (2, 3, 3, 4, 7, 1, "nchw"),
    (2, 3, 3, 1, 2, 2, "sliced"),
    (1, 3, 7, 2, 3, 2, "channels_last"),
    (1, 1, 32, 1, 7, 2, "channels_last"),
    (1, 3, 32, 4, 7, 2, "nchw"),
    (2, 1, 32, 4, 7, 2, "sliced"),
    (2, 3, 32, 4, 7, 2, "channels_last"),
    (1, 3, 32, 4, 1, 1, "channels_last"),
    (1, 3, 32, 1, 7, 3, "nchw"),
    (1, 3, 33, 4, 7, 2, "nchw"),
    (1, 3, 47, 4, 5, 2, "channels_last"),
    (1, 1, 64, 4, 7, 2, "channels_last"),
    (2, 3, 64, 1, 7, 1, "sliced"),
    (1, 3, 64, 4, 1, 3, "nchw"),
    (1, 1, 100, 4, 7, 2, "channels_last"),
    (1, 1, 256, 4, 7, 2, "channels_last"),
    (1, 3, 256, 4, 1, 2, "nchw"),
    (2, 1, 256, 1, 7, 1, "sliced"),
    (1, 2, 8, 4, 14, 4, "channels_last"),
    (1, 2, 12, 4, 16, 5, "nchw"),
    (1, 2, 520, 2, 2, 2, "channels_last"),
    (1, 100, 4, 4, 7, 2, "channels_last"),
    (1, 300, 1, 4, 2, 1, "nchw"),
    (1, 100, 32, 4, 7, 2, "nchw"),
    (2, 100, 64, 4, 7, 2, "channels_last"),
    (1, 100, 256, 1, 7, 2, "channels_last"),
    (1, 100, 256, 4, 1, 3, "sliced"),
    (2, 100, 3, 4, 7, 3, "nchw"),
    (1, 300, 32, 1, 7, 1, "sliced"),
    (1, 300, 64, 4, 7, 3, "nchw"),
    (2, 300, 1, 4, 7, 2, "channels_last"),
    (2, 300, 256, 4, 7, 2, "channels_last"),
]


def make_features(B, C, levels, layout="channels_last", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = []
    for stride in STRIDES[:levels]:
        H, W = HEIGHT // stride, WIDTH // stride
        if layout == "sliced":  # a window of a larger map, every other column of it
            feature = torch.randn(B, C, H + 2, 2 * W, generator=generator, dtype=torch.float64).to(dtype)
            feature = feature[:, :, 1:-1, ::2]
        else:
            feature = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "channels_last":
            feature = feature.contiguous(memory_format=torch.channels_last)
        features.append(feature)
    return features


def make_boxes(B, N, dtype=torch.float32, seed=1):
    """Boxes of all levels and shapes, some of which reach out of the image; from 100 on, the special ones are among
    them."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(B, N, 2, generator=generator, dtype=dtype) * torch.tensor([WIDTH, HEIGHT])
    halves = 2 ** (torch.rand(B, N, 2, generator=generator, dtype=dtype) * 8)
    boxes = torch.cat([centers - halves, centers + halves], dim=-1)
    if N >= 100:
        boxes[:, : len(SPECIAL_BOXES)] = torch.tensor(list(SPECIAL_BOXES.values()), dtype=dtype)
    return boxes


def errors(actual, expected):
    """The largest absolute difference; NaN where anything is."""
    difference = (actual.double() - expected).abs()
    return difference.max() if difference.numel() else difference.new_zeros(())


def assert_as_exact_as_eager(actual, eager, expected):
    """The rule for half types: at most twice the error of PyTorch's own operators in the same type."""
    assert actual.dtype == eager.dtype
    assert errors(actual, expected) <= 2 * errors(eager, expected) + 1e-6


def assert_values(features, boxes, *options):
    """Against the reference in float64, which computes coordinates in the boxes' own type as well."""
    actual = ops.multiscale_roi_align(features, boxes, *options)
    expected = ops.multiscale_roi_align_reference([f.double() for f in features], boxes, *options)
    assert actual.dtype == features[0].dtype and actual.shape == expected.shape and actual.is_contiguous()
    if actual.dtype in HALVES:
        assert_as_exact_as_eager(actual, ops.multiscale_roi_align_reference(features, boxes, *options), expected)
    else:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    return actual


def gradients(function, features, boxes, grad, *options):
    leaves = [feature.detach().clone(memory_format=torch.preserve_format).requires_grad_() for feature in features]
    function(leaves, boxes, *options).backward(grad)
    return [leaf.grad for leaf in leaves]


def assert_gradients(features, boxes, *options):
    reference = ops.multiscale_roi_align_reference
    wide = [f.double() for f in features]
    generator = torch.Generator().manual_seed(2)
    shape = reference(features, boxes, *options).shape
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(features[0].dtype)
    actual = gradients(ops.multiscale_roi_align, features, boxes, grad, *options)
    expected = gradients(reference, wide, boxes, grad.double(), *options)
    if features[0].dtype in HALVES:
        eager = gradients(reference, features, boxes, grad, *options)
        for ours, theirs, exact in zip(actual, eager, expected, strict=True):
            assert_as_exact_as_eager(ours, theirs, exact)
    else:
        for ours, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["detectron2", "mmdet"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend, shape, rule):
    B, N, C, levels, size, samples, layout = shape
    features, boxes = make_features(B, C, levels, layout), make_boxes(B, N)
    assert_values(features, boxes, STRIDES[:levels], size, samples, rule)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(backend, shape):
    B, N, C, levels, size, samples, layout = shape
    assert_gradients(make_features(B, C, levels, layout), make_boxes(B, N), STRIDES[:levels], size, samples)


@pytest.mark.parametrize("box_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [3, 24, 64])
def test_types(backend, dtype, box_dtype, C):
    features, boxes = make_features(2, C, 4, dtype=dtype), make_boxes(2, 3).to(box_dtype)
    assert_values(features, boxes, STRIDES)
    assert_gradients(features, boxes, STRIDES)


def test_float64_is_computed_in_float64(backend):
    features, boxes = make_features(1, 5, 4, dtype=torch.float64), make_boxes(1, 3, torch.float64)
    actual = ops.multiscale_roi_align(features, boxes, STRIDES)
    expected = ops.multiscale_roi_align_reference(features, boxes, STRIDES)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["detectron2", "mmdet"])
@pytest.mark.parametrize("name", SPECIAL_BOXES)
def test_special_boxes(backend, name, rule):
    boxes = torch.tensor([[SPECIAL_BOXES[name]]], dtype=torch.float32)
    features = make_features(1, 3, 4)
    actual = assert_values(features, boxes, STRIDES, 7, 2, rule)
    assert (not actual.any()) == (name in POOL_TO_ZEROS), "pools to zeros"
    assert_gradients(features, boxes, STRIDES, 7, 2, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["detectron2", "mmdet"])
def test_level_of_sides_next_to_a_power_of_two(backend, rule, dtype):
    """A map of its own constant tells the level that was read."""
    sides = [torch.tensor(224 * 2.0**power, dtype=dtype) for power in (-2, -1, 0, 1)]
    for _ in range(4):
        up = [torch.nextafter(side, side * 2) for side in sides[-4:]]
        down = [torch.nextafter(side, side / 2) for side in sides[:4]]
        sides = down + sides + up
    side = torch.stack(sides)
    boxes = torch.stack([0 * side, 0 * side, side, side], dim=-1)[None]
    features = [torch.full((1, 1, 512 // s, 512 // s), float(s)) for s in STRIDES]
    levels = ops.multiscale_roi_align(features, boxes, STRIDES, 1, 1, rule)
    assert torch.equal(levels, ops.multiscale_roi_align_reference(features, boxes, STRIDES, 1, 1, rule))
    assert levels.unique().numel() >= 3


@pytest.mark.parametrize("strides", [(1, 2, 4, 8, 16, 32, 64, 128), (16, 32), (8,)])
def test_other_pyramids(backend, strides):
    features = [torch.randn(1, 4, 128 // min(s, 64), 192 // min(s, 64)) for s in strides]
    assert_values(features, make_boxes(1, 7), strides)
    assert_gradients(features, make_boxes(1, 7), strides)


def test_maps_of_one_cell(backend):
    features = [torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 5), torch.randn(2, 3, 4, 1)]
    assert_values(features, make_boxes(2, 9), STRIDES[:3])
    assert_gradients(features, make_boxes(2, 9), STRIDES[:3])


def test_a_map_of_more_than_two_to_the_31_elements(backend):
    """Memory of it that is not touched is never really there."""
    features = torch.empty(1, 8, 16384, 16640, memory_format=torch.channels_last)
    assert features.numel() > 2**31
    corner = torch.randn(1, 8, 64, 64)
    features[:, :, -64:, -64:] = corner
    box = torch.tensor([[[10.0, 12.0, 60.0, 70.0]]], dtype=torch.float64)
    shift = torch.tensor([16640.0, 16384.0, 16640.0, 16384.0], dtype=torch.float64) - 64
    actual = ops.multiscale_roi_align([features], box + shift, [1])
    torch.testing.assert_close(actual, ops.multiscale_roi_align_reference([corner], box, [1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_gradcheck(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(1, 2, 8 // s, 12 // s, generator=generator, dtype=torch.float64, requires_grad=True) for s in (1, 2)
    ]
    corners = torch.rand(1, 2, 4, generator=generator, dtype=torch.float64) * 30
    boxes = torch.cat([corners.view(1, 2, 2, 2).amin(2), corners.view(1, 2, 2, 2).amax(2)], dim=-1)
    boxes[0, 1, 2:] += 100  # of the second level

    def pool(*maps):
        return ops.multiscale_roi_align(maps, boxes, (4, 8), 2 + seed % 2, 1 + seed % 3, "mmdet")

    assert torch.autograd.gradcheck(pool, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    namespace = getattr(torch.ops, backend.namespace)
    features, boxes = make_features(1, 3, 2, dtype=dtype), make_boxes(1, 2)
    for feature in features:
        feature.requires_grad_()
    options = ([4, 8], 3, 2, "detectron2")
    torch.library.opcheck(namespace.multiscale_roi_align.default, (features, boxes, *options))
    features = [feature.detach() for feature in features]
    grad = torch.randn(1, 2, 9, 3).to(dtype)
    arguments = (grad, features, boxes, *options, True, new_grad_cells(features))
    torch.library.opcheck(namespace.multiscale_roi_align_backward.default, arguments)


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_adds_to_what_is_there(backend, deterministic):
    """Six stages add to one buffer; one of no rows is of maps that need no gradient."""
    native = getattr(torch.ops, backend.namespace)
    features, boxes, options = make_features(2, 5, 4), make_boxes(2, 3), (STRIDES, 7, 2, "detectron2")
    grad = torch.randn(2, 3, 49, 5)
    once = new_grad_cells(features)
    start = torch.randn_like(once)
    twice = start.clone()
    for cells in (once, twice, twice, once.new_empty(0, 5)):
        native.multiscale_roi_align_backward(grad, features, boxes, *options, deterministic, cells)
    torch.testing.assert_close(twice, start + 2 * once, rtol=1e-5, atol=1e-5)
    assert once.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(backend, dtype):
    features, boxes = make_features(1, 24, 4, dtype=dtype), make_boxes(1, 12)
    boxes[:, 6:] = boxes[:, :6] + 1  # more that fall on the same cells
    grad = torch.randn(1, 12, 49, 24).to(dtype)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        outputs, grads = [], []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(ops.multiscale_roi_align(features, boxes, STRIDES))
            parts = gradients(ops.multiscale_roi_align, features, boxes, grad, STRIDES)
            grads.append(torch.cat([part.flatten() for part in parts]))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert outputs[0].any() and all(torch.equal(outputs[0], output) for output in outputs[1:])
    assert grads[0].any() and all(torch.equal(grads[0], other) for other in grads[1:])


def test_no_output_is_left_unwritten(backend):
    """Under deterministic algorithms PyTorch fills new memory with NaN."""
    features = make_features(1, 5, 4)
    boxes = torch.tensor([list(SPECIAL_BOXES.values())], dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        assert_values(features, boxes, STRIDES)
        assert_gradients(features, boxes, STRIDES)
    finally:
        torch.use_deterministic_algorithms(False)


def test_boxes_get_no_gradient(backend):
    features, boxes = make_features(1, 3, 1), make_boxes(1, 2).requires_grad_()
    assert not ops.multiscale_roi_align(features, boxes, STRIDES[:1]).requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(boxes=torch.zeros(1, 2, 5)), "boxes"),
        (dict(boxes=torch.zeros(1, 2, 4, dtype=torch.int64)), "boxes"),
        (dict(boxes=torch.zeros(3, 2, 4)), "features"),
        (dict(features=[torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2, 2)]), "features"),
        (dict(features=[torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2).double()]), "features"),
        (dict(features=[torch.zeros(1, 3, 4, 4)]), "strides"),
        (dict(strides=[4, 12]), "strides"),
        (dict(output_size=0), "output_size"),
        (dict(sampling_ratio=0), "sampling_ratio"),
        (dict(level_rule="nearest"), "level_rule"),
        (dict(grad=torch.zeros(1, 2, 8, 3)), "grad"),
        (dict(grad_cells=torch.zeros(19, 3)), "grad_cells"),
        (dict(grad_cells=torch.zeros(20, 3).double()), "grad_cells"),
    ],
)
def test_a_direct_call_cannot_read_out_of_bounds(backend, wrong, message):
    arguments = dict(
        grad=torch.zeros(1, 2, 9, 3), features=[torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)],
        boxes=torch.zeros(1, 2, 4), strides=[4, 8], output_size=3, sampling_ratio=2, level_rule="detectron2",
        deterministic=True, grad_cells=torch.zeros(20, 3),
    )  # fmt: skip
    native = getattr(torch.ops, backend.namespace)
    native.multiscale_roi_align_backward(**arguments)
    arguments.update(wrong)
    with pytest.raises(RuntimeError, match=message):
        native.multiscale_roi_align_backward(**arguments)


@pytest.mark.parametrize(("allowed", "name"), [("default", "baseline"), ("avx2", "avx2")])
def test_lesser_instruction_sets(allowed, name):
    """The tests above in a process whose kernels are those that an older processor would get."""
    if ops._library.serving("multiscale_roi_align", "cpu") != "native":
        pytest.skip("no native library")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("an older processor")
    chosen = "not emulated and (test_types or test_special_boxes)"
    program = (
        "import sys, torch, pytest, sparse_rcnn.ops\n"
        f"assert torch.ops.sparse_rcnn.cpu_capability() == {name!r}\n"
        f"sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-k', {chosen!r}, {__file__!r}]))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": allowed}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
