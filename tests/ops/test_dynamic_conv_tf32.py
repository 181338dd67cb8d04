"""float32 by tensor cores: the rounding of operands to TF32, and that only PyTorch's setting asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from sparse_rcnn import ops
from sparse_rcnn.ops.shared_gradients import share_gradients
from tests.conftest import ROOT
from tests.ops.test_dynamic_conv_cuda import STRIDES, TENSOR_CORE_SHAPES, make_conv, make_roi
from tests.ops.test_dynamic_conv_native import NAMES, assert_as_exact_as_eager, gradients, wide

OTHER_SHAPES = [(2, 9, 33, 7), (2, 65, 32, 16), (1, 9, 272, 16), (1, 60, 256, 64)]  # not for tensor cores in TF32


@pytest.fixture
def precision():
    """Sets the precision of float32 matmuls on CUDA."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda value: setattr(matmul, "fp32_precision", value)
    matmul.fp32_precision = before


@pytest.fixture
def tf32(precision):
    precision("tf32")


@pytest.fixture
def emulated(emulator):
    with ops.backend("emulated"):
        yield emulator


def round_to_tf32(x):
    """To the nearest of ten bits of mantissa, ties away from zero: cvt.rna.tf32.f32."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


class Tf32Bmm(torch.autograd.Function):
    """torch.bmm as it is on CUDA in TF32, forward and backward, but with exact sums of the rounded operands."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return round_to_tf32(a) @ round_to_tf32(b)

    @staticmethod
    def backward(ctx, grad):
        a, b = (round_to_tf32(x) for x in ctx.saved_tensors)
        grad = round_to_tf32(grad)
        return grad @ b.mT, a.mT @ grad


def eager_tf32(roi_features, parameters, w1, b1, w2, b2):
    """dynamic_conv_reference with products in TF32 and the rest in the type given."""
    (R, _, C), D = roi_features.shape, len(w1)
    first, second = parameters[:, : C * D].view(R, C, D), parameters[:, C * D :].view(R, D, C)
    hidden = F.relu(F.layer_norm(Tf32Bmm.apply(roi_features, first), (D,), w1, b1))
    return F.relu(F.layer_norm(Tf32Bmm.apply(hidden, second), (C,), w2, b2))


def roi_gradients(function, features, boxes, others, grad):
    """The result and the gradients of the maps and of the other tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in (*features, *others)]
    out = function(leaves[: len(features)], boxes, *leaves[len(features) :])
    return out, *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("shape", TENSOR_CORE_SHAPES)
def test_as_exact_as_eager(emulated, tf32, shape):
    arguments, grad = make_conv(*shape, torch.float32)
    emulated.reset_statistics()
    actual = ops.dynamic_conv(*arguments), *gradients(ops.dynamic_conv, arguments, grad)
    assert emulated.statistics()["mma"] > 0
    eager = eager_tf32(*wide(arguments)), *gradients(eager_tf32, wide(arguments), grad.double())
    reference = ops.dynamic_conv_reference
    exact = reference(*wide(arguments)), *gradients(reference, wide(arguments), grad.double())
    assert (eager[0] - exact[0]).abs().max() > 1e-4
    for name, ours, rounded, wanted in zip(("values", *NAMES), actual, eager, exact, strict=True):
        assert_as_exact_as_eager(ours, rounded.float(), wanted, name)


@pytest.mark.parametrize(("C", "D", "size"), [(256, 64, 7), (48, 32, 3), (16, 16, 8)])
def test_fused_is_as_exact_as_eager(emulated, tf32, C, D, size):
    arguments, grad = make_roi(1, 3, C, D, torch.float32, size)
    features, boxes, others, options = arguments[0], arguments[1], arguments[2:7], arguments[7:]

    def reference(conv):
        def run(features, boxes, *others):
            rois = ops.multiscale_roi_align_reference(features, boxes, *options)
            return conv(rois.flatten(0, 1), *others).view_as(rois)

        return roi_gradients(run, wide(features), boxes.double(), wide(others), grad.double())

    emulated.reset_statistics()
    actual = roi_gradients(lambda *a: ops.roi_dynamic_conv(*a, *options), features, boxes, others, grad)
    assert emulated.statistics()["mma"] > 0
    names = ("values", *(f"features[{level}]" for level in range(len(features))), *NAMES[1:])
    results = zip(names, actual, reference(eager_tf32), reference(ops.dynamic_conv_reference), strict=True)
    for name, ours, rounded, wanted in results:
        assert_as_exact_as_eager(ours, rounded.float(), wanted, name)


@pytest.mark.parametrize(
    ("setting", "shape"), [("none", s) for s in TENSOR_CORE_SHAPES[:2]] + [("tf32", s) for s in OTHER_SHAPES]
)
def test_exact_without_leave_and_in_other_sizes(emulated, precision, setting, shape):
    precision(setting)
    arguments, grad = make_conv(*shape, torch.float32)
    emulated.reset_statistics()
    actual = ops.dynamic_conv(*arguments), *gradients(ops.dynamic_conv, arguments, grad)
    assert emulated.statistics()["mma"] == 0
    reference = ops.dynamic_conv_reference
    exact = reference(*wide(arguments)), *gradients(reference, wide(arguments), grad.double())
    for ours, wanted in zip(actual, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_the_cpu_kernels_and_other_types_ignore_it(emulator, precision):
    for backend, dtype in (("native", torch.float32), ("emulated", torch.bfloat16), ("emulated", torch.float64)):
        arguments, grad = make_conv(2, 9, 32, 16, torch.float32)
        arguments[:2] = [t.to(dtype) for t in arguments[:2]]
        results = []
        for setting in ("ieee", "tf32"):
            precision(setting)
            with ops.backend(backend):
                out = ops.dynamic_conv(*arguments)
                results.append([out, *gradients(ops.dynamic_conv, arguments, grad.to(dtype))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_the_backward_goes_as_the_forward_did(emulated, precision, shared):
    arguments, grad = make_roi(1, 2, 32, 16, torch.float32, 3)
    features = [f.requires_grad_() for f in arguments[0]]
    x, conv = features[0].new_zeros(2, 9, 32, requires_grad=True), arguments[2:7]
    for setting, other in (("tf32", "ieee"), ("ieee", "tf32")):
        precision(setting)
        outs = [
            ops.roi_dynamic_conv(share_gradients(features) if shared else features, *arguments[1:]),
            ops.dynamic_conv(x, *conv),
        ]
        precision(other)
        for out in outs:
            emulated.reset_statistics()
            out.backward(grad.view_as(out))
            assert (emulated.statistics()["mma"] > 0) == (setting == "tf32")


def test_every_way_to_set_it():
    """In a process of its own: PyTorch's older and newer ways do not mix. None of them may warn."""
    program = """
import sys, torch, warnings
from sparse_rcnn.ops.dynamic_conv import tf32_allowed
assert "torch._dynamo" not in sys.modules, "takes seconds to import"
assert not tf32_allowed()
for precision, allowed in (("high", True), ("highest", False), ("medium", True), ("highest", False)):
    torch.set_float32_matmul_precision(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tf32_allowed() == allowed, precision
for value in (True, False):
    torch.backends.cuda.matmul.allow_tf32 = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tf32_allowed() == value
warnings.simplefilter("error")
for value in ("tf32", "ieee"):
    torch.backends.cuda.matmul.fp32_precision = value
    assert tf32_allowed() == (value == "tf32")
torch.backends.cuda.matmul.fp32_precision = "none"
torch.backends.fp32_precision = "tf32"
assert tf32_allowed()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_compiled_graph_reads_the_setting_without_a_break(emulated, tf32):
    arguments, _ = make_conv(2, 9, 32, 16, torch.float32)
    roi = make_roi(1, 2, 32, 16, torch.float32, 3)[0]
    assert roi[7] == STRIDES
    for operator, given in ((ops.dynamic_conv, arguments), (ops.roi_dynamic_conv, roi)):
        compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
        emulated.reset_statistics()
        assert torch.equal(compiled(*given), operator(*given))
        torch._dynamo.reset()
    assert emulated.statistics()["mma"] > 0
