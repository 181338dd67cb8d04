"""What only the CUDA kernels of dynamic_conv and roi_dynamic_conv have: tensor cores, their budgets, fusion, schedules.

They run in the emulator; their values on all kinds of arguments are tested in test_dynamic_conv_native.py and
test_roi_dynamic_conv_native.py.
"""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.ops.multiscale_roi_align import new_grad_cells

TENSOR_CORE_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # the last in TF32
STRIDES = (8, 16, 32)
HEIGHT, WIDTH = 192, 256  # of the image, in pixels
KB = 1024

# R, P, C, D that the tensor-core kernels take: the usual sizes, some that fill no tile, the least and the most.
TENSOR_CORE_SHAPES = [
    (2, 49, 256, 64),
    (2, 49, 96, 16),
    (3, 9, 64, 48),
    (2, 33, 48, 64),
    (2, 1, 16, 16),
    (1, 64, 176, 32),
]


@pytest.fixture
def native(emulator):
    """The kernels behind the operators."""
    with ops.backend("emulated"):
        yield torch.ops.sparse_rcnn_emulated
    emulator.set_poison(0xFF)


def draw_bias(generator, count):
    """Far from zero on either side, so that no rounding turns a ReLU."""
    bias = torch.where(torch.rand(count, generator=generator) < 0.3, -8.0, 8.0)
    bias[0] = 8.0
    return bias + 0.2 * torch.randn(count, generator=generator)


def make_conv(R, P, C, D, dtype):
    """Arguments of dynamic_conv, without eps, and a gradient."""
    generator = torch.Generator().manual_seed(R + P + C + D)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    parameters = torch.cat([draw(R, C * D) / C**0.5, draw(R, C * D) / D**0.5], dim=1)
    norms = 1 + 0.1 * draw(D), draw_bias(generator, D), 1 + 0.1 * draw(C), draw_bias(generator, C)
    return [draw(R, P, C).to(dtype), parameters.to(dtype), *norms], draw(R, P, C).to(dtype)


def make_roi(B, N, C, D, dtype, size=7, box_dtype=torch.float32):
    """Arguments of roi_dynamic_conv, without eps, and a gradient; boxes share many cells."""
    (_, *parameters), grad = make_conv(B * N, size**2, C, D, dtype)
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(B, C, HEIGHT // s, WIDTH // s, generator=generator).to(dtype, memory_format=torch.channels_last)
        for s in STRIDES
    ]
    centers = torch.rand(B, N, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    halves = 2 ** (3 + torch.rand(B, N, 2, generator=generator) * 4)
    boxes = torch.cat([centers - halves, centers + halves], dim=-1).to(box_dtype)
    return [features, boxes, *parameters, STRIDES, size, 2, "detectron2"], grad.view(B, N, size**2, C)


def run_conv(native, arguments, grad, tf32=True):
    return native.dynamic_conv(*arguments, 1e-5, tf32), *native.dynamic_conv_backward(grad, *arguments, 1e-5, tf32)


def run_roi(native, arguments, grad, deterministic, tf32=True):
    cells = new_grad_cells(arguments[0])
    out = native.roi_dynamic_conv(*arguments, 1e-5, tf32)
    grads = native.roi_dynamic_conv_backward(grad, *arguments, 1e-5, tf32, deterministic, cells)
    return out, *grads, cells


def with_statistics(emulator, function, *arguments):
    emulator.reset_statistics()
    result = function(*arguments)
    return result, emulator.statistics()


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES)
@pytest.mark.parametrize("shape", TENSOR_CORE_SHAPES)
def test_tensor_cores_agree_with_plain_arithmetic(native, emulator, shape, dtype):
    """More than 64 bins are beyond the tensor-core kernels; bins without gradient change nothing."""
    (x, *rest), grad = make_conv(*shape, dtype)
    (R, P, C, _), extra = shape, 65
    fast, statistics = with_statistics(emulator, run_conv, native, (x, *rest), grad)
    assert statistics["mma"] > 0
    longer = torch.cat([x, torch.randn(R, extra, C).to(dtype)], dim=1)
    longer_grad = torch.cat([grad, torch.zeros(R, extra, C, dtype=dtype)], dim=1)
    plain, statistics = with_statistics(emulator, run_conv, native, (longer, *rest), longer_grad)
    assert statistics["mma"] == 0
    assert plain[1][:, P:].eq(0).all()
    # Of operands, as the tensor cores take them: TF32 has the mantissa of float16.
    roundings = 3 * max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)
    plain = plain[0][:, :P], plain[1][:, :P], *plain[2:]
    for name, a, b in zip(("out", "x", "parameters", "norms"), fast, plain, strict=True):
        assert (a.double() - b.double()).abs().max() <= roundings * b.double().abs().max(), name


@pytest.mark.parametrize("dtype", TENSOR_CORE_TYPES)
@pytest.mark.parametrize("shape", TENSOR_CORE_SHAPES)
def test_no_bank_conflicts(native, emulator, shape, dtype):
    _, statistics = with_statistics(emulator, run_conv, native, *make_conv(*shape, dtype))
    assert statistics["ldmatrix"] > 0
    assert statistics["ldmatrix_conflicts"] == 0


def test_work_and_memory_of_the_usual_size(native, emulator):
    """What the kernels' header comments promise: 64 x 64 x 256 products, every operand fetched once, shared memory."""
    P, C, D = 49, 256, 64
    arguments, grad = make_conv(1, P, C, D, torch.bfloat16)
    product = 64 * D * C // (16 * 8 * 16)  # mma instructions
    weights, tile, norm2 = 2 * C * D, 2 * P * C, 2 * 4 * C  # bytes
    _, forward = with_statistics(emulator, native.dynamic_conv, *arguments, 1e-5, False)
    assert forward["mma"] == 2 * product
    assert forward["cp_async_bytes"] == 2 * weights + tile + norm2
    assert forward["shared_bytes"] <= 75 * KB, "three blocks on a multiprocessor of 228 KB"
    _, backward = with_statistics(emulator, native.dynamic_conv_backward, grad, *arguments, 1e-5, False)
    assert backward["mma"] == 6 * product
    assert backward["cp_async_bytes"] == 3 * weights + 2 * tile + norm2
    assert backward["shared_bytes"] <= 99 * KB


def test_work_and_memory_of_the_usual_size_in_tf32(native, emulator):
    """The backward fetches x twice, W1 twice and W2 for each of two passes and the gradient of hidden."""
    P, C, D = 49, 256, 64
    arguments, grad = make_conv(1, P, C, D, torch.float32)
    product = 64 * D * C // (16 * 8 * 8)  # mma instructions
    weights, tile, norm2 = 4 * C * D, 4 * P * C, 2 * 4 * C  # bytes
    _, forward = with_statistics(emulator, native.dynamic_conv, *arguments, 1e-5, True)
    assert forward["mma"] == 2 * product
    assert forward["cp_async_bytes"] == 2 * weights + tile + norm2
    assert forward["shared_bytes"] <= 99 * KB
    _, backward = with_statistics(emulator, native.dynamic_conv_backward, grad, *arguments, 1e-5, True)
    assert backward["mma"] == 4 * product + 2 * product * 56 // 64, "two are over P, a multiple of 8 in depth"
    assert backward["cp_async_bytes"] == 5 * weights + 3 * tile + norm2
    assert backward["shared_bytes"] <= 99 * KB


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 49, 256, 64), torch.bfloat16),
        ((3, 33, 48, 32), torch.float16),
        ((3, 49, 256, 64), torch.float32),
        ((3, 9, 33, 7), torch.float32),
        ((3, 9, 33, 7), torch.bfloat16),
        ((3, 49, 300, 64), torch.float64),  # with a workspace in global memory
    ],
)
def test_same_bits_in_any_order(native, emulator, shape, dtype):
    arguments, grad = make_conv(*shape, dtype)
    if dtype == torch.float64:
        arguments[2:] = [norm.double() for norm in arguments[2:]]
    results = []
    for seed, poison in enumerate((0xFF, 0x00, 0x7F, None)):
        emulator.set_seed(seed)
        emulator.set_poison(poison)
        results.append(run_conv(native, arguments, grad))
    for first, *others in zip(*results, strict=True):
        assert first.isfinite().all() and first.any()
        assert all(torch.equal(first, other) for other in others)


def test_more_rois_than_slots_of_the_workspace(native):
    """Where a block's intermediates are in global memory, it takes one RoI after another."""
    arguments, grad = make_conv(266, 64, 370, 3, torch.float32)
    out, grad_x, grad_parameters, _ = run_conv(native, arguments, grad)
    for roi in (0, 1, 263, 264, 265):
        x, parameters, *norms = arguments
        single = [x[roi : roi + 1], parameters[roi : roi + 1], *norms]
        *expected, _ = run_conv(native, single, grad[roi : roi + 1])
        for many, one in zip((out, grad_x, grad_parameters), expected, strict=True):
            assert one.any() and torch.equal(many[roi], one[0])


# C, D, dtype, box type, output size, launches of the fused forward
FUSION = [
    pytest.param(256, 64, torch.bfloat16, torch.float32, 7, 1, id="tensor cores"),
    pytest.param(48, 16, torch.float16, torch.float32, 3, 1, id="tensor cores, other sizes"),
    pytest.param(256, 64, torch.float32, torch.float32, 7, 1, id="TF32"),
    pytest.param(48, 16, torch.float32, torch.float32, 3, 1, id="TF32, other sizes"),
    pytest.param(20, 7, torch.float32, torch.float32, 7, 1, id="float32"),
    pytest.param(5, 3, torch.float32, torch.float32, 3, 2, id="odd channels"),
    pytest.param(20, 7, torch.float32, torch.float64, 7, 2, id="float64 boxes"),
    pytest.param(24, 16, torch.bfloat16, torch.float32, 7, 2, id="no tensor cores"),
    pytest.param(256, 64, torch.float32, torch.float32, 9, 2, id="too large for shared memory"),
]


@pytest.mark.parametrize(("C", "D", "dtype", "box_dtype", "size", "launches"), FUSION)
def test_fused_is_bit_equal_to_its_parts(native, emulator, C, D, dtype, box_dtype, size, launches):
    arguments, grad = make_roi(2, 3, C, D, dtype, size, box_dtype)
    (features, boxes, *parameters), options = arguments[:7], arguments[7:]
    out, statistics = with_statistics(emulator, native.roi_dynamic_conv, *arguments, 1e-5, True)
    assert statistics["launches"] == launches
    rois = native.multiscale_roi_align(features, boxes, *options).flatten(0, 1)
    expected, grad_rois, *grads = run_conv(native, (rois, *parameters), grad.flatten(0, 1))
    assert out.any() and torch.equal(out.flatten(0, 1), expected)
    expected_cells = new_grad_cells(features)
    native.multiscale_roi_align_backward(grad_rois.view_as(grad), features, boxes, *options, True, expected_cells)
    for deterministic in (False, True):
        _, *actual, cells = run_roi(native, arguments, grad, deterministic)
        assert all(torch.equal(a, e) for a, e in zip(actual, grads, strict=True))
        torch.testing.assert_close(cells, expected_cells, rtol=1e-5, atol=1e-5 * expected_cells.abs().max().item())
        if deterministic:
            assert torch.equal(cells, expected_cells)


@pytest.mark.parametrize(
    ("C", "D", "dtype"),
    [(256, 64, torch.bfloat16), (32, 16, torch.float16), (32, 16, torch.float32), (20, 7, torch.float32)],
)
def test_deterministic_form_has_the_same_bits_in_any_order(native, emulator, C, D, dtype):
    arguments, grad = make_roi(1, 8, C, D, dtype)
    results = {True: [], False: []}
    for deterministic, runs in results.items():
        for seed in range(4):
            emulator.set_seed(seed)
            runs.append(run_roi(native, arguments, grad, deterministic))
    for first, *others in zip(*results[True], strict=True):
        assert first.any() and all(torch.equal(first, other) for other in others)
    # Of the other form all is equal but the gradient of the maps, which these schedules show to depend on the order.
    *firsts, first_cells = results[False][0]
    for *others, _ in results[False][1:]:
        assert all(torch.equal(a, b) for a, b in zip(firsts, others, strict=True))
    assert not all(torch.equal(first_cells, other[-1]) for other in results[False][1:])


@pytest.mark.parametrize(
    ("C", "D", "dtype"),
    [(64, 16, torch.bfloat16), (64, 16, torch.float32), (20, 7, torch.float32), (5, 3, torch.float32)],
)
def test_gradient_of_the_maps_is_added_or_left_out(native, C, D, dtype):
    arguments, grad = make_roi(1, 3, C, D, dtype)
    _, *expected, cells = run_roi(native, arguments, grad, True)
    twice = 1 + cells
    native.roi_dynamic_conv_backward(grad, *arguments, 1e-5, True, True, twice)
    torch.testing.assert_close(twice, 1 + 2 * cells, rtol=1e-5, atol=1e-5 * cells.abs().max().item())
    for deterministic in (False, True):
        actual = native.roi_dynamic_conv_backward(grad, *arguments, 1e-5, True, deterministic, cells[:0])
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_boxes_that_read_nothing(native, dtype):
    """They pool to zeros and have no gradient, beside others that do."""
    arguments, grad = make_roi(1, 5, 32, 16, dtype)
    nan, inf = float("nan"), float("inf")
    arguments[1][0, 1:] = torch.tensor([[50, 9, 20, 60], [nan, 0, 9, 9], [0, 0, inf, nan], [-900, -900, -800, -700]])
    out, *_, cells = run_roi(native, arguments, grad, True)
    alone = [arguments[0], arguments[1][:, :1], arguments[2][:1], *arguments[3:]]
    expected, *_, expected_cells = run_roi(native, alone, grad[:, :1], True)
    assert expected_cells.any() and torch.equal(cells, expected_cells)
    assert torch.equal(out[:, :1], expected)
    silent = ops.dynamic_conv_reference(
        torch.zeros(4, 49, 32, dtype=torch.float64),
        arguments[2][1:].double(),
        *(norm.double() for norm in arguments[3:7]),
    )
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)
    torch.testing.assert_close(out[0, 1:].double(), silent, rtol=3 * rounding, atol=1e-5)
