"""The optimized detector against the detector, for every backbone and configuration."""

from __future__ import annotations

import copy
import warnings
import weakref

import pytest
import torch

from sparse_rcnn import SparseRCNN, SparseRCNNConfig, onednn, ops
from sparse_rcnn.data.transforms import resize
from sparse_rcnn.inference import OptimizedSparseRCNN, StaleWeightsError
from sparse_rcnn.inference.optimized import resolve_dtype
from sparse_rcnn.models.config import MMDET_DELTA_CLAMP

CPU = torch.device("cpu")
SMALL = {
    **{"backbone": "resnet18", "num_classes": 5, "num_proposals": 12, "num_stages": 3, "hidden_dim": 32},
    **{"num_heads": 4, "dim_dynamic": 16, "dim_feedforward": 64, "proposal_init": "grid"},
}
VARIANTS = {
    "as published": {},
    "no attention": {"self_attention": False},
    "concat": {"interaction": "concat"},
    "plain": {"interaction": "plain"},
    "softmax": {"classification": "softmax"},
    "mmdet": {"level_rule": "mmdet", "delta_clamp": MMDET_DELTA_CLAMP},
    "one stage": {"num_stages": 1},
    "deep towers": {"num_cls_layers": 2, "num_reg_layers": 0, "pooler_resolution": 5, "sampling_ratio": 1},
    "other pixels": {"pixel_mean": (1.0, 2.0, 3.0), "pixel_std": (40.0, 50.0, 60.0)},
    "resnet50": {"backbone": "resnet50"},
    "efficientnet_lite0": {"backbone": "efficientnet_lite0"},
    "mobilenetv3": {"backbone": "mobilenetv3_small_050"},
    "regnet": {"backbone": "regnety_002"},
    "convnext": {"backbone": "convnext_atto"},
}


def make_model(**changes) -> SparseRCNN:
    """A small detector with norms that do something and a pyramid smooth enough for boxes that differ by rounding."""
    torch.manual_seed(0)
    model = SparseRCNN(SparseRCNNConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for module in model.backbone.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
    return model


def make_images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Smooth uint8 images."""
    generator = torch.Generator().manual_seed(1)
    coarse = [torch.rand(1, 3, 5, 6, generator=generator) * 255 for _ in sizes]
    return [
        torch.nn.functional.interpolate(c, size, mode="bilinear")[0].to(torch.uint8)
        for c, size in zip(coarse, sizes, strict=True)
    ]


def assert_equal_detections(found, expected, atol=2e-3):
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.keys() == want.keys()
        torch.testing.assert_close(got["scores"], want["scores"], rtol=0, atol=1e-5)
        torch.testing.assert_close(got["boxes"], want["boxes"], rtol=2e-5 if atol else 0, atol=atol)
        assert torch.equal(got["labels"], want["labels"])
        assert torch.equal(got["proposals"], want["proposals"])


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.inference_mode()
def test_equals_the_detector(changes):
    model, images = make_model(**changes), make_images((50, 64), (40, 90))
    with ops.backend("reference"):
        want = model(images, return_stages=True)
    optimized = model.optimize()
    assert optimized.report()["backbone"] == "fused"
    got = optimized(images, return_stages=True)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-4)
    # Rounding leaves single boxes up to 4e-3 from those in float64, and the reference's up to 3e-3.
    torch.testing.assert_close(got.boxes, want.boxes, rtol=2e-5, atol=1e-2)
    with ops.backend("reference"):
        exact = copy.deepcopy(model).double()(images, return_stages=True)
    errors = [(found.boxes - exact.boxes).abs().mean() for found in (got, want)]
    assert errors[0] <= 4 * errors[1]
    torch.testing.assert_close(got.proposal_boxes, want.proposal_boxes)
    assert any(len(found["scores"]) > 0 for found in want.detections)
    assert_equal_detections(got.detections, want.detections, atol=1e-2)
    assert_equal_detections(optimized(images), want.detections, atol=1e-2)


@torch.inference_mode()
def test_leaves_the_detector_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    images = make_images((50, 64))
    expected = model(images)
    model.backbone.body.layer1.train()
    modes = [part.training for part in model.modules()]
    optimized = model.optimize()
    assert [part.training for part in model.modules()] == modes
    model.eval()
    optimized(images)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_equal_detections(model(images), expected, atol=0)


@torch.inference_mode()
def test_floating_images(model):
    images = [image / 255 for image in make_images((50, 64), (40, 90))]
    assert_equal_detections(model.optimize()(images), model(images))


@pytest.mark.parametrize("sizes", [[(1, 1)], [(31, 200), (200, 31)], [(32, 64)], [(33, 1)]], ids=str)
@torch.inference_mode()
def test_sizes_of_all_kinds(model, sizes):
    images = make_images(*sizes)
    assert_equal_detections(model.optimize()(images), model(images))


@torch.inference_mode()
def test_images_are_resized_and_boxes_scaled_back(model):
    images, sizes = make_images((100, 130), (30, 200)), [(60, 78), (24, 160)]
    found = model.optimize().detect(images, sizes)
    seen = model([resize(image, size) for image, size in zip(images, sizes, strict=True)])
    for image, (height, width), result in zip(images, sizes, seen, strict=True):
        scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
        result["boxes"] = result["boxes"] * scale
    assert_equal_detections(found, seen, atol=5e-3)
    assert any((result["boxes"].amax(0)[2:] > torch.tensor([78.0, 60.0])).any() for result in found)


def test_images_may_be_views(model):
    image = make_images((40, 60))[0]
    rows = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    optimized = model.optimize()
    assert_equal_detections(optimized([rows]), optimized([image]), atol=0)


@torch.inference_mode()
def test_results_do_not_depend_on_the_batch(model):
    optimized, images = model.optimize(), make_images(*[(40, 60)] * 5)
    alone = [optimized([image])[0] for image in images]
    assert_equal_detections(optimized(images), alone)
    assert_equal_detections(optimized(images[::-1]), alone[::-1])


@torch.inference_mode()
def test_padding_is_that_of_the_batch(model):
    """A larger neighbour pads an image further, which changes what is found in it; here as in the detector."""
    images = make_images((40, 60), (40, 128))
    optimized = model.optimize()
    together, alone = optimized(images)[0], optimized(images[:1])[0]
    count = min(len(together["scores"]), len(alone["scores"]))
    assert not torch.allclose(together["scores"][:count], alone["scores"][:count], atol=1e-4)
    assert_equal_detections([together], model(images)[:1])


@pytest.mark.parametrize(
    ("images", "error"),
    [
        ([], ValueError),
        ([torch.zeros(1, 4, 4, dtype=torch.uint8)], ValueError),
        ([torch.zeros(3, 0, 4, dtype=torch.uint8)], ValueError),
        ([torch.zeros(3, 4, 4, dtype=torch.int64)], TypeError),
        (["a.jpg"], TypeError),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ValueError),
    ],
    ids=str,
)
def test_bad_images_are_refused_as_by_the_detector(model, images, error):
    optimized = model.optimize()
    with pytest.raises(error, match="^images") as ours:
        optimized(images)
    with pytest.raises(error) as theirs:
        model(images)
    assert str(ours.value) == str(theirs.value)


def in_place(model):
    with torch.no_grad():
        model.head.stages[0].linear1.weight.mul_(2)


def statistics(model):
    model.backbone.body.bn1.running_mean.add_(1)


def assigned(model):
    model.head.stages[2].class_logits.bias = torch.nn.Parameter(torch.zeros(5))


def data(model):
    model.init_proposal_boxes.weight.data = torch.zeros_like(model.init_proposal_boxes.weight)


def replaced(model):
    model.head.stages[1].norm1 = torch.nn.LayerNorm(32)


def loaded(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def converted(model):
    model.bfloat16()


@pytest.mark.parametrize(
    "change", [in_place, statistics, assigned, data, replaced, loaded, converted], ids=lambda change: change.__name__
)
def test_changed_weights_are_not_used_in_ignorance(change):
    model, images = make_model(), make_images((40, 60))
    optimized = model.optimize()
    optimized(images)
    assert not optimized.is_stale()
    change(model)
    assert optimized.is_stale()
    for call in (lambda: optimized(images), lambda: optimized(images, return_stages=True)):
        with pytest.raises(StaleWeightsError, match=r"changed since optimize\(\)"):
            call()
    assert not model.optimize().is_stale()


@torch.inference_mode()
def test_the_detector_is_not_kept():
    """Its backbone's weights, which are folded into others, go with it."""
    model, images = make_model(), make_images((40, 60))
    expected, backbone = model(images), weakref.ref(model.backbone)
    optimized = model.optimize()
    del model
    assert backbone() is None
    assert not optimized.is_stale()
    assert_equal_detections(optimized(images), expected)
    assert_equal_detections(optimized(images, return_stages=True).detections, expected)


@torch.inference_mode()
def test_memory_is_given_back_once_a_shape(model, monkeypatch):
    given_back = []
    optimized, plain = model.optimize(), model.optimize(keep_memory=False)
    small, large = make_images((40, 60)), make_images((64, 96))
    monkeypatch.setattr("sparse_rcnn.inference.optimized.give_freed_memory_back", lambda: given_back.append(1))
    counts = []
    for images in (small, small, large, small * 2, large, small * 2):
        optimized(images)
        counts.append(len(given_back))
    assert counts == [1, 1, 2, 3, 3, 3]
    plain(small)
    assert len(given_back) == 3


@torch.inference_mode()
def test_the_backbone_compiled(model, monkeypatch):
    """By the compiler's own tracing; what it makes of the graph then is the compiler's business, and takes minutes."""
    graphs, images = [], make_images((50, 64), (40, 90))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile(module, **options):
        assert options == {"dynamic": False, "options": {"freezing": True}}
        return torch._dynamo.optimize(backend, dynamic=False)(module)

    monkeypatch.setattr(torch, "compile", compile)
    optimized = model.optimize(compile=True)
    assert optimized.report()["backbone"] == "fused, compiled"
    assert_equal_detections(optimized(images), model(images))
    assert len(graphs) == 1
    assert all(not module.onednn for module in optimized._program.backbone.modules() if hasattr(module, "onednn"))


def test_weights_made_in_inference_mode_are_taken():
    with torch.inference_mode():
        model = make_model()
    optimized = model.optimize()
    optimized(make_images((40, 60)))
    assert not optimized.is_stale()


@torch.inference_mode()
def test_bfloat16_is_as_near_as_autocast():
    """Errors against float64, over several detectors' stages, at most twice those of the detector under autocast."""
    if not onednn.cpu_has(torch.bfloat16):
        pytest.skip("this processor has no bfloat16")
    ours, eager = [], []
    for proposals in (8, 12, 16, 20):
        model, images = make_model(num_proposals=proposals, num_stages=2), make_images((64, 96))
        exact = copy.deepcopy(model).double()(images, return_stages=True)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images, return_stages=True)
        optimized = model.optimize(dtype=torch.bfloat16)
        assert optimized.report()["dtype"] == "bfloat16"
        found = optimized(images, return_stages=True)
        assert found.boxes.dtype == found.logits.dtype == torch.float32
        for errors, outputs in ((ours, found), (eager, rounded)):
            errors.append([float((getattr(outputs, n) - getattr(exact, n)).norm()) for n in ("logits", "boxes")])
    ours, eager = torch.tensor(ours), torch.tensor(eager)
    assert (ours > 0).all()
    assert (ours.log().mean(0).exp() <= 2 * eager.log().mean(0).exp()).all(), (ours, eager)


def test_a_half_type_that_the_processor_lacks_becomes_float32(model, monkeypatch):
    monkeypatch.setattr("sparse_rcnn.inference.optimized.cpu_has", lambda dtype: dtype == torch.float32)
    with pytest.warns(UserWarning, match="no instructions for bfloat16: computing in float32"):
        optimized = model.optimize(dtype=torch.bfloat16)
    assert optimized.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_dtype(CPU, torch.float32) == resolve_dtype(CPU, None) == torch.float32


@torch.inference_mode()
def test_without_onednn_the_ordinary_operators_serve(model, monkeypatch):
    for module in ("inference.convolution", "onednn"):
        monkeypatch.setattr(f"sparse_rcnn.{module}.has_onednn", lambda dtype: False)
    images = make_images((50, 64), (40, 90))
    called = []
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda *a, f=torch.nn.functional.conv2d: called.append(1) or f(*a)
    )
    optimized = model.optimize()
    assert called
    assert_equal_detections(optimized(images), model(images))
    layer, given = optimized._program.head.proposals[0].dynamic_layer, model.head.stages[1].inst_interact.dynamic_layer
    assert layer.weight.data_ptr() == given.weight.data_ptr()  # of the right type and in the right order: shared


@pytest.mark.skipif(not onednn.has_onednn(torch.float32), reason="oneDNN's fused operators are not in this build")
def test_weights_are_in_the_order_of_onednn(model):
    head = model.optimize()._program.head
    assert all(own.in_proj[0].is_mkldnn and own.dynamic_layer.weight.is_mkldnn for own in head.proposals)
    assert all(stage.out_layer.weight.is_mkldnn and stage.linear1[0].is_mkldnn for stage in head.stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        OptimizedSparseRCNN(model, **options)


def test_report_is_plain(model):
    assert model.optimize().report() == {
        **{"device": "cpu", "dtype": "float32", "backbone": "fused", "batch_size": 1},
        **{"out_layer_rank": None, "fp8": False, "buckets": [], "batches_without_bucket": 0},
    }


def test_a_backbone_that_cannot_be_traced_runs_as_it_is(model):
    class Odd(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images if images.sum() > 0 else -images)

    odd, images = make_model(), make_images((40, 60))
    odd.backbone = Odd(odd.backbone)
    optimized = odd.optimize()
    assert optimized.report()["backbone"].startswith("not fused (TraceError: ")
    with torch.inference_mode():
        assert_equal_detections(optimized(images), odd(images))


def test_a_fused_backbone_that_computes_something_else_is_not_used(model, monkeypatch):
    monkeypatch.setattr("sparse_rcnn.inference.optimized._difference", lambda *arguments: 0.5)
    assert model.optimize().report()["backbone"] == "not fused (fused it differs by 0.5)"


def test_memory_stays_where_it_is(model):
    """Ten thousand inferences were measured to leave under 5 MB; here fewer."""
    # With keep_memory, what earlier tests left free would be given back, and return to this process bit by bit.
    optimized, images = model.optimize(keep_memory=False), make_images((32, 32))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(100):
        optimized(images)
    before = resident()
    for _ in range(200):
        optimized(images)
    assert resident() - before < 1e6
