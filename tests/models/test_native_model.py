"""The whole detector on the native kernels, and on the CUDA kernels run on the CPU, against the references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from sparse_rcnn import SparseRCNN, SparseRCNNConfig, ops
from sparse_rcnn.data.synthetic import make_scene
from sparse_rcnn.models.dynamic_head import DynamicHead
from sparse_rcnn.runtime import default_weights

STRIDES = (4, 8, 16, 32)


@pytest.fixture(params=["native", "emulated"])
def backend(request: pytest.FixtureRequest) -> str:
    """The CPU kernels, then the CUDA kernels run on the CPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
    return request.param


@pytest.fixture
def head() -> Callable[[], tuple[DynamicHead, list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Makes a head with its inputs: dimensions that the tensor-core kernels serve."""

    def make(stages: int = 3, seed: int = 3) -> tuple[DynamicHead, list[torch.Tensor], torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        config = SparseRCNNConfig(
            num_classes=4, num_proposals=6, num_stages=stages, hidden_dim=32, num_heads=4, dim_dynamic=16,
            dim_feedforward=64,
        )  # fmt: skip
        head = DynamicHead(config, STRIDES)
        # Smooth maps: on noise, a box that is off by a rounding error reads something else.
        coarse = torch.randn(2, 32, 4, 3)
        features = [F.interpolate(coarse, (256 // s, 192 // s), mode="bilinear").requires_grad_() for s in STRIDES]
        corner = torch.rand(2, 6, 2) * torch.tensor([150.0, 200.0])
        boxes = torch.cat([corner, corner + 4 + torch.rand(2, 6, 2) * 180], dim=-1)
        return head, features, boxes, torch.randn(2, 6, 32).requires_grad_()

    return make


def _step(head: DynamicHead, features: list, boxes: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits, refined = head(features, boxes, x)
    weight = torch.randn(logits.shape, generator=generator)
    ((logits * weight).sum() + refined.mul(1e-3).sin().sum()).backward()
    grads = {f"features{i}": feature.grad for i, feature in enumerate(features)} | {"x": x.grad}
    grads |= {name: parameter.grad for name, parameter in head.named_parameters()}
    return {"logits": logits.detach(), "boxes": refined.detach()} | grads


def _assert_close(name: str, got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> None:
    """``atol`` is of the largest entry, where that is over 1."""
    scale = want.abs().max().clamp(min=1)
    torch.testing.assert_close(got / scale, want / scale, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def test_head_and_all_its_gradients_equal_the_reference(backend: str, head: Callable) -> None:
    with ops.backend(backend):
        got = _step(*head())
    with ops.backend("reference"):
        want = _step(*head())
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().clamp(min=1)
        torch.testing.assert_close(
            got[name] / scale, want[name] / scale, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradient_of_the_maps_is_the_same_with_and_without_sharing(
    backend: str, head: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ops.backend(backend):
        shared = _step(*head())
        monkeypatch.setattr(ops, "share_gradients", lambda features: features)
        separate = _step(*head())
    for name in shared:
        scale = separate[name].abs().max().clamp(min=1)
        torch.testing.assert_close(
            shared[name] / scale,
            separate[name] / scale,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_training_step_is_bit_equal_when_it_must_be(backend: str, head: Callable) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with ops.backend(backend):
            first, second = _step(*head()), _step(*head())
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_trained_detector_finds_the_same(backend: str) -> None:
    model = SparseRCNN.from_pretrained(default_weights()).eval()
    images = [torch.from_numpy(make_scene(seed)[0]).permute(2, 0, 1) for seed in (11, 12)]
    with torch.inference_mode():
        with ops.backend(backend):
            got = model(images, return_stages=True)
        with ops.backend("reference"):
            want = model(images, return_stages=True)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.boxes, want.boxes, rtol=0, atol=5e-3)
    for ours, theirs in zip(got.detections, want.detections, strict=True):
        assert len(theirs["scores"]) > 0
        assert torch.equal(ours["labels"], theirs["labels"])


def _assert_as_near(run: Callable[[str, int, bool], dict[str, torch.Tensor]], backend: str) -> None:
    """Our rounding error is eager's, on average over the results of many heads; one result's share of it is chance."""
    logs = []
    for seed in range(8):
        exact, ours, eager = run("reference", seed, True), run(backend, seed, False), run("reference", seed, False)
        for name in exact:
            if exact[name].norm() > 0:
                errors = [(got[name].double() - exact[name]).norm() for got in (ours, eager)]
                logs.append((errors[0] / errors[1]).log())
    assert torch.stack(logs).mean().exp() <= 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_reference(backend: str, head: Callable, dtype: torch.dtype) -> None:
    def run(name: str, seed: int, exact: bool) -> dict[str, torch.Tensor]:
        kind = torch.float64 if exact else dtype
        module, features, boxes, x = head(1, seed)
        features = [feature.detach().to(kind).requires_grad_() for feature in features]
        with ops.backend(name):
            return _step(module.to(kind), features, boxes, x.detach().to(kind).requires_grad_())

    _assert_as_near(run, backend)


def test_autocast_is_as_near_as_the_reference(backend: str, head: Callable) -> None:
    def run(name: str, seed: int, exact: bool) -> dict[str, torch.Tensor]:
        module, features, boxes, x = head(1, seed)
        # The pyramid comes from convolutions, whose results are bfloat16 under autocast.
        kind = torch.float64 if exact else torch.bfloat16
        features = [feature.detach().bfloat16().to(kind).requires_grad_() for feature in features]
        if exact:
            module, x = module.double(), x.detach().double().requires_grad_()
        with ops.backend(name), torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            result = _step(module, features, boxes, x)
        assert exact or result["boxes"].dtype == torch.float32
        return result

    _assert_as_near(run, backend)
