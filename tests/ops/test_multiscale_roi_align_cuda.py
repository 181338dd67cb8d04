"""What only the CUDA kernels of multiscale_roi_align have: two forms of the backward, schedules, vector access, limits.

They run in the emulator; their values on all kinds of arguments are tested in test_multiscale_roi_align_native.py.
"""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.ops.multiscale_roi_align import new_grad_cells

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 96, 160  # of the image, in pixels
OPTIONS = (7, 2, "detectron2")
SEEDS = range(4)


@pytest.fixture
def native(emulator):
    """The kernels behind the operators."""
    with ops.backend("emulated"):
        yield torch.ops.sparse_rcnn_emulated


def make_case(B=2, N=12, C=8, dtype=torch.float32, levels=4, size=7, box_dtype=torch.float32, scale=1):
    """Maps, boxes of which many share cells, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    H, W = scale * HEIGHT, scale * WIDTH
    features = [
        torch.randn(B, C, H // s, W // s, generator=generator).to(dtype, memory_format=torch.channels_last)
        for s in STRIDES[:levels]
    ]
    centers = torch.rand(B, N, 2, generator=generator) * torch.tensor([W, H])
    halves = 2 ** (2 + torch.rand(B, N, 2, generator=generator) * 6)
    boxes = torch.cat([centers - halves, centers + halves], dim=-1).to(box_dtype)
    grad = torch.randn(B, N, size**2, C, generator=generator).to(dtype)
    return features, boxes, grad


def backward(native, features, boxes, grad, deterministic, options=OPTIONS):
    cells = new_grad_cells(features)
    strides = STRIDES[: len(features)]
    native.multiscale_roi_align_backward(grad, features, boxes, strides, *options, deterministic, cells)
    return cells


def expected_cells(features, boxes, grad, options=OPTIONS):
    """The gradient by the reference in float64, in the rows of grad_cells."""
    leaves = [f.double().requires_grad_() for f in features]
    out = ops.multiscale_roi_align_reference(leaves, boxes, STRIDES[: len(features)], *options)
    grads = torch.autograd.grad(out, leaves, grad.double())
    return torch.cat([g.permute(0, 2, 3, 1).flatten(0, 2) for g in grads])


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def offset_by_one(tensor):
    """The same values in memory that starts one element after an aligned address."""
    memory = tensor.new_empty(tensor.numel() + 1)
    view = memory[1:].as_strided(tensor.shape, tensor.stride(), 1)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [5, 8, 136])
def test_deterministic_form_has_the_same_bits_in_any_order(native, emulator, dtype, C):
    case = make_case(C=C, dtype=dtype)
    results = {True: [], False: []}
    for deterministic, cells in results.items():
        for seed in SEEDS:
            emulator.set_seed(seed)
            cells.append(backward(native, *case, deterministic))
    assert results[True][0].any()
    assert all(torch.equal(results[True][0], other) for other in results[True][1:])
    # The other form's do depend on the order: these schedules would have shown it.
    assert not all(torch.equal(results[False][0], other) for other in results[False][1:])


@pytest.mark.parametrize("C", [5, 8])
def test_forward_has_the_same_bits_in_any_order(native, emulator, C):
    features, boxes, _ = make_case(C=C)
    results = []
    for seed in SEEDS:
        emulator.set_seed(seed)
        results.append(native.multiscale_roi_align(features, boxes, STRIDES, *OPTIONS))
    assert results[0].any()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("box_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [5, 16, 136])
def test_both_forms_are_the_gradient(native, dtype, C, box_dtype):
    """The sums are kept in float32 or wider: of half maps too, no more than its rounding is lost."""
    case = make_case(B=1, C=C, dtype=dtype, box_dtype=box_dtype)
    expected = expected_cells(*case)
    for deterministic in (False, True):
        assert_close(backward(native, *case, deterministic), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_detector(native, dtype):
    features, boxes, grad = make_case(B=1, N=300, C=256, dtype=dtype, scale=4)
    actual = ops.multiscale_roi_align(features, boxes, STRIDES)
    expected = ops.multiscale_roi_align_reference([f.double() for f in features], boxes, STRIDES)
    if dtype == torch.float32:
        assert_close(actual, expected)
    else:
        eager = ops.multiscale_roi_align_reference(features, boxes, STRIDES)
        assert (actual - expected).abs().max() <= 2 * (eager - expected).abs().max()
    expected = expected_cells(features, boxes, grad)
    for deterministic in (False, True):
        assert_close(backward(native, features, boxes, grad, deterministic), expected)


@pytest.mark.parametrize("present", [range(300), [3, 40, 270, 299], [256]])
@pytest.mark.parametrize("deterministic", [False, True])
def test_more_boxes_than_threads(native, deterministic, present):
    """The ordered form looks at 256 boxes at a time."""
    features, boxes, grad = make_case(B=2, N=300, C=4, levels=2, size=2)
    absent = torch.ones(300, dtype=torch.bool)
    absent[list(present)] = False
    boxes[:, absent] = boxes[:, absent][..., [2, 1, 0, 3]]  # of negative area
    options = (2, 2, "mmdet")
    expected = expected_cells(features, boxes, grad, options)
    assert expected.any()
    assert_close(backward(native, features, boxes, grad, deterministic, options), expected)


@pytest.mark.parametrize("C", [1028, 2056])
def test_more_channels_than_threads(native, C):
    features, boxes, grad = make_case(B=1, N=2, C=C, levels=1)
    actual = ops.multiscale_roi_align(features, boxes, STRIDES[:1])
    expected = ops.multiscale_roi_align_reference([f.double() for f in features], boxes, STRIDES[:1])
    assert_close(actual, expected)
    for deterministic in (False, True):
        assert_close(backward(native, features, boxes, grad, deterministic), expected_cells(features, boxes, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_memory(native, dtype):
    """Views can start anywhere; 16-byte accesses cannot."""
    features, boxes, grad = make_case(B=1, C=8, dtype=dtype)
    expected = ops.multiscale_roi_align(features, boxes, STRIDES)
    moved = [offset_by_one(f) for f in features]
    assert moved[0].data_ptr() % 16 != 0 and moved[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.multiscale_roi_align(moved, boxes, STRIDES), expected)
    expected = expected_cells(features, boxes, grad)
    for deterministic in (False, True):
        assert_close(backward(native, features, boxes, offset_by_one(grad), deterministic), expected)
        cells = offset_by_one(new_grad_cells(features))
        native.multiscale_roi_align_backward(grad, features, boxes, STRIDES, *OPTIONS, deterministic, cells)
        assert_close(cells, expected)


@pytest.mark.parametrize(("size", "samples"), [(2, 256), (16, 32)])
def test_the_most_samples(native, size, samples):
    features, boxes, grad = make_case(B=1, N=1, C=4, levels=1, size=size)
    options = (size, samples, "detectron2")
    actual = ops.multiscale_roi_align(features, boxes, STRIDES[:1], *options)
    assert_close(
        actual, ops.multiscale_roi_align_reference([f.double() for f in features], boxes, STRIDES[:1], *options)
    )
    for deterministic in (False, True):
        actual = backward(native, features, boxes, grad, deterministic, options)
        assert_close(actual, expected_cells(features, boxes, grad, options))
    with pytest.raises(RuntimeError, match="samples"):
        native.multiscale_roi_align(features, boxes, STRIDES[:1], size, samples + 1, "detectron2")


def test_one_launch_for_all_levels_and_images(native, emulator):
    features, boxes, grad = make_case(C=256, dtype=torch.bfloat16)
    for call in (
        lambda: native.multiscale_roi_align(features, boxes, STRIDES, *OPTIONS),
        lambda: backward(native, features, boxes, grad, False),
        lambda: backward(native, features, boxes, grad, True),
    ):
        emulator.reset_statistics()
        call()
        assert emulator.statistics()["launches"] == 1


def test_budget_of_shared_memory(native, emulator):
    """What the header of the kernels says."""
    features, boxes, grad = make_case(B=1, N=2, C=256, dtype=torch.bfloat16)
    for deterministic, budget in ((False, 15 * 1024), (True, 2 * 1024)):
        emulator.reset_statistics()
        native.multiscale_roi_align(features, boxes, STRIDES, *OPTIONS)
        assert emulator.statistics()["shared_bytes"] <= 2 * 1024
        backward(native, features, boxes, grad, deterministic)
        assert emulator.statistics()["shared_bytes"] <= budget
    # Each block copies its part of the gradient once.
    emulator.reset_statistics()
    backward(native, features, boxes, grad, False)
    assert emulator.statistics()["cp_async_bytes"] == grad.numel() * grad.element_size()
