"""winograd_conv2d: the reference against PyTorch's convolution, the CPU kernel against both in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.self_test import Specification

# No image, maps of one cell, of whole tiles (4) and of all parts of one, fewer tiles than a block (56), and several
# blocks; channels of one vector and of several, outputs of one piece of the weights and of several.
MAPS = [(0, 4, 4), (1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 3, 3), (1, 4, 4), (1, 4, 5), (3, 5, 4), (1, 6, 7), (1, 1, 70)]
MAPS += [(1, 13, 16), (2, 14, 14), (1, 15, 33), (2, 46, 43)]
SHAPES = [(*size, *channels) for size in MAPS for channels in ((16, 64), (48, 192), (96, 96), (256, 32))]


def make(batch, height, width, inputs, outputs, seed=0):
    """Arguments, with the weights as a convolution's, [Co, Ci, 3, 3]; results have about unit variance."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    return {
        "x": random(batch, inputs, height, width).contiguous(memory_format=torch.channels_last),
        "weight": random(outputs, inputs, 3, 3, scale=(9 * inputs) ** -0.5),
        "bias": random(outputs),
        "residual": random(batch, outputs, height, width).contiguous(memory_format=torch.channels_last),
    }


def transformed(arguments):
    return arguments | {"weight": ops.winograd_weight(arguments["weight"])}


def convolution(x, weight, bias=None, residual=None, relu=False):
    result = F.conv2d(x, weight, bias, padding=1)
    result = result if residual is None else result + residual
    return result.relu() if relu else result


def double(arguments):
    return {name: value.double() for name, value in arguments.items() if value is not None}


def test_weights_by_hand():
    weight = torch.zeros(64, 16, 3, 3)
    weight[5, 3] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    points = ops.winograd_weight(weight)
    assert points.shape == (1, 36, 16, 64)
    # The taps are polynomials. Of 1 + 2 t + 3 t^2: the first coefficient, the values at 2/3, -2/3, 3/2 and -3/2 over
    # 2 * 4/9 * (4/9 - 9/4) = -130/81 and 2 * 9/4 * (9/4 - 4/9) = 65/8, and the last coefficient.
    first = torch.tensor([1.0, -(11 / 3) * 81 / 130, -81 / 130, (43 / 4) * 8 / 65, (19 / 4) * 8 / 65, 3.0])
    torch.testing.assert_close(points[0, :, 3, 5].view(6, 6)[0], first)
    # The same of the first column, 1 + 4 t + 7 t^2; and the taps' corners.
    column = torch.tensor([1.0, -(61 / 9) * 81 / 130, -(13 / 9) * 81 / 130, (91 / 4) * 8 / 65, (43 / 4) * 8 / 65, 7.0])
    torch.testing.assert_close(points[0, :, 3, 5].view(6, 6)[:, 0], column)
    assert torch.equal(points[0, [0, 5, 30, 35], 3, 5], torch.tensor([1.0, 3.0, 7.0, 9.0]))
    # At (2/3, -3/2): the sum of 1 + 2 x + 3 x^2, + 4 y + 5 xy + 6 x^2 y, + 7 y^2 + 8 x y^2 + 9 x^2 y^2, y = 2/3.
    value = 1 - 3 + 27 / 4 + (4 - 15 / 2 + 27 / 2) * 2 / 3 + (7 - 12 + 81 / 4) * 4 / 9
    assert points[0, 10, 3, 5].item() == pytest.approx(value * (-81 / 130) * 8 / 65, rel=1e-6)
    points[0, :, 3, 5] = 0
    assert not points.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_the_convolution(shape):
    arguments = double(make(*shape))
    for names in (("bias", "residual"), ("bias",), ("residual",), ()):
        given = {name: arguments[name] for name in ("x", "weight", *names)}
        for relu in (False, True):
            actual = ops.winograd_conv2d_reference(**transformed(given), relu=relu)
            torch.testing.assert_close(actual, convolution(**given, relu=relu), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape):
    arguments = make(*shape)
    with ops.backend("native"):
        for names in (("bias", "residual"), ("bias",), ("residual",), ()):
            given = {name: arguments[name] for name in ("x", "weight", *names)}
            for relu in (False, True):
                actual = ops.winograd_conv2d(**transformed(given), relu=relu)
                expected = convolution(**double(given), relu=relu)
                assert actual.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=3e-5)
        whole = transformed(arguments) | {"relu": True}
        record = Specification(ops.winograd_conv2d_reference, whole).compare(ops.winograd_conv2d)
    assert record["passed"], record


def test_is_as_near_to_the_exact_result_as_it_says():
    """About twice as far as a direct convolution, whose own error depends on the order of its sums."""
    arguments = make(1, 30, 40, 256, 64)
    exact = convolution(**double(arguments))
    with ops.backend("native"):
        error = (ops.winograd_conv2d(**transformed(arguments)).double() - exact).norm()
    assert error < 3 * (convolution(**arguments).double() - exact).norm()
    assert error < 1e-6 * exact.norm()


def test_the_layout_in_memory_does_not_matter():
    arguments = transformed(make(2, 9, 11, 32, 64))
    with ops.backend("native"):
        expected = ops.winograd_conv2d(**arguments)
        other = {
            name: value.contiguous() if value.dim() == 4 and name != "weight" else value
            for name, value in arguments.items()
        }
        other["weight"] = torch.stack([arguments["weight"]] * 2, dim=-1)[..., 0]
        other["bias"] = torch.stack([arguments["bias"]] * 2, dim=-1)[..., 0]
        assert torch.equal(ops.winograd_conv2d(**other), expected)


def test_results_do_not_depend_on_batch_or_threads():
    arguments = transformed(make(3, 22, 31, 64, 128))
    threads = torch.get_num_threads()
    with ops.backend("native"):
        expected = ops.winograd_conv2d(**arguments)
        for image in range(3):
            one = {name: arguments[name][image : image + 1] for name in ("x", "residual")}
            assert torch.equal(ops.winograd_conv2d(**(arguments | one))[0], expected[image])
        try:
            for count in (1, 3, 64):
                torch.set_num_threads(count)
                assert torch.equal(ops.winograd_conv2d(**arguments), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_near(value):
    arguments = make(1, 12, 12, 16, 64)
    arguments["x"][0, 3, 5, 6] = value
    with ops.backend("native"):
        actual = ops.winograd_conv2d(**transformed(arguments), relu=True)
    far = torch.ones(12, 12, dtype=torch.bool)
    far[4:8, 4:8] = False  # the tiles that see the cell
    assert torch.isfinite(actual[0, :, far]).all() and not torch.isfinite(actual[0, :, 4:7, 5:8]).all()


def test_gradients_come_from_the_reference():
    arguments = make(1, 5, 6, 16, 64)
    wanted = [arguments[name].requires_grad_() for name in ("x", "bias", "residual")]
    got = torch.autograd.grad(ops.winograd_conv2d(**transformed(arguments)).square().sum(), wanted)
    for actual, expected in zip(got, torch.autograd.grad(convolution(**arguments).square().sum(), wanted), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_operator_is_registered_right():
    arguments = transformed(make(1, 5, 6, 16, 64))
    x, residual = (arguments[name].permute(0, 2, 3, 1) for name in ("x", "residual"))
    operator = torch.ops.sparse_rcnn.winograd_conv2d.default
    checks = ("test_schema", "test_faketensor")  # gradients are the reference's
    torch.library.opcheck(operator, (x, arguments["weight"], arguments["bias"], residual, True), test_utils=checks)
    torch.library.opcheck(operator, (x, arguments["weight"], None, None, False), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 16, 5)}, ValueError, r"x: expected shape \[B, Ci, H, W\], got \[2, 16, 5\]"),
        ({"x": torch.zeros(1, 32, 5, 6)}, ValueError, r"weight: expected shape \[Co / T, 36, 32, T\]"),
        ({"x": torch.zeros(1, 16, 5, 6).double()}, TypeError, "x: expected torch.float32, got torch.float64"),
        ({"bias": torch.zeros(63)}, ValueError, r"bias: expected shape \[64\], got \[63\]"),
        ({"residual": torch.zeros(1, 64, 5, 5)}, ValueError, r"residual: expected shape \[1, 64, 5, 6\]"),
        ({"weight": torch.zeros(4, 36, 16, 16)}, ValueError, "weight: expected one of winograd_weight's"),
        ({"weight": torch.zeros(1, 36, 16, 64, device="meta")}, ValueError, "weight: expected it on cpu"),
        (
            {"x": torch.zeros(1, 8, 5, 6), "weight": torch.zeros(1, 36, 8, 64)},
            ValueError,
            r"x: expected a multiple of 16 channels, at least one, got \[1, 8, 5, 6\]",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.winograd_conv2d(**(transformed(make(1, 5, 6, 16, 64)) | change))


@pytest.mark.parametrize("shape", [(64, 16, 3), (48, 16, 3, 3), (64, 17, 3, 3), (64, 16, 5, 5), (64, 0, 3, 3)], ids=str)
def test_weights_that_do_not_suit(shape):
    with pytest.raises(ValueError, match="weight: expected"):
        ops.winograd_weight(torch.zeros(shape))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (1, 5, 6, 32), r"weight: expected shape \[any, 36, 32, 64\]"),
        (0, (1, 5, 6, 8), "x: expected a multiple of 16 channels, got 8"),
        (0, (5, 6, 16), r"x: expected shape \[B, H, W, Ci\]"),
        (1, (1, 35, 16, 64), r"weight: expected shape \[any, 36, 16, 64\], got \[1, 35, 16, 64\]"),
        (1, (16, 16, 64), "weight: expected shape"),
        (1, (1, 36, 16, 65), "weight: expected 16, 32, 48 or 64 outputs together, got 65"),
        (1, (1, 36, 16, 128), "weight: expected 16, 32, 48 or 64 outputs together, got 128"),
        (1, (1, 36, 16, 0), "weight: expected 16, 32, 48 or 64 outputs together, got 0"),
        (2, (65,), r"bias: expected shape \[64\], got \[65\]"),
        (3, (1, 6, 5, 64), r"residual: expected shape \[1, 5, 6, 64\]"),
    ],
)
def test_a_direct_call_cannot_read_out_of_bounds(index, shape, message):
    arguments = [torch.zeros(1, 5, 6, 16), torch.zeros(1, 36, 16, 64), torch.zeros(64), torch.zeros(1, 5, 6, 64), False]
    arguments[index] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_rcnn.winograd_conv2d(*arguments)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{Path(__file__)}::test_values"]
    run = subprocess.run(
        command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
