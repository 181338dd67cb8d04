"""add_layer_norm: the reference by hand, and every kernel against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.self_test import Specification

HALVES = (torch.bfloat16, torch.float16)
TENSORS = ("x", "residual", "weight", "bias")

# Rows around the backward's parts (8 rows each up to 2048, longer ones beyond) and a stage's; channels around a vector
# of each instruction set, a warp's 256, 512 and 1024, and odd ones that fill no vector.
SHAPES = [(0, 8), (1, 1), (1, 2), (3, 1), (1, 256), (7, 256), (8, 256), (9, 256), (64, 256), (300, 256), (100, 64)]
SHAPES += [(5, channels) for channels in (3, 4, 7, 8, 9, 12, 15, 16, 17, 20, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128)]
SHAPES += [(3, channels) for channels in (248, 252, 255, 257, 260, 264, 320, 384, 500, 512, 516, 520, 768, 1000)]
SHAPES += [(2, 1020), (2, 1024), (2, 1028), (2, 1500), (1, 4099), (2047, 4), (2049, 12), (2304, 3), (4, 3, 32)]
SHAPES += [(2, 0, 16), (2, 3, 5, 7), (11,), (256,)]


def make(shape, dtype=torch.float32, seed=0, residual=True, offset=0.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    return {
        "x": random(*shape) + offset,
        "residual": random(*shape) * 2 if residual else None,
        "weight": random(shape[-1]),
        "bias": random(shape[-1]),
    }


def gradients(function, inputs, grad):
    """The output and the gradients of all tensors among the inputs, by name."""
    wanted = {
        name: value.detach().requires_grad_() for name, value in inputs.items() if isinstance(value, torch.Tensor)
    }
    output = function(**(inputs | wanted))
    return {"output": output} | dict(
        zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad.to(output)), strict=True)
    )


def test_shapes_are_many():
    assert len(set(SHAPES)) >= 40


def test_by_hand(backend):
    # x + residual = (1, 2, 3, 6): mean 3, variance 14 / 4.
    x = torch.tensor([[0.0, 2.0, 1.0, 4.0]])
    residual = torch.tensor([[1.0, 0.0, 2.0, 2.0]])
    weight, bias = torch.tensor([1.0, 2.0, 1.0, -1.0]), torch.tensor([0.5, 0.0, 0.25, 1.0])
    deviation = math.sqrt(3.5 + 0.5)
    expected = torch.tensor([[-2 / deviation + 0.5, -2 / deviation, 0.25, -3 / deviation + 1]])
    torch.testing.assert_close(ops.add_layer_norm(x, residual, weight, bias, eps=0.5), expected)
    rectified = torch.tensor([[0.0, 0.0, 0.25, 0.0]])
    torch.testing.assert_close(ops.add_layer_norm(x, residual, weight, bias, eps=0.5, relu=True), rectified)
    torch.testing.assert_close(
        ops.add_layer_norm(x + residual, None, weight, bias, 0.5), expected
    )  # what was added before counts the same


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_against_float64(backend, shape):
    for seed, (residual, relu) in enumerate([(True, False), (True, True), (False, True), (False, False)]):
        inputs = make(shape, seed=seed, residual=residual) | {"relu": relu}
        exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        actual, expected = ops.add_layer_norm(**inputs), ops.add_layer_norm_reference(**exact)
        assert actual.dtype == torch.float32 and actual.shape == shape
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        if backend.name == "native":  # whose gradients are PyTorch's
            continue
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / max(1, math.prod(shape[:-1])) ** 0.5
        actual = gradients(ops.add_layer_norm, inputs, grad)
        expected = gradients(ops.add_layer_norm_reference, exact, grad)
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert value.dtype == torch.float32 and value.shape == expected[name].shape
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (40, 32), (13, 256), (6, 512), (300, 256), (3, 1024), (2, 1500)], ids=str)
def test_other_dtypes(backend, shape, dtype):
    for relu in (False, True):
        for residual in (False, True):
            inputs = make(shape, dtype, residual=residual) | {"relu": relu}
            assert ops.add_layer_norm(**inputs).dtype == dtype
            for wrt in (tuple(name for name in TENSORS if inputs[name] is not None), ()):
                record = Specification(ops.add_layer_norm_reference, inputs, wrt).compare(ops.add_layer_norm)
                assert record["passed"], record


def test_a_large_mean_costs_no_precision(backend):
    # The mean of the squares less the square of the mean would be all rounding error here.
    inputs = make((20, 256), offset=1000.0)
    exact = {name: value.double() for name, value in inputs.items()}
    actual = ops.add_layer_norm(**inputs)
    # x itself is known to 3e-5 only after the addition, which the reference rounds alike.
    torch.testing.assert_close(actual.double(), ops.add_layer_norm_reference(**exact), rtol=1e-4, atol=3e-4)


def test_constant_rows(backend):
    inputs = make((4, 64), residual=False)
    inputs["x"] = torch.full((4, 64), 7.0)
    expected = inputs["bias"].expand(4, 64)
    torch.testing.assert_close(ops.add_layer_norm(**inputs), expected)


def test_what_is_not_finite_stays_in_its_row(backend):
    for relu in (False, True):
        inputs = make((6, 48)) | {"relu": relu}
        for row, bad in enumerate((math.nan, math.inf, -math.inf)):
            inputs["x"][row, 5] = bad
        actual, expected = ops.add_layer_norm(**inputs), ops.add_layer_norm_reference(**inputs)
        assert actual[:3].isnan().all()  # through the ReLU too
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_mixed_dtypes(backend):
    inputs = make((5, 24))
    mixed = inputs | {"residual": inputs["residual"].bfloat16(), "weight": inputs["weight"].half()}
    wide = {name: value.float() for name, value in mixed.items()}
    actual = ops.add_layer_norm(**mixed)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, ops.add_layer_norm(**wide), rtol=0, atol=0)
    grad = torch.randn(5, 24)
    got, want = gradients(ops.add_layer_norm, mixed, grad), gradients(ops.add_layer_norm, wide, grad)
    for name, value in mixed.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], want[name].to(value.dtype), rtol=0, atol=0)


def test_under_autocast_a_half_stays_a_half(backend):
    inputs = make((5, 24), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.add_layer_norm(**inputs)
    torch.testing.assert_close(actual, ops.add_layer_norm(**inputs), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):  # the residual stream stays as wide as it is
        actual = ops.add_layer_norm(**(inputs | {"x": inputs["x"].float()}))
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("seed", range(10))
def test_gradcheck(backend, seed):
    relu, residual = bool(seed % 2), seed % 3 > 0
    inputs = make((9, 5), torch.float64, seed=seed, residual=residual)
    tensors = [inputs[name].requires_grad_() for name in TENSORS if inputs[name] is not None]

    def function(x, *rest):
        return ops.add_layer_norm(x, rest[0] if residual else None, *rest[-2:], relu=relu)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(backend, dtype, residual):
    namespace = getattr(torch.ops, backend.namespace)
    inputs = make((3, 5, 16), dtype, residual=residual)
    tensors = [inputs["x"], inputs["residual"], inputs["weight"].float(), inputs["bias"].float()]
    torch.library.opcheck(namespace.add_layer_norm.default, (*tensors, 1e-5, True))
    if backend.name == "native":  # has no backward
        return
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(namespace.add_layer_norm.default, (*leaves, 1e-5, True))
    backward = namespace.add_layer_norm_backward.default
    torch.library.opcheck(backward, (torch.randn_like(tensors[0]), *tensors, 1e-5, True))


def test_with_a_gradient_the_cpu_takes_the_operators_of_pytorch():
    inputs = make((3, 16))
    inputs["x"].requires_grad_()
    with ops.backend("native"):
        assert "LayerNorm" in ops.add_layer_norm(**inputs).grad_fn.name()
        with torch.no_grad(), torch.profiler.profile() as profile:
            ops.add_layer_norm(**inputs)
    assert "sparse_rcnn::add_layer_norm" in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 2048, 2049, 5000])
def test_the_emulated_operators_fake_knows_how_many_parts_there_are(emulator, rows):
    backward = torch.ops.sparse_rcnn_emulated.add_layer_norm_backward
    arguments = (torch.ones(rows, 2), torch.ones(rows, 2), None, torch.ones(2), torch.ones(2), 1e-5, False)
    parts = backward(*arguments)[1]
    assert parts.shape[0] <= 256
    fake = backward(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments))[1]
    assert fake.shape == parts.shape


def test_compiled_with_any_number_of_rows(backend):
    compiled = torch.compile(ops.add_layer_norm, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 17, 2050):
        inputs = make((rows, 12))
        grad = torch.randn(rows, 12)
        got, want = gradients(compiled, inputs, grad), gradients(ops.add_layer_norm, inputs, grad)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(300, 256), (2500, 20), (5, 1500)], ids=str)
def test_repeats_are_equal_in_every_bit(backend, shape):
    inputs, grad = make(shape) | {"relu": True}, torch.randn(shape)

    def run():
        if backend.name == "native":  # whose gradients are PyTorch's
            return {"output": ops.add_layer_norm(**inputs)}
        return gradients(ops.add_layer_norm, inputs, grad)

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run()
            assert all(torch.equal(value, again[name]) for name, value in first.items())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(20, 256), (20, 30)], ids=str)  # by warp, by block
def test_every_order_of_threads_gives_the_same(emulator, shape):
    with ops.backend("emulated"):
        inputs, grad, runs = make(shape), torch.randn(shape), []
        for seed in range(5):
            emulator.set_seed(seed)
            runs.append(gradients(ops.add_layer_norm, inputs, grad))
        for run in runs[1:]:
            assert all(torch.equal(value, run[name]) for name, value in runs[0].items())


def test_views(backend):
    inputs = make((6, 64))
    expected = gradients(ops.add_layer_norm, inputs, torch.ones(6, 64))
    strided = inputs | {"x": inputs["x"].t().contiguous().t()}  # not contiguous
    shifted = torch.zeros(6 * 64 + 1)
    shifted[1:] = inputs["residual"].flatten()
    shifted = inputs | {"residual": shifted[1:].view(6, 64)}  # contiguous, but not where a vector starts
    for views in (strided, shifted):
        got = gradients(ops.add_layer_norm, views, torch.ones(()).expand(6, 64))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)


def test_equals_the_modules_it_replaces(backend):
    inputs = make((4, 9, 32))
    norm = torch.nn.LayerNorm(32)
    with torch.no_grad():
        norm.weight.copy_(inputs["weight"])
        norm.bias.copy_(inputs["bias"])
    x, residual = inputs["x"], inputs["residual"]
    actual = ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, relu=True)
    torch.testing.assert_close(actual, F.relu(norm(x + residual)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(3, 8).int()}, TypeError, "x: expected a floating-point tensor, got torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., C\] with C >= 1, got \[\]"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x: expected shape \[..., C\] with C >= 1, got \[3, 0\]"),
        ({"residual": torch.zeros(8)}, ValueError, r"residual: expected shape \[3, 8\], got \[8\]"),
        ({"residual": 0}, TypeError, "residual: expected a tensor, got int"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight: expected shape \[8\], got \[7\]"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"bias": torch.zeros(1, 8)}, ValueError, r"bias: expected shape \[8\], got \[1, 8\]"),
        ({"bias": torch.zeros(8).long()}, TypeError, "bias: expected a floating-point tensor, got torch.int64"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias: expected it on cpu like x, got meta"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.add_layer_norm(**(make((3, 8)) | change))


def test_bad_input_of_the_native_operator(backend):
    namespace = getattr(torch.ops, backend.namespace)
    x, norm = torch.zeros(3, 8), torch.zeros(8)
    bad = [
        ((x, torch.zeros(3, 7), norm, norm), r"residual: expected shape \[3, 8\], got \[3, 7\]"),
        ((x, x.double(), norm, norm), "residual: expected dtype Float, got Double"),
        ((x, x, torch.zeros(9), norm), r"weight: expected shape \[8\], got \[9\]"),
        ((x, x, norm, norm.bfloat16()), "bias: expected dtype Float, got BFloat16"),
        ((x.bfloat16(), None, norm.bfloat16(), norm), "weight: expected dtype Float, got BFloat16"),
        ((x.int(), None, norm, norm), "x: expected float32, float64, bfloat16 or float16"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            namespace.add_layer_norm(*arguments, 1e-5, False)
    if backend.name == "emulated":
        with pytest.raises(RuntimeError, match=r"grad: expected shape \[3, 8\], got \[8\]"):
            namespace.add_layer_norm_backward(norm, x, None, norm, norm, 1e-5, False)
