"""The kernels of dynamic_conv, forward and backward, against its reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import peak_memory
from sparse_rcnn import ops

HALVES = (torch.bfloat16, torch.float16)
NAMES = ("roi_features", "parameters", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")

# R, P, C, D
SMALL_SHAPES = [
    (0, 49, 32, 16),
    (0, 1, 5, 3),
    (1, 1, 1, 1),
    (1, 1, 5, 3),
    (3, 1, 5, 7),
    (1, 9, 5, 16),
    (1, 49, 5, 64),
    (3, 9, 33, 3),
    (1, 1, 33, 7),
    (1, 49, 33, 16),
    (3, 1, 33, 64),
    (1, 1, 32, 3),
    (3, 9, 32, 7),
    (1, 49, 32, 16),
    (3, 1, 32, 64),
    (1, 9, 64, 3),
    (1, 49, 64, 7),
    (3, 1, 64, 16),
    (1, 9, 64, 64),
    (1, 9, 96, 3),
    (1, 1, 96, 7),
    (1, 49, 96, 16),
    (1, 9, 96, 64),
    (3, 1, 256, 3),
    (1, 9, 256, 7),
    (1, 9, 256, 16),
    (1, 1, 256, 64),
    (1, 49, 256, 64),
    (2, 64, 48, 32),  # other numbers of bins than RoIAlign's usual ones
    (1, 65, 16, 16),
    (2, 13, 17, 65),
    (1, 4, 272, 16),
    (1, 5, 24, 80),
    (100, 1, 5, 3),
    (300, 1, 5, 3),
    (100, 4, 16, 16),
]
LARGE_SHAPES = [
    (3, 49, 96, 16),
    (3, 49, 256, 64),
    (100, 9, 33, 7),
    (100, 49, 64, 16),
    (100, 49, 96, 16),
    (100, 1, 256, 64),
    (300, 9, 32, 16),
    (300, 49, 5, 7),
    (300, 49, 256, 64),
    (2, 49, 512, 128),
    (2, 196, 130, 33),
]
SHAPES = [pytest.param(shape, id="-".join(map(str, shape))) for shape in SMALL_SHAPES + LARGE_SHAPES]
TYPED_SHAPES = [(1, 1, 1, 1), (3, 9, 33, 7), (2, 5, 5, 3), (1, 49, 64, 16), (2, 13, 17, 65), (1, 49, 256, 64)]


@pytest.fixture(autouse=True)
def only_small_in_the_emulator(request):
    """A large case takes the emulator minutes."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("shape") in LARGE_SHAPES and parameters.get("backend") == "emulated":
        pytest.skip("a large case")


def make_arguments(R, P, C, D, dtype=torch.float32, seed=0, bias=0.0):
    """Values of the size they have in a trained head: generated weights that keep the variance, norms around 1.

    With ``bias`` the norms' outputs lie around plus or minus that, far from the kink of the ReLU, where a rounding
    would send a whole gradient the other way.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def draw_bias(count):
        if not bias:
            return 0.2 * draw(count)
        sign = torch.where(torch.rand(count, generator=generator) < 0.3, -1.0, 1.0)
        sign[0] = 1.0  # some of the hidden values have to be positive
        return sign * bias + 0.2 * draw(count)

    parameters = torch.cat([draw(R, C * D) / C**0.5, draw(R, C * D) / D**0.5], dim=1)
    norms = [0.8 + 0.1 * draw(D), draw_bias(D), 0.8 + 0.1 * draw(C), draw_bias(C)]
    return [t.to(dtype) for t in (draw(R, P, C), parameters, *norms)]


def make_grad(R, P, C, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(R, P, C, generator=generator, dtype=torch.float64) / max(1, R * P) ** 0.5
    return grad.to(dtype)


def wide(tensors):
    return [tensor.double() for tensor in tensors]


def gradients(function, arguments, grad):
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def assert_as_exact_as_eager(actual, eager, exact, name):
    """The rule for half types: at most twice the error of PyTorch's own operators in the same type."""
    assert actual.dtype == eager.dtype, name
    allowed = 2 * (eager.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= allowed, name


def assert_gradients_close(actual, expected, grad):
    """Within 1e-5, and in proportion where all are small: each comes from sums of values of the size of ``grad``."""
    for name, ours, exact in zip(NAMES, actual, expected, strict=True):
        scale = min(1.0, torch.cat([exact.flatten(), grad.double().flatten(), grad.new_zeros(1)]).abs().max().item())
        torch.testing.assert_close(
            ours.double(), exact, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_values(backend, shape):
    arguments = make_arguments(*shape)
    actual = ops.dynamic_conv(*arguments)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    expected = ops.dynamic_conv_reference(*wide(arguments))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(backend, shape):
    arguments, grad = make_arguments(*shape, bias=8.0), make_grad(*shape[:3])
    actual = gradients(ops.dynamic_conv, arguments, grad)
    expected = gradients(ops.dynamic_conv_reference, wide(arguments), grad.double())
    assert_gradients_close(actual, expected, grad)


@pytest.mark.parametrize("shape", [(3, 9, 33, 7), (2, 49, 32, 16), (2, 9, 64, 16), (4, 5, 5, 3)])
def test_gradients_at_the_kinks(backend, shape):
    """Without a bias half of all values are cut off; rows that a rounding could turn get no gradient."""
    arguments, grad = make_arguments(*shape), make_grad(*shape[:3])
    near = [value.abs().amin(-1) < 1e-4 for value in before_relu(*wide(arguments))]
    assert sum(n.sum() for n in near) < grad[..., 0].numel() / 2
    grad[near[0] | near[1]] = 0
    actual = gradients(ops.dynamic_conv, arguments, grad)
    expected = gradients(ops.dynamic_conv_reference, wide(arguments), grad.double())
    assert_gradients_close(actual, expected, grad)


def before_relu(roi_features, parameters, w1, b1, w2, b2):
    """What the two ReLUs are given."""
    (R, _, C), D = roi_features.shape, len(w1)
    first, second = parameters[:, : C * D].view(R, C, D), parameters[:, C * D :].view(R, D, C)
    hidden = torch.layer_norm(roi_features @ first, (D,), w1, b1)
    return hidden, torch.layer_norm(hidden.relu() @ second, (C,), w2, b2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", TYPED_SHAPES)
def test_half_types(backend, shape, dtype):
    arguments = make_arguments(*shape, dtype)
    eager, exact = ops.dynamic_conv_reference(*arguments), ops.dynamic_conv_reference(*wide(arguments))
    assert_as_exact_as_eager(ops.dynamic_conv(*arguments), eager, exact, "values")

    arguments, grad = make_arguments(*shape, dtype, bias=8.0), make_grad(*shape[:3], dtype)
    actual = gradients(ops.dynamic_conv, arguments, grad)
    eager = gradients(ops.dynamic_conv_reference, arguments, grad)
    exact = gradients(ops.dynamic_conv_reference, wide(arguments), grad.double())
    for name, *three in zip(NAMES, actual, eager, exact, strict=True):
        assert_as_exact_as_eager(*three, name)


@pytest.mark.parametrize("shape", TYPED_SHAPES)
def test_float64_is_computed_in_float64(backend, shape):
    arguments = make_arguments(*shape, torch.float64)
    expected = ops.dynamic_conv_reference(*arguments)
    torch.testing.assert_close(ops.dynamic_conv(*arguments), expected, rtol=1e-11, atol=1e-11)
    grad = make_grad(*shape[:3], torch.float64)
    actual = gradients(ops.dynamic_conv, arguments, grad)
    for ours, exact in zip(actual, gradients(ops.dynamic_conv_reference, arguments, grad), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_parameters_of_another_type(backend, dtype):
    """Under autocast, and in most models of half types, the norms stay in float32; their gradients do as well."""
    features, parameters, *norms = make_arguments(2, 9, 32, 16, bias=8.0)
    arguments = [features.to(dtype), parameters.to(dtype), *norms]
    actual = gradients(ops.dynamic_conv, arguments, make_grad(2, 9, 32, dtype))
    assert [g.dtype for g in actual] == [a.dtype for a in arguments]
    exact = gradients(ops.dynamic_conv_reference, wide(arguments), make_grad(2, 9, 32, dtype).double())
    for ours, expected in zip(actual[2:], exact[2:], strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.03 * expected.abs().max().item())
    with torch.autocast("cpu", dtype):
        automatic = ops.dynamic_conv(features, parameters, *norms)
    assert torch.equal(automatic, ops.dynamic_conv(*arguments))


@pytest.mark.parametrize("eps", [1e-12, 0.3])
def test_eps(backend, eps):
    arguments = make_arguments(2, 9, 33, 7, bias=8.0)
    expected = ops.dynamic_conv_reference(*wide(arguments), eps)
    torch.testing.assert_close(ops.dynamic_conv(*arguments, eps).double(), expected, rtol=1e-5, atol=1e-5)
    grad = make_grad(2, 9, 33)
    actual = gradients(lambda *a: ops.dynamic_conv(*a, eps), arguments, grad)
    expected = gradients(lambda *a: ops.dynamic_conv_reference(*a, eps), wide(arguments), grad.double())
    assert_gradients_close(actual, expected, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(backend, dtype):
    """Strided arguments, and ones that begin in the middle of a word or a vector."""
    features, parameters, *norms = make_arguments(3, 9, 32, 16, dtype)
    grad = make_grad(3, 9, 32, dtype)
    expected = [ops.dynamic_conv(features, parameters, *norms)]
    expected += gradients(ops.dynamic_conv, [features, parameters, *norms], grad)
    views = [
        features.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([parameters, parameters], dim=1)[:, : parameters.shape[1]],
        *(torch.stack([norm, norm], dim=1)[:, 0] for norm in norms),
    ]
    shifted = [torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape) for t in (features, parameters, *norms)]
    for arguments, given in (views, grad.mT.contiguous().mT), (shifted, grad):
        actual = ops.dynamic_conv(*arguments)
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        grads = torch.autograd.grad(ops.dynamic_conv(*leaves), leaves, given)
        for ours, exact in zip((actual, *grads), expected, strict=True):
            assert torch.equal(ours, exact)


def test_a_grad_that_is_expanded(backend):
    """What sum() sends back has steps of 0."""
    arguments = make_arguments(2, 9, 32, 16, bias=8.0)
    actual = gradients(lambda *a: ops.dynamic_conv(*a).sum(), arguments, None)
    expected = gradients(lambda *a: ops.dynamic_conv_reference(*a).sum(), wide(arguments), None)
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_bin(backend, value):
    arguments = make_arguments(3, 9, 33, 7)
    clean = ops.dynamic_conv(*arguments)
    arguments[0][1, 4, 5] = value
    actual = ops.dynamic_conv(*arguments)
    assert actual[1, 4].isnan().all()
    kept = torch.ones(3, 9, dtype=torch.bool)
    kept[1, 4] = False
    assert torch.equal(actual[kept], clean[kept])


@pytest.mark.parametrize("seed", range(10))
def test_gradcheck(backend, seed):
    R, P, C, D = [(2, 3, 4, 3), (1, 4, 5, 2), (1, 2, 3, 6)][seed % 3]
    arguments = make_arguments(R, P, C, D, torch.float64, seed=seed, bias=2.5)
    assert min(value.abs().min() for value in before_relu(*arguments)) > 1e-3, "no kink within gradcheck's step"
    assert torch.autograd.gradcheck(ops.dynamic_conv, [a.requires_grad_() for a in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    native = getattr(torch.ops, backend.namespace)
    features, parameters, *norms = make_arguments(2, 4, 6, 5, bias=8.0)
    operands = [features.to(dtype), parameters.to(dtype), *norms]
    leaves = [operand.clone().requires_grad_() for operand in operands]
    torch.library.opcheck(native.dynamic_conv.default, (*leaves, 1e-5, False))
    grad = make_grad(2, 4, 6, dtype)
    torch.library.opcheck(native.dynamic_conv_backward.default, (grad, *operands, 1e-5, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(backend, dtype):
    arguments, grad = make_arguments(7, 9, 48, 16, dtype), make_grad(7, 9, 48, dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append([ops.dynamic_conv(*arguments), *gradients(ops.dynamic_conv, arguments, grad)])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*runs, strict=True):
        assert first.any() and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [(3, 9, 33, 7), (2, 49, 32, 16)])
def test_no_output_is_left_unwritten(backend, shape):
    """Under deterministic algorithms PyTorch fills new memory with NaN."""
    arguments, grad = make_arguments(*shape, bias=8.0), make_grad(*shape[:3])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        actual = [ops.dynamic_conv(*arguments), *gradients(ops.dynamic_conv, arguments, grad)]
    finally:
        torch.use_deterministic_algorithms(False)
    expected = [ops.dynamic_conv(*arguments), *gradients(ops.dynamic_conv, arguments, grad)]
    for poisoned, clean in zip(actual, expected, strict=True):
        assert poisoned.isfinite().all() and torch.equal(poisoned, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_forward(dtype):
    """Beside the result, scratch of at most 2 MB a thread."""
    arguments = make_arguments(100, 49, 256, 64, dtype)
    with ops.backend("native"), torch.no_grad():
        held = peak_memory(lambda: ops.dynamic_conv(*arguments), torch.device("cpu"))
    if held is None:
        pytest.skip("the system does not tell its peak")
    norms = 4 * 256 * 4
    assert held <= arguments[0].nbytes + norms + torch.get_num_threads() * 2**21


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(roi_features=torch.zeros(2, 24)), "roi_features"),
        (dict(roi_features=torch.zeros(2, 4, 7)), "parameters"),
        (dict(roi_features=torch.zeros(3, 4, 6)), "parameters"),
        (dict(roi_features=torch.zeros(2, 4, 6, dtype=torch.int64)), "features|parameters"),
        (dict(parameters=torch.zeros(2, 59)), "parameters"),
        (dict(parameters=torch.zeros(2, 60).double()), "parameters"),
        (dict(norm1_weight=torch.zeros(5, 1)), "norm1_weight"),
        (dict(norm1_weight=torch.zeros(5).half()), "norm1_weight"),
        (dict(norm1_bias=torch.zeros(4)), "norm1_bias"),
        (dict(norm2_weight=torch.zeros(5)), "norm2_weight"),
        (dict(norm2_bias=torch.zeros(7)), "norm2_bias"),
        (dict(grad=torch.zeros(2, 4, 5)), "grad"),
        (dict(grad=torch.zeros(2, 4, 6).half()), "grad"),
    ],
)
def test_a_direct_call_cannot_read_out_of_bounds(backend, wrong, message):
    arguments = dict(zip(NAMES, make_arguments(2, 4, 6, 5), strict=True), grad=make_grad(2, 4, 6), eps=1e-5)
    arguments["allow_tf32"] = False
    native = getattr(torch.ops, backend.namespace)
    native.dynamic_conv_backward(**arguments)
    arguments.update(wrong)
    with pytest.raises(RuntimeError, match=message):
        native.dynamic_conv_backward(**arguments)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability):
    """The tests above in a process of its own, with the kernels that another processor would get."""
    if ops._library.serving("dynamic_conv", "cpu") != "native":
        pytest.skip("no native library")
    chosen = "(gradients or half_types or float64 or views) and not emulated and not -100- and not -300-"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__))]
    done = subprocess.run(
        command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
