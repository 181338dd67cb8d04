"""refine_boxes: the reference by hand, and every way to it against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.ops import _library
from sparse_rcnn.ops.refine_boxes import MAX_CHANNELS, MAX_LAYERS
from sparse_rcnn.self_test import Specification

HALVES = (torch.bfloat16, torch.float16)
# The tower's deltas are of the order of 1: boxes stay of the order of 10.
CLAMP = (-1.0, 1.5)

# R, C, layers: around a block's 16, 8 or 4 proposals; channels around a slice of 32, the tensor cores' multiples of 16
# up to 256, and others.
SHAPES = [(0, 16, 1), (1, 16, 1), (1, 256, 3), (3, 16, 0), (300, 16, 3), (300, 64, 1), (40, 256, 3)]
SHAPES += [(rows, 32, 2) for rows in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 100)]
SHAPES += [(5, channels, 2) for channels in (16, 32, 48, 64, 80, 112, 128, 144, 176, 208, 240, 256)]
SHAPES += [(5, channels, 2) for channels in (1, 2, 3, 7, 8, 13, 24, 31, 33, 40, 72, 100, 250, 257, 264, 272, 300)]
SHAPES += [(3, 512, 1), (2, 1000, 1), (2, 1536, 1), (6, 16, 8), (6, 10, 4)]


def make(rows, channels, layers, dtype=torch.float32, boxes_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    corners, sizes = torch.rand(rows, 2, generator=generator), torch.rand(rows, 2, generator=generator)
    return {
        "x": random(rows, channels).to(dtype),
        "boxes": torch.cat([corners, corners + sizes], dim=-1).to(boxes_dtype),
        "tower_weights": [(random(channels, channels) / channels**0.5).to(dtype) for _ in range(layers)],
        "norm_weights": [random(channels).to(dtype) for _ in range(layers)],
        "norm_biases": [random(channels).to(dtype) for _ in range(layers)],
        "delta_weight": (random(4, channels) / channels**0.5).to(dtype),
        "delta_bias": random(4).to(dtype),
        "clamp": CLAMP,
    }


def widened(value):
    if isinstance(value, list):
        return [widened(item) for item in value]
    return value.double() if isinstance(value, torch.Tensor) else value


def native_arguments(inputs, weights=(2.0, 2.0, 1.0, 1.0)):
    """The arguments of torch.ops' operator."""
    wide = torch.float64 if inputs["x"].dtype == torch.float64 else torch.float32
    norms = ([norm.to(wide) for norm in inputs[name]] for name in ("norm_weights", "norm_biases"))
    head = (inputs["x"], inputs["boxes"], inputs["tower_weights"], *norms)
    return (*head, inputs["delta_weight"], inputs["delta_bias"], list(weights), *inputs["clamp"], 1e-5)


def test_shapes_are_many():
    assert len(set(SHAPES)) >= 40


def test_by_hand(backend):
    # Layer: y = (x0, 2 x1), normalised to (-1, 1), times (1, 2), plus (0, 1): (-1, 3), rectified: (0, 3).
    inputs = {
        "x": torch.tensor([[4.0, 3.0]]),
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 60.0]]),
        "tower_weights": [torch.tensor([[1.0, 0.0], [0.0, 2.0]])],
        "norm_weights": [torch.tensor([1.0, 2.0])],
        "norm_biases": [torch.tensor([0.0, 1.0])],
        # dx = 1, dy = -0.5, dw = log 2, dh = 3 log 4, clamped to log 4
        "delta_weight": torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, math.log(4)]]),
        "delta_bias": torch.tensor([1.0, -0.5, math.log(2), 0.0]),
        "clamp": (None, math.log(4)),
        "eps": 0.0,
    }
    # Centre (20 + 20 / 2, 40 - 40 / 4), size (40, 160).
    torch.testing.assert_close(ops.refine_boxes(**inputs), torch.tensor([[10.0, -50.0, 50.0, 110.0]]))
    torch.testing.assert_close(ops.refine_boxes_reference(**inputs), torch.tensor([[10.0, -50.0, 50.0, 110.0]]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_against_float64(backend, shape):
    inputs = make(*shape)
    actual = ops.refine_boxes(**inputs)
    assert actual.dtype == torch.float32 and actual.shape == (shape[0], 4)
    expected = ops.refine_boxes_reference(**{name: widened(value) for name, value in inputs.items()})
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_types(backend, shape, dtype):
    record = Specification(ops.refine_boxes_reference, make(*shape, dtype)).compare(ops.refine_boxes)
    assert record["passed"], record


@pytest.mark.parametrize("boxes_dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_every_pair_of_dtypes(backend, dtype, boxes_dtype):
    for shape in ((21, 64, 2), (21, 20, 2)):
        inputs = make(*shape, dtype, boxes_dtype)
        assert ops.refine_boxes(**inputs).dtype == boxes_dtype
        record = Specification(ops.refine_boxes_reference, inputs).compare(ops.refine_boxes)
        assert record["passed"], record


def test_the_kernel_keeps_what_half_types_lose_between_layers(backend):
    if backend.name != "emulated":
        pytest.skip("the composition rounds after every step")
    for dtype, tolerance in ((torch.bfloat16, 1e-4), (torch.float16, 1e-5)):
        inputs = make(64, 256, 3, dtype)
        expected = ops.refine_boxes_reference(**{name: widened(value) for name, value in inputs.items()})
        actual = ops.refine_boxes(**inputs)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_more_than_a_kernel_takes(backend):
    for shape in ((3, 8, MAX_LAYERS + 1), (2, MAX_CHANNELS + 1, 1)):
        inputs = make(*shape)
        expected = ops.refine_boxes_reference(**{name: widened(value) for name, value in inputs.items()})
        torch.testing.assert_close(ops.refine_boxes(**inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_clamps_and_weights(backend):
    inputs = make(30, 32, 1)
    for clamp in ((None, None), (None, 0.2), (-0.2, None), (-0.1, 0.1)):
        for weights in ((2.0, 2.0, 1.0, 1.0), (10.0, 9.0, 5.0, 4.0)):
            options = {"clamp": clamp, "weights": weights}
            actual, expected = ops.refine_boxes(**(inputs | options)), ops.refine_boxes_reference(**(inputs | options))
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_row(backend, dtype):
    inputs = make(20, 32, 2, dtype)
    expected = ops.refine_boxes(**inputs)
    inputs["x"][3, 7] = math.nan
    inputs["x"][5, 0] = math.inf
    inputs["boxes"][9, 2] = math.nan
    actual = ops.refine_boxes(**inputs)
    bad = torch.tensor([3, 5, 9])
    assert actual[bad].isnan().any(dim=1).all()
    good = [row for row in range(20) if row not in bad]
    torch.testing.assert_close(actual[good], expected[good], rtol=0, atol=0)


def test_opcheck_of_the_emulated_operator(emulator):
    native = torch.ops.sparse_rcnn_emulated.refine_boxes.default
    for inputs in (make(5, 16, 2), make(5, 16, 1, torch.bfloat16, torch.float64)):
        torch.library.opcheck(native, native_arguments(inputs))


def test_gradients_are_refused(backend):
    for name in ("x", "boxes", "delta_bias"):
        inputs = make(3, 16, 1)
        inputs[name].requires_grad_()
        with pytest.raises(RuntimeError, match="refine_boxes has no gradient"):
            ops.refine_boxes(**inputs)
        with torch.no_grad():
            assert not ops.refine_boxes(**inputs).requires_grad
        with torch.inference_mode():
            ops.refine_boxes(**inputs)


def test_autocast(backend):
    inputs = make(9, 32, 2)
    half = {name: inputs[name].bfloat16() for name in ("x", "delta_weight", "delta_bias")}
    half = inputs | half | {"tower_weights": [weight.bfloat16() for weight in inputs["tower_weights"]]}
    expected = ops.refine_boxes(**half)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.refine_boxes(**inputs)
        double = ops.refine_boxes(**{name: widened(value) for name, value in inputs.items()})
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert double.dtype == torch.float64


def test_repeats_are_equal_in_every_bit(backend):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(100, 64, 3, dtype)
        first = ops.refine_boxes(**inputs)
        assert all(torch.equal(first, ops.refine_boxes(**inputs)) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_order_of_emulated_threads_gives_the_same(emulator, dtype):
    inputs, runs = make(21, 48, 3, dtype), []
    with ops.backend("emulated"):
        for seed in range(5):
            emulator.set_seed(seed)
            runs.append(ops.refine_boxes(**inputs))
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_an_emulated_proposal_does_not_depend_on_the_others(emulator):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(37, 64, 2, dtype)
        part = inputs | {"x": inputs["x"][20:23], "boxes": inputs["boxes"][20:23]}
        with ops.backend("emulated"):
            together, alone = ops.refine_boxes(**inputs), ops.refine_boxes(**part)
        torch.testing.assert_close(alone, together[20:23], rtol=0, atol=0)


def test_the_tensor_cores_are_used_when_emulated(emulator):
    inputs = make(17, 256, 3, torch.bfloat16)
    emulator.reset_statistics()
    with ops.backend("emulated"):
        ops.refine_boxes(**inputs)
    # Two blocks; a layer is 16 steps of 32 tiles, twice after the first for the lower halves of the features.
    assert emulator.statistics()["mma"] == 2 * 16 * 32 * (1 + 2 + 2)


def test_views(backend):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(9, 32, 2, dtype)
        expected = ops.refine_boxes(**inputs)
        strided = inputs | {"x": inputs["x"].t().contiguous().t(), "boxes": inputs["boxes"][:1].expand(9, 4)}
        torch.testing.assert_close(
            ops.refine_boxes(**strided), ops.refine_boxes(**(inputs | {"boxes": strided["boxes"].contiguous()}))
        )
        shifted = torch.zeros(32 * 32 + 1, dtype=dtype)
        shifted[1:] = inputs["tower_weights"][0].flatten()  # contiguous, but not where a vector starts
        weights = [shifted[1:].view(32, 32), inputs["tower_weights"][1].t().contiguous().t()]
        actual = ops.refine_boxes(**(inputs | {"tower_weights": weights}))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_cpu_composes_native_operators():
    with ops.backend("native"):
        assert _library.serving("refine_boxes", "cpu") == "reference"
        inputs = make(7, 24, 2)
        with torch.profiler.profile() as profile:
            ops.refine_boxes(**inputs)
    names = [event.key for event in profile.key_averages()]
    assert "sparse_rcnn::add_layer_norm" in names
    assert "sparse_rcnn::apply_deltas" in names


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 2, 16)}, ValueError, r"x: expected shape \[R, C\], got \[3, 2, 16\]"),
        ({"x": torch.zeros(3, 16).int()}, TypeError, "x: expected a floating-point tensor, got torch.int32"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x: expected shape \[R, C\] with C >= 1, got \[3, 0\]"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes: expected shape \[3, 4\], got \[2, 4\]"),
        ({"boxes": torch.zeros(3, 4).int()}, TypeError, "boxes: expected a floating-point tensor, got torch.int32"),
        ({"boxes": torch.zeros(3, 4, device="meta")}, ValueError, "boxes: expected it on cpu like x, got meta"),
        ({"norm_biases": []}, ValueError, "tower_weights, norm_weights, norm_biases: expected one of each a layer"),
        (
            {"tower_weights": [torch.zeros(16, 16), torch.zeros(8, 16)]},
            ValueError,
            r"tower_weights\[1\]: expected shape \[16, 16\], got \[8, 16\]",
        ),
        (
            {"tower_weights": [torch.zeros(16, 16), torch.zeros(16, 16).bfloat16()]},
            TypeError,
            r"tower_weights\[1\]: expected torch.float32 like x, got torch.bfloat16",
        ),
        (
            {"norm_weights": [torch.zeros(16), torch.zeros(15)]},
            ValueError,
            r"norm_weights\[1\]: expected shape \[16\], got \[15\]",
        ),
        ({"delta_weight": torch.zeros(5, 16)}, ValueError, r"delta_weight: expected shape \[4, 16\], got \[5, 16\]"),
        ({"delta_bias": None}, TypeError, "delta_bias: expected a tensor, got NoneType"),
        ({"weights": (1.0, 2.0)}, ValueError, r"weights: expected four numbers, got \[1.0, 2.0\]"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.refine_boxes(**(make(3, 16, 2) | change))


def test_bad_input_of_the_emulated_operator(emulator):
    native = torch.ops.sparse_rcnn_emulated.refine_boxes
    bad = [
        ({"x": torch.zeros(3, 16, 1)}, r"x: expected shape \[any, any\], got \[3, 16, 1\]"),
        ({"boxes": torch.zeros(4, 4)}, r"boxes: expected shape \[3, 4\], got \[4, 4\]"),
        ({"boxes": torch.zeros(3, 4).half()}, "boxes: expected dtype Float, got Half"),
        ({"delta_weight": torch.zeros(4, 15)}, r"delta_weight: expected shape \[4, 16\], got \[4, 15\]"),
        ({"delta_bias": torch.zeros(4).double()}, "delta_bias: expected dtype Float, got Double"),
        ({"tower_weights": [torch.zeros(16, 16)]}, "tower_weights: expected at most 8, as many as norm_weights"),
        ({"norm_biases": [torch.zeros(16), torch.zeros(4)]}, r"norm_biases: expected shape \[16\], got \[4\]"),
    ]
    for change, message in bad:
        with pytest.raises(RuntimeError, match=message):
            native(*native_arguments(make(3, 16, 2) | change))
    with pytest.raises(RuntimeError, match="x: expected 1 to 1536 channels, got 1537"):
        native(*native_arguments(make(1, 1537, 0)))
    with pytest.raises(RuntimeError, match="weights: expected four numbers, got 3"):
        native(*native_arguments(make(3, 16, 2), weights=(1.0, 1.0, 1.0)))
