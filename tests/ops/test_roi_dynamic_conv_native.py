"""The kernels of roi_dynamic_conv, forward and backward, against its reference in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import peak_memory
from sparse_rcnn import ops
from sparse_rcnn.ops.shared_gradients import new_grad_cells, share_gradients

STRIDES = (4, 8, 16, 32)
HEIGHT, WIDTH = 96, 128  # of the image, in pixels
HALVES = (torch.bfloat16, torch.float16)
NAMES = ("parameters", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
inf, nan = math.inf, math.nan

SPECIAL_BOXES = {
    "whole image": [0, 0, 128, 96],
    "partly outside": [-60, -30, 90, 50],
    "outside": [400, 400, 500, 520],
    "around the image": [-500, -500, 900, 900],
    "tiny": [20.3, 30.7, 20.4, 30.8],
    "zero width": [40, 50, 40, 90],
    "just below level 1": [0, 0, 111.999, 111.999],
    "on level 1": [0, 0, 112, 112],
    "turned inside out": [100, 90, 30, 20],
    "inverted in x": [100, 20, 30, 90],
    "NaN": [nan, 0, 50, 50],
    "infinite": [-inf, -inf, inf, inf],
    "huge": [-1e30, -1e30, 1e30, 1e30],
}

# B, N, C, D, levels, output_size, sampling_ratio, layout
SMALL_SHAPES = [
    (1, 0, 32, 16, 4, 7, 2, "channels_last"),
    (0, 3, 5, 3, 1, 7, 2, "nchw"),
    (1, 1, 5, 3, 1, 1, 1, "nchw"),
    (1, 1, 5, 7, 4, 7, 2, "channels_last"),
    (2, 3, 5, 16, 4, 3, 2, "sliced"),
    (1, 3, 5, 64, 1, 1, 2, "channels_last"),
    (1, 1, 33, 3, 4, 3, 1, "nchw"),
    (1, 3, 33, 7, 1, 3, 3, "channels_last"),
    (1, 1, 33, 16, 4, 7, 2, "nchw"),
    (2, 1, 33, 64, 2, 1, 2, "sliced"),
    (1, 3, 32, 3, 4, 1, 2, "channels_last"),
    (2, 1, 32, 7, 1, 3, 2, "nchw"),
    (1, 1, 32, 16, 4, 7, 2, "channels_last"),
    (1, 3, 32, 16, 4, 3, 3, "sliced"),
    (1, 1, 32, 64, 4, 7, 2, "nchw"),
    (2, 3, 64, 3, 4, 1, 1, "channels_last"),
    (1, 1, 64, 7, 1, 3, 2, "nchw"),
    (1, 1, 64, 16, 4, 7, 2, "channels_last"),
    (1, 3, 64, 64, 4, 3, 2, "sliced"),
    (1, 1, 96, 3, 1, 1, 2, "nchw"),
    (2, 1, 96, 7, 4, 3, 2, "channels_last"),
    (1, 1, 96, 16, 4, 7, 2, "channels_last"),
    (1, 1, 96, 64, 1, 3, 1, "sliced"),
    (1, 3, 256, 3, 4, 1, 2, "channels_last"),
    (1, 1, 256, 7, 4, 3, 2, "nchw"),
    (1, 1, 256, 16, 1, 3, 2, "channels_last"),
    (1, 1, 256, 64, 4, 7, 2, "channels_last"),
    (1, 2, 256, 64, 4, 3, 2, "sliced"),
    (1, 1, 48, 32, 4, 8, 2, "channels_last"),  # other numbers of bins than the usual 49
    (1, 1, 16, 80, 2, 9, 1, "nchw"),
    (1, 2, 272, 16, 2, 2, 2, "channels_last"),
    (1, 100, 5, 3, 4, 1, 2, "channels_last"),
    (1, 100, 16, 16, 4, 2, 2, "nchw"),
    (1, 300, 5, 3, 4, 1, 1, "channels_last"),
]
LARGE_SHAPES = [
    (1, 3, 96, 16, 4, 7, 2, "channels_last"),
    (1, 100, 33, 7, 4, 7, 2, "nchw"),
    (1, 100, 96, 16, 4, 7, 2, "channels_last"),
    (2, 100, 64, 16, 4, 3, 2, "sliced"),
    (1, 300, 32, 16, 1, 7, 2, "channels_last"),
    (1, 300, 5, 64, 4, 7, 1, "nchw"),
    (2, 3, 256, 64, 4, 7, 2, "channels_last"),
    (2, 300, 256, 64, 4, 7, 2, "channels_last"),
]
SHAPES = [pytest.param(shape, id="-".join(map(str, shape))) for shape in SMALL_SHAPES + LARGE_SHAPES]
TYPED_SHAPES = [
    (1, 1, 5, 3, 1, 1, 1, "nchw"),
    (2, 2, 33, 7, 4, 3, 2, "sliced"),
    (1, 1, 64, 16, 4, 7, 2, "channels_last"),
    (1, 1, 256, 64, 4, 7, 2, "channels_last"),
]


@pytest.fixture(autouse=True)
def only_small_in_the_emulator(request):
    """A large case takes the emulator minutes."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("shape") in LARGE_SHAPES and parameters.get("backend") == "emulated":
        pytest.skip("a large case")


class Arguments:
    """Of one call: ``features`` and ``others`` (parameters, norms) have gradients.

    Values are of the size they have in a trained head. With ``bias`` the norms' outputs lie around plus or minus that,
    far from the kink of the ReLU, where a rounding would send a whole gradient the other way.
    """

    def __init__(self, B, N, C, D, levels, size, samples, layout, dtype=torch.float32, seed=0, bias=0.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def draw_bias(count):
            sign = torch.where(torch.rand(count, generator=generator) < 0.3, -1.0, 1.0)
            sign[0] = 1.0  # some of the hidden values have to be positive
            return sign * bias + 0.2 * draw(count)

        def draw_map(stride):
            H, W = HEIGHT // stride, WIDTH // stride
            if layout == "sliced":  # a window of a larger map, every other column of it
                return draw(B, C, H + 2, 2 * W).to(dtype)[:, :, 1:-1, ::2]
            memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            return draw(B, C, H, W).to(dtype).contiguous(memory_format=memory)

        self.features = [draw_map(stride) for stride in STRIDES[:levels]]
        self.boxes = make_boxes(B, N, generator)
        parameters = torch.cat([draw(B * N, C * D) / C**0.5, draw(B * N, C * D) / D**0.5], dim=1)
        norms = [0.8 + 0.1 * draw(D), draw_bias(D), 0.8 + 0.1 * draw(C), draw_bias(C)]
        self.others = [t.to(dtype) for t in (parameters, *norms)]
        self.grad = (draw(B, N, size**2, C) / max(1, B * N * size**2) ** 0.5).to(dtype)
        self.options = (STRIDES[:levels], size, samples)

    def double(self):
        wide = object.__new__(Arguments)
        wide.features, wide.others = [f.double() for f in self.features], [t.double() for t in self.others]
        wide.boxes, wide.grad, wide.options = self.boxes, self.grad.double(), self.options
        return wide

    def run(self, function):
        return function(self.features, self.boxes, *self.others, *self.options)

    def gradients(self, function):
        """Those of the maps, then those of the other arguments."""
        features, others = ([t.detach().clone().requires_grad_() for t in ts] for ts in (self.features, self.others))
        result = function(features, self.boxes, *others, *self.options)
        return torch.autograd.grad(result, [*features, *others], self.grad)

    def names(self):
        return *(f"features[{level}]" for level in range(len(self.features))), *NAMES


def make_boxes(B, N, generator):
    """Boxes of all levels and shapes, some of which reach out of the image; from 100 on, the special ones are among
    them."""
    centers = torch.rand(B, N, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
    halves = 2 ** (torch.rand(B, N, 2, generator=generator) * 8)
    boxes = torch.cat([centers - halves, centers + halves], dim=-1)
    if N >= 100:
        boxes[:, : len(SPECIAL_BOXES)] = torch.tensor(list(SPECIAL_BOXES.values()))
    return boxes


def assert_as_exact_as_eager(actual, eager, exact, name):
    """The rule for half types: at most twice the error of PyTorch's own operators in the same type."""
    assert actual.dtype == eager.dtype, name
    allowed = 2 * (eager.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= allowed, name


def assert_gradients_close(arguments, actual, expected):
    """Within 1e-5, and in proportion where all are small: each comes from sums of values of the size of the given."""
    given = arguments.grad.double().flatten()
    for name, ours, exact in zip(arguments.names(), actual, expected, strict=True):
        scale = min(1.0, torch.cat([exact.flatten(), given, given.new_zeros(1)]).abs().max().item())
        torch.testing.assert_close(
            ours.double(), exact, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rule", ["detectron2", "mmdet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(backend, shape, rule):
    arguments = Arguments(*shape)
    arguments.options = (*arguments.options, rule)
    actual = arguments.run(ops.roi_dynamic_conv)
    expected = arguments.double().run(ops.roi_dynamic_conv_reference)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape and actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(backend, shape):
    arguments = Arguments(*shape, bias=8.0)
    actual = arguments.gradients(ops.roi_dynamic_conv)
    assert_gradients_close(arguments, actual, arguments.double().gradients(ops.roi_dynamic_conv_reference))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", TYPED_SHAPES)
def test_half_types(backend, shape, dtype):
    arguments = Arguments(*shape, dtype)
    eager, exact = (a.run(ops.roi_dynamic_conv_reference) for a in (arguments, arguments.double()))
    assert_as_exact_as_eager(arguments.run(ops.roi_dynamic_conv), eager, exact, "values")

    arguments = Arguments(*shape, dtype, bias=8.0)
    actual = arguments.gradients(ops.roi_dynamic_conv)
    eager, exact = (a.gradients(ops.roi_dynamic_conv_reference) for a in (arguments, arguments.double()))
    for name, *three in zip(arguments.names(), actual, eager, exact, strict=True):
        assert_as_exact_as_eager(*three, name)


@pytest.mark.parametrize(("box_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shape", TYPED_SHAPES)
def test_float64(backend, shape, box_dtype, tolerance):
    """Coordinates, and with them the weights of the samples, are as exact as the boxes."""
    arguments = Arguments(*shape, torch.float64, bias=8.0)
    arguments.boxes = arguments.boxes.to(box_dtype) + 1e-6  # mostly lost in float32
    expected = arguments.run(ops.roi_dynamic_conv_reference)
    torch.testing.assert_close(arguments.run(ops.roi_dynamic_conv), expected, rtol=tolerance, atol=tolerance)
    actual = arguments.gradients(ops.roi_dynamic_conv)
    for ours, exact in zip(actual, arguments.gradients(ops.roi_dynamic_conv_reference), strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SPECIAL_BOXES)
def test_special_boxes(backend, name):
    arguments = Arguments(1, 2, 33, 7, 4, 7, 2, "channels_last", bias=8.0)
    arguments.boxes[0, 1] = torch.tensor(SPECIAL_BOXES[name])
    expected = arguments.double()
    torch.testing.assert_close(
        arguments.run(ops.roi_dynamic_conv).double(), expected.run(ops.roi_dynamic_conv_reference), rtol=1e-5, atol=1e-5
    )
    actual = arguments.gradients(ops.roi_dynamic_conv)
    assert_gradients_close(arguments, actual, expected.gradients(ops.roi_dynamic_conv_reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_composition_of_the_two_operators(backend, dtype):
    """Pooled features are rounded to their type in both."""
    arguments = Arguments(2, 3, 32, 16, 4, 7, 2, "channels_last", dtype)
    pooled = ops.multiscale_roi_align(arguments.features, arguments.boxes, *arguments.options)
    expected = ops.dynamic_conv(pooled.flatten(0, 1), *arguments.others).view_as(pooled)
    actual = arguments.run(ops.roi_dynamic_conv)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_more_proposals_than_wait_for_the_scatter_at_once(backend):
    """The backward of the CPU goes through large inputs in parts."""
    if backend.name == "emulated":
        pytest.skip("a large case")
    arguments = Arguments(2, 90, 256, 16, 2, 14, 1, "channels_last", bias=8.0)
    assert arguments.grad.nbytes / 2 > 2**24
    actual = arguments.gradients(ops.roi_dynamic_conv)
    assert_gradients_close(arguments, actual, arguments.double().gradients(ops.roi_dynamic_conv_reference))


def test_shared_gradients_of_two_calls(backend):
    """Both add to one buffer, which is the sum of what each gives alone."""
    arguments = Arguments(2, 3, 32, 16, 4, 3, 2, "channels_last", bias=8.0)
    alone = arguments.gradients(ops.roi_dynamic_conv)
    features = [f.clone(memory_format=torch.preserve_format).requires_grad_() for f in arguments.features]
    others = [t.clone().requires_grad_() for t in arguments.others]
    shared = share_gradients(features)
    results = [ops.roi_dynamic_conv(shared, arguments.boxes, *others, *arguments.options) for _ in range(2)]
    grads = torch.autograd.grad(results, [*features, *others], [arguments.grad, arguments.grad])
    for both, one in zip(grads, alone, strict=True):
        torch.testing.assert_close(both, 2 * one, rtol=1e-5, atol=1e-6)


def test_maps_that_need_no_gradient(backend):
    arguments = Arguments(1, 3, 32, 16, 4, 3, 2, "channels_last", bias=8.0)
    full = arguments.gradients(ops.roi_dynamic_conv)
    others = [t.clone().requires_grad_() for t in arguments.others]
    result = ops.roi_dynamic_conv(arguments.features, arguments.boxes, *others, *arguments.options)
    actual = torch.autograd.grad(result, others, arguments.grad)
    for ours, expected in zip(actual, full[4:], strict=True):
        assert torch.equal(ours, expected)


def test_boxes_get_no_gradient(backend):
    arguments = Arguments(1, 2, 5, 3, 2, 3, 2, "nchw")
    arguments.boxes.requires_grad_()
    assert not arguments.run(ops.roi_dynamic_conv).requires_grad


def test_backward_adds_to_what_is_there(backend):
    native = getattr(torch.ops, backend.namespace)
    arguments = Arguments(2, 3, 5, 3, 4, 3, 2, "channels_last", bias=8.0)
    options = (*arguments.options, "detectron2", 1e-5, False, True)
    once = new_grad_cells(arguments.features)
    start = torch.randn_like(once)
    twice = start.clone()
    for cells in (once, twice, twice, once.new_empty(0, 5)):
        native.roi_dynamic_conv_backward(
            arguments.grad, arguments.features, arguments.boxes, *arguments.others, *options, cells
        )
    torch.testing.assert_close(twice, start + 2 * once, rtol=1e-5, atol=1e-5)
    assert once.any()


@pytest.mark.parametrize("seed", range(10))
def test_gradcheck(backend, seed):
    size, levels, (C, D) = 1 + seed % 2, 1 + seed % 3 % 2, [(4, 3), (5, 2), (3, 6)][seed % 3]
    arguments = Arguments(1, 2, C, D, levels, size, 2, "nchw", torch.float64, seed=seed, bias=4.0)
    features = [f[:, :, :4, :6].clone().requires_grad_() for f in arguments.features]
    arguments.boxes[0, 0] = torch.tensor([2.0, 3.0, 14.0, 13.0])
    pooled = ops.multiscale_roi_align_reference(features, arguments.boxes, *arguments.options).flatten(0, 1)
    assert kink_distance(pooled, *arguments.others) > 1e-3, "no kink within gradcheck's step"

    def run(*leaves):
        return ops.roi_dynamic_conv(leaves[:levels], arguments.boxes, *leaves[levels:], *arguments.options)

    assert torch.autograd.gradcheck(run, [*features, *(t.requires_grad_() for t in arguments.others)])


def kink_distance(x, parameters, w1, b1, w2, b2):
    """From zero, of what the two ReLUs are given."""
    (R, _, C), D = x.shape, len(w1)
    first, second = parameters[:, : C * D].view(R, C, D), parameters[:, C * D :].view(R, D, C)
    hidden = torch.layer_norm(x @ first, (D,), w1, b1)
    return min(hidden.abs().min(), torch.layer_norm(hidden.relu() @ second, (C,), w2, b2).abs().min())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    native = getattr(torch.ops, backend.namespace)
    arguments = Arguments(1, 2, 6, 5, 2, 2, 2, "channels_last", bias=8.0)
    features = [f.to(dtype).requires_grad_() for f in arguments.features]
    others = [arguments.others[0].to(dtype), *arguments.others[1:]]
    leaves = [t.clone().requires_grad_() for t in others]
    options = ([4, 8], 2, 2, "detectron2", 1e-5, False)
    torch.library.opcheck(native.roi_dynamic_conv.default, (features, arguments.boxes, *leaves, *options))
    features = [f.detach() for f in features]
    grad, cells = arguments.grad.to(dtype), new_grad_cells(features)
    given = (grad, features, arguments.boxes, *others, *options, True, cells)
    torch.library.opcheck(native.roi_dynamic_conv_backward.default, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(backend, dtype):
    arguments = Arguments(1, 12, 48, 16, 4, 3, 2, "channels_last", dtype)
    arguments.boxes[:, 6:] = arguments.boxes[:, :6] + 1  # more that fall on the same cells
    threads = torch.get_num_threads()
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append([arguments.run(ops.roi_dynamic_conv), *arguments.gradients(ops.roi_dynamic_conv)])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for first, *others in zip(*runs, strict=True):
        assert first.isfinite().all() and all(torch.equal(first, other) for other in others)


def test_no_output_is_left_unwritten(backend):
    """Under deterministic algorithms PyTorch fills new memory with NaN."""
    arguments = Arguments(1, len(SPECIAL_BOXES), 33, 7, 4, 3, 2, "channels_last", bias=8.0)
    arguments.boxes[0] = torch.tensor(list(SPECIAL_BOXES.values()))
    expected = arguments.double()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        values, grads = arguments.run(ops.roi_dynamic_conv), arguments.gradients(ops.roi_dynamic_conv)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(values.double(), expected.run(ops.roi_dynamic_conv_reference), rtol=1e-5, atol=1e-5)
    assert_gradients_close(arguments, grads, expected.gradients(ops.roi_dynamic_conv_reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_forward(dtype):
    """Beside the result, scratch of at most 2 MB a thread: no RoI features."""
    arguments = Arguments(1, 100, 256, 64, 4, 7, 2, "channels_last", dtype)
    with ops.backend("native"), torch.no_grad():
        held = peak_memory(lambda: arguments.run(ops.roi_dynamic_conv), torch.device("cpu"))
    if held is None:
        pytest.skip("the system does not tell its peak")
    norms = 4 * 256 * 4
    assert held <= arguments.grad.nbytes + norms + torch.get_num_threads() * 2**21


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(features=[torch.zeros(1, 6, 4, 4), torch.zeros(1, 5, 2, 2)]), "features"),
        (dict(boxes=torch.zeros(1, 2, 5)), "boxes"),
        (dict(boxes=torch.zeros(1, 3, 4)), "parameters"),
        (dict(parameters=torch.zeros(2, 59)), "parameters"),
        (dict(parameters=torch.zeros(2, 60).double()), "parameters"),
        (dict(norm1_weight=torch.zeros(5, 1)), "norm1_weight"),
        (dict(norm1_bias=torch.zeros(4)), "norm1_bias"),
        (dict(norm2_weight=torch.zeros(6).half()), "norm2_weight"),
        (dict(norm2_bias=torch.zeros(7)), "norm2_bias"),
        (dict(strides=[4]), "strides"),
        (dict(output_size=2), "grad"),
        (dict(level_rule="nearest"), "level_rule"),
        (dict(grad=torch.zeros(1, 2, 9, 5)), "grad"),
        (dict(grad_cells=torch.zeros(19, 6)), "grad_cells"),
    ],
)
def test_a_direct_call_cannot_read_out_of_bounds(backend, wrong, message):
    arguments = dict(
        grad=torch.zeros(1, 2, 9, 6), features=[torch.zeros(1, 6, 4, 4), torch.zeros(1, 6, 2, 2)],
        boxes=torch.zeros(1, 2, 4), parameters=torch.zeros(2, 60), norm1_weight=torch.zeros(5),
        norm1_bias=torch.zeros(5), norm2_weight=torch.zeros(6), norm2_bias=torch.zeros(6), strides=[4, 8],
        output_size=3, sampling_ratio=2, level_rule="detectron2", eps=1e-5, allow_tf32=False, deterministic=True,
        grad_cells=torch.zeros(20, 6),
    )  # fmt: skip
    native = getattr(torch.ops, backend.namespace)
    native.roi_dynamic_conv_backward(**arguments)
    arguments.update(wrong)
    with pytest.raises(RuntimeError, match=message):
        native.roi_dynamic_conv_backward(**arguments)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability):
    """The tests above in a process of its own, with the kernels that another processor would get."""
    if ops._library.serving("roi_dynamic_conv", "cpu") != "native":
        pytest.skip("no native library")
    chosen = "(gradients or half_types or float64 or special) and not emulated and not -100- and not -300-"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__))]
    done = subprocess.run(
        command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
