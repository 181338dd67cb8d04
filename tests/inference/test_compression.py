"""The inexact forms of the head's heavy layers: what they compute, and how far that is from the exact ones."""

from __future__ import annotations

import importlib

import pytest
import torch

from sparse_rcnn import onednn
from sparse_rcnn.inference.buckets import Inputs, Key
from sparse_rcnn.inference.linear import FP8, Fp8, check_compression, low_rank, quantize
from tests.host_reads import forbid_host_reads
from tests.inference.test_optimized import make_images, make_model

CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("rank", [1, 5, 23, 24])
def test_low_rank_is_the_nearest_of_its_rank(rank):
    """Eckart-Young: what is left has the other singular values."""
    weight = random(24, 96)
    up, down = low_rank(weight, rank)
    assert (up.shape, down.shape) == ((24, rank), (rank, 96))
    error = torch.linalg.norm(weight.double() - up.double() @ down.double())
    expected = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_full_rank_is_exact_and_more_is_nearer(model):
    images = make_images((50, 64), (40, 90))
    exact = model.optimize()(images, return_stages=True)
    errors = []
    for rank in (4, 16, 32):
        optimized = model.optimize(out_layer_rank=rank)
        assert optimized.report()["out_layer_rank"] == rank
        found = optimized(images, return_stages=True)
        errors.append((found.logits - exact.logits).abs())
    torch.testing.assert_close(found.logits, exact.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes, exact.boxes, rtol=2e-5, atol=2e-3)
    assert errors[0].mean() > 1.5 * errors[1].mean() > 100 * errors[2].mean()


def test_quantized_values_are_within_half_a_step():
    x = random(40, 300) * torch.logspace(-12, 12, 40)[:, None]
    x[3], x[4, 0], x[5, 1:] = 0, 1e4, 0
    rows, scales = quantize(x)
    assert rows.dtype == FP8 and scales.shape == (40, 1)
    kept = rows.double() * scales.double()
    # 3 bits of mantissa, and below 2^-6 steps of 2^-9.
    limit = torch.maximum(x.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5)
    assert ((kept - x).abs() <= limit).all()
    assert (rows.float().abs().amax(1)[x.abs().amax(1) > 0] == 448).all()
    assert not rows[3].float().any() and scales[3] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_fp8_multiplies_what_was_quantized(dtype):
    x, weight, bias = random(3, 7, 64, dtype=dtype), random(48, 64, seed=1), random(48, dtype=dtype, seed=2)
    y = Fp8(weight, bias)(x)
    assert y.dtype == dtype and y.shape == (3, 7, 48)
    rows, scales = quantize(x.flatten(0, 1))
    columns, column_scales = quantize(weight)
    expected = (rows.double() * scales) @ (columns.double() * column_scales).T + bias.double()
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(y.double().flatten(0, 1), expected, rtol=rounding, atol=2e-5)
    # Both factors are off by no more than 2^-4, but for the smallest values.
    exact = x.double() @ weight.double().T + bias.double()
    limit = (x.double().abs() @ weight.double().abs().T) * ((1 + 2.0**-4) ** 2 - 1) + 0.02
    error = (y.double() - exact).abs()
    assert (error <= limit).all() and error.mean() > 1e-3


@torch.inference_mode()
def test_errors_of_a_detector_in_fp8(model):
    """The first stage's parameters are computed once, exactly, so that it differs by its out_layer alone."""
    images = make_images((50, 64), (40, 90))
    exact = model.optimize()
    found = model.optimize(fp8=True)
    assert found.report()["fp8"] and isinstance(found._program.head.proposals[0].dynamic_layer, Fp8)
    assert torch.equal(found._program.head.first_parameters, exact._program.head.first_parameters)
    found, exact = (detector(images, return_stages=True) for detector in (found, exact))
    error = (found.logits - exact.logits).abs().mean((1, 2, 3)) / exact.logits.std()
    assert (error > 1e-4).all() and (error < 0.1).all(), error


@pytest.mark.parametrize("interaction", ["dynamic", "concat", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_both_together_read_nothing_on_the_host(interaction, dtype, monkeypatch):
    if not onednn.cpu_has(dtype):
        pytest.skip("this processor has no bfloat16")
    monkeypatch.setattr(importlib.import_module("sparse_rcnn.ops.normalize_pad"), "_check_sizes", lambda *a: None)
    model, images = make_model(interaction=interaction), make_images((50, 64))
    optimized = model.optimize(dtype=dtype, out_layer_rank=24, fp8=True)
    inputs = Inputs.blank(Key(1, 64, 64), CPU)
    inputs.fill(images, [(50, 64, 50, 64)])
    with forbid_host_reads():
        found = optimized._program(*inputs, (64, 64))
    (expected,) = optimized.detect(images, [(50, 64)])
    assert found.counts.item() == len(expected["scores"]) > 0
    torch.testing.assert_close(found.scores[0, : found.counts[0]], expected["scores"])


@pytest.mark.parametrize("rank", [0, 33])
def test_ranks_that_the_layer_cannot_have(model, rank):
    with pytest.raises(ValueError, match=f"out_layer_rank: expected 1 to 32, got {rank}"):
        model.optimize(out_layer_rank=rank)


def test_gpus_without_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older one")
    with pytest.raises(ValueError, match=r"fp8: expected a GPU of compute capability 8.9 or more, got an older one"):
        check_compression(None, 32, True, torch.device("cuda"))
    check_compression(8, 32, False, torch.device("cuda"))
