"""The optimized detector against figures of the official implementation, and in bfloat16 against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sparse_rcnn.onednn import cpu_has

LOGIT_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.02  # pixels


@pytest.mark.parametrize(("case", "count"), [("batch", 2), ("single", 1)])
@torch.inference_mode()
def test_stages_and_detections(golden_model, golden_images, golden_outputs, case, count):
    optimized = golden_model.optimize()
    assert optimized.report()["backbone"] == "fused"
    outputs = optimized(golden_images[:count], return_stages=True)
    logits, boxes = golden_outputs[f"{case}_logits"], golden_outputs[f"{case}_boxes"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=0, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(outputs.boxes, boxes, rtol=0, atol=BOX_TOLERANCE)
    for found in (outputs.detections, optimized(golden_images[:count])):
        for index, result in enumerate(found, start=1):
            expected = {k: golden_outputs[f"{case}_img{index}_post_{k}"] for k in ("scores", "labels", "boxes")}
            np.testing.assert_allclose(result["scores"], expected["scores"], rtol=0, atol=LOGIT_TOLERANCE)
            np.testing.assert_allclose(result["boxes"], expected["boxes"], rtol=0, atol=BOX_TOLERANCE)
            np.testing.assert_array_equal(result["labels"], expected["labels"])


@torch.inference_mode()
def test_bfloat16_is_as_near_to_float64_as_eager(golden_model, golden_images):
    if not cpu_has(torch.bfloat16):  # optimize computes in float32 there, which tests/inference holds it to
        pytest.skip("this processor has no bfloat16")
    images = [image[:, :256, :320] for image in golden_images]
    golden_model.eval()
    exact = copy.deepcopy(golden_model).double()(images, return_stages=True)
    with torch.autocast("cpu", torch.bfloat16):
        eager = golden_model(images, return_stages=True)
    ours = golden_model.optimize(dtype=torch.bfloat16)(images, return_stages=True)
    for name in ("logits", "boxes"):
        errors = [(getattr(outputs, name) - getattr(exact, name)).abs().mean((1, 2, 3)) for outputs in (ours, eager)]
        assert (errors[0] > 0).all() and (errors[0] <= 2 * errors[1]).all(), (name, errors)
