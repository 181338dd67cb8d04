"""The optimized detector on a GPU: captured programs against the detector on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from sparse_rcnn.inference.buckets import Inputs, Key
from sparse_rcnn.inference.linear import Fp8
from tests.inference.test_optimized import VARIANTS, assert_equal_detections, make_images, make_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
    pytest.mark.usefixtures("exact_float32"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def on_cpu(results):
    return [{name: values.cpu() for name, values in result.items()} for result in results]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.inference_mode()
def test_float32_equals_the_detector_on_the_cpu(changes):
    model, images = make_model(**changes), make_images((50, 64), (40, 90))
    optimized = model.optimize(CUDA, torch.float32, batch_size=2)
    assert optimized.report()["backbone"] == "fused"
    want = model(images, return_stages=True)
    got = optimized(images, return_stages=True)
    torch.testing.assert_close(got.logits.cpu(), want.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(got.boxes.cpu(), want.boxes, rtol=2e-5, atol=0.02)
    found = optimized(images)
    assert all(values.is_cuda for result in found for values in result.values())
    assert_equal_detections(on_cpu(found), want.detections, atol=0.02)
    assert optimized.report()["batches_without_bucket"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_half_types_are_as_near_to_float64_as_autocast(dtype):
    ours, eager = [], []
    for proposals in (8, 12, 16, 20):
        model, images = make_model(num_proposals=proposals, num_stages=2), make_images((64, 96))
        exact = copy.deepcopy(model).double()(images, return_stages=True)
        found = model.optimize(CUDA, dtype)(images, return_stages=True)
        with torch.autocast("cuda", dtype):
            rounded = copy.deepcopy(model).to(CUDA)([image.to(CUDA) for image in images], return_stages=True)
        for errors, outputs in ((ours, found), (eager, rounded)):
            pairs = [(getattr(outputs, name).cpu(), getattr(exact, name)) for name in ("logits", "boxes")]
            errors.append([float((got - want).norm()) for got, want in pairs])
    ours, eager = torch.tensor(ours).log().mean(0).exp(), torch.tensor(eager).log().mean(0).exp()
    assert (ours <= 2 * eager).all(), (ours, eager)


@torch.inference_mode()
def test_replays_of_many_shapes_share_their_memory():
    model = make_model()
    optimized, plain = model.optimize(CUDA, torch.float32, batch_size=4), model.optimize(CPU)
    batches = [[(40, 60)] * 3, [(64, 128)], [(40, 60)] * 4, [(30, 30), (200, 90)], [(64, 128)], [(40, 60)] * 2]
    for _ in range(2):
        for index, sizes in enumerate(batches):
            images = make_images(*sizes)
            images = [image.roll(index, -1) for image in images]
            assert_equal_detections(on_cpu(optimized(images)), plain(images), atol=0.02)
    assert [tuple(b.values()) for b in optimized.report()["buckets"]] == [
        *((4, 64, 64, 4), (1, 64, 128, 4), (2, 224, 96, 2), (2, 64, 64, 2)),
    ]


@torch.inference_mode()
def test_images_are_resized_on_the_gpu_and_large_ones_before():
    model = make_model()
    optimized, plain = model.optimize(CUDA, torch.float32, batch_size=2), model.optimize(CPU)
    images, sizes = make_images((100, 130), (150, 190)), [(60, 78), (50, 64)]
    assert images[1].numel() < Key(2, 64, 96).capacity
    for given in (images, [image.to(CUDA) for image in images]):
        assert_equal_detections(optimized.detect(given, sizes), plain.detect(images, sizes), atol=0.02)
    images, sizes = make_images((300, 390)), [(60, 78)]
    assert images[0].numel() > Key(1, 64, 96).capacity
    assert_equal_detections(optimized.detect(images, sizes), plain.detect(images, sizes), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_the_program_waits_for_nothing(dtype):
    program = make_model().optimize(CUDA, dtype)._program
    inputs = Inputs.blank(Key(2, 64, 96), CUDA)
    inputs.fill(make_images((50, 70)), [(50, 70, 50, 70)])
    program(*inputs, (64, 96))  # lazily loaded kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = program(*inputs, (64, 96))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.counts.tolist()[0] > 0 and found.counts.tolist()[1] == 0


def test_bfloat16_is_the_type_of_a_gpu_that_has_it():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert make_model().optimize(CUDA).dtype == expected


@torch.inference_mode()
def test_changed_weights_are_not_used_in_ignorance():
    model, images = make_model().to(CUDA), make_images((40, 60))
    optimized = model.optimize()
    optimized(images)
    model.head.stages[0].linear1.weight = torch.nn.Parameter(model.head.stages[0].linear1.weight * 2)
    with pytest.raises(RuntimeError, match="changed since"):
        optimized(images)


@torch.inference_mode()
def test_memory_of_a_thousand_replays_stays():
    optimized, images = make_model().optimize(CUDA), make_images((64, 64))
    optimized(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(1000):
        optimized(images)
    assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.inference_mode()
def test_fp8_is_what_the_cpu_imitates(dtype):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit matrix product")
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in [(300, 512), (64, 512), (64,)])
    for b in (None, bias.to(dtype)):
        found = Fp8(weight.to(CUDA), None if b is None else b.to(CUDA))(x.to(CUDA, dtype))
        assert found.dtype == dtype
        # The GPU's result is bfloat16 in between, and its bias too.
        torch.testing.assert_close(found.cpu().float(), Fp8(weight, b)(x.to(dtype)).float(), rtol=2**-7, atol=0.05)


@pytest.mark.parametrize(
    "options", [{"out_layer_rank": 32}, {"fp8": True}, {"out_layer_rank": 16, "fp8": True}], ids=str
)
@torch.inference_mode()
def test_compressed_layers_are_captured(options):
    if options.get("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit matrix product")
    model, images = make_model(), make_images((50, 64), (40, 90))
    optimized = model.optimize(CUDA, torch.bfloat16, batch_size=2, **options)
    imitated = model.optimize(CPU, torch.float32, **options)(images, return_stages=True)
    found = optimized(images, return_stages=True)
    error = (found.logits.cpu() - imitated.logits).abs().mean((1, 2, 3)) / imitated.logits.std()
    assert (error < 0.1).all(), error
    assert len(optimized(images)) == 2 and optimized.report()["batches_without_bucket"] == 0
