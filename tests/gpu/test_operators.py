"""Every operator's CUDA kernels on a GPU, against the float64 reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from sparse_rcnn import ops
from sparse_rcnn.ops import _library
from sparse_rcnn.self_test import Specification, leaves, make_problem, steady_norm, tensors_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITH_BACKWARD = [name for name in _library.operators() if make_problem(name, 0, torch.float32, CPU).wrt]


def test_every_operator_is_served_by_a_kernel():
    """So that none of the tests below passes by its reference."""
    served = {operator: _library.serving(operator, "cuda") for operator in _library.operators()}
    assert set(served.values()) <= {"native", "triton"}, served


def move(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    return type(value)(move(item, device) for item in value) if isinstance(value, list | tuple) else value


def on_gpu(operator):
    """The operator on the GPU, for arguments and results on the CPU; gradients find the same way back."""
    return lambda **inputs: move(getattr(ops, operator)(**move(inputs, CUDA)), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4), ids=lambda seed: f"seed{seed}")
@pytest.mark.parametrize("operator", _library.operators())
def test_values_and_gradients(operator, seed, dtype):
    problem = make_problem(operator, seed, dtype, CPU)
    reference = getattr(ops, f"{operator}_reference")
    record = Specification(reference, problem.inputs, problem.wrt, problem.keep).compare(on_gpu(operator))
    assert record["passed"], record


def sized_inputs(proposals, channels, inner, levels, dtype):
    """Arguments of roi_dynamic_conv, whose parts the other two operators take; boxes of all sizes."""
    generator = torch.Generator().manual_seed(proposals)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    strides = (4, 8, 16, 32)[:levels]
    names = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
    norms = [tensor.to(dtype) for size in (inner, channels) for tensor in steady_norm(size, generator)]
    centers = torch.rand(2, proposals, 2, generator=generator) * 300
    halves = 2 ** (torch.rand(2, proposals, 2, generator=generator) * 8)
    return {
        "features": [random(2, channels, 320 // stride, 288 // stride) for stride in strides],
        "boxes": torch.cat([centers - halves, centers + halves], dim=-1),
        "parameters": random(2 * proposals, 2 * channels * inner, scale=channels**-0.5),
        **dict(zip(names, norms, strict=True)),
        "strides": strides,
    }


SIZES = [(0, 256, 64, 4), (1, 256, 64, 1), (3, 32, 16, 4), (100, 64, 64, 4), (100, 256, 16, 1), (300, 256, 64, 4)]
SIZES += [(3, 20, 12, 4), (1, 512, 128, 4)]  # what the tensor-core kernels do not take


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("operator", ("multiscale_roi_align", "dynamic_conv", "roi_dynamic_conv"))
def test_sizes(operator, sizes, dtype):
    inputs, wrt, keep = sized_problem(operator, sizes, dtype)
    record = Specification(getattr(ops, f"{operator}_reference"), inputs, wrt, keep).compare(on_gpu(operator))
    assert record["passed"], record


@pytest.mark.parametrize("sizes", SIZES[2:6], ids=str)
@pytest.mark.parametrize("operator", ("dynamic_conv", "roi_dynamic_conv"))
def test_tf32(operator, sizes, monkeypatch):
    """As exact as PyTorch's own operators with the same setting, and not what they give without."""
    inputs, wrt, keep = sized_problem(operator, sizes, torch.float32)
    exact = on_gpu(operator)(**inputs)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert not torch.equal(on_gpu(operator)(**inputs), exact)
    record = Specification(on_gpu(f"{operator}_reference"), inputs, wrt, keep).compare(on_gpu(operator))
    assert record["passed"], record


def sized_problem(operator, sizes, dtype):
    """The operator's arguments, those that get gradients, and those that stay as they are in float64."""
    inputs = sized_inputs(*sizes, dtype)
    if operator == "multiscale_roi_align":
        inputs, wrt, keep = {name: inputs[name] for name in ("features", "boxes", "strides")}, ["features"], ["boxes"]
    elif operator == "roi_dynamic_conv":
        wrt, keep = ["features", "parameters", "norm1_weight", "norm2_bias"], ["boxes"]
    else:
        del inputs["features"], inputs["boxes"], inputs["strides"]
        rois, channels = inputs["parameters"].shape[0], inputs["norm2_weight"].shape[0]
        values = torch.randn(rois, 49, channels, generator=torch.Generator().manual_seed(1))
        inputs["roi_features"] = values.to(dtype)
        wrt, keep = ["roi_features", "parameters", "norm1_weight", "norm2_bias"], []
    return inputs, wrt, keep


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", WITH_BACKWARD)
def test_deterministic_gradients_are_equal_in_every_bit(operator, dtype):
    problem = make_problem(operator, 1, dtype, CUDA)
    inputs, wanted = leaves(problem.inputs, problem.wrt)
    if "boxes" in problem.keep:  # all of them on the same cells
        inputs["boxes"] = torch.tensor([10.0, 10.0, 110.0, 90.0], device=CUDA) + torch.arange(14.0, device=CUDA).view(
            2, 7, 1
        )
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(5):
            outputs = list(tensors_in(getattr(ops, operator)(**inputs)))
            results.append([*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])])
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(tensor.abs().max() > 0 for tensor in results[0][len(outputs) :])
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ("multiscale_roi_align", "roi_dynamic_conv"))
def test_deterministic_gradients_are_right(operator, dtype):
    problem = make_problem(operator, 1, dtype, CPU)
    specification = Specification(getattr(ops, f"{operator}_reference"), problem.inputs, problem.wrt, problem.keep)
    torch.use_deterministic_algorithms(True)
    try:
        record = specification.compare(on_gpu(operator))
    finally:
        torch.use_deterministic_algorithms(False)
    assert record["passed"], record


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", _library.operators())
def test_forward_in_a_cuda_graph(operator, dtype):
    op = getattr(ops, operator)
    inputs = make_problem(operator, 1, dtype, CUDA).inputs
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            op(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = op(**inputs)
        # Other numbers in the same memory: the replay must read them, boxes and levels included.
        for old, new in zip(tensors_in(inputs), tensors_in(make_problem(operator, 3, dtype, CUDA).inputs), strict=True):
            old.copy_(new)
        graph.replay()
        expected = op(**inputs)
        torch.cuda.synchronize()
    for actual, wanted in zip(tensors_in(captured), tensors_in(expected), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("operator", _library.operators())
def test_work_is_queued_on_the_current_stream(operator):
    op = getattr(ops, operator)
    source = make_problem(operator, 1, torch.float32, CUDA).inputs
    expected = op(**source)
    inputs = move(make_problem(operator, 3, torch.float32, CPU).inputs, CUDA)  # other numbers, until the copies below
    op(**inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for target, value in zip(tensors_in(inputs), tensors_in(source), strict=True):
            target.copy_(value)
        actual = op(**inputs)
    torch.cuda.synchronize()
    for got, wanted in zip(tensors_in(actual), tensors_in(expected), strict=True):
        assert torch.equal(got, wanted)


def test_no_host_wait_in_the_forward():
    inputs = {name: make_problem(name, 1, torch.bfloat16, CUDA).inputs for name in _library.operators()}
    for name, arguments in inputs.items():
        getattr(ops, name)(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, arguments in inputs.items():
            getattr(ops, name)(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_maps_of_more_elements_than_an_int_counts():
    H, W, C, rows = 8224, 1024, 256, 64
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    assert H * W * C > 2**31
    small = torch.randn(1, C, rows, W, generator=torch.Generator().manual_seed(0)).bfloat16()
    large = torch.zeros(1, H, W, C, dtype=torch.bfloat16, device=CUDA).permute(0, 3, 1, 2)  # channels_last
    large[:, :, -rows:] = small.to(CUDA)
    # Bins of four cells: coordinates that float32 has exactly, in the large map as in the crop.
    box = torch.tensor([[[1024.0, 64.0, 1136.0, 176.0], [3968.0, 96.0, 4080.0, 208.0]]])
    expected = ops.multiscale_roi_align_reference([small.double()], box, (4,))
    box[..., 1::2] += 4 * (H - rows)
    actual = ops.multiscale_roi_align([large], box.to(CUDA), (4,)).cpu()
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-6)
