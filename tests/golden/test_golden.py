"""The detector against figures of the official implementation (its R50-100 with deterministic weights)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

LOSS_TOLERANCE = 2e-6
LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 5e-3  # pixels


def _targets(fill, counts):
    images = (("boxes1", counts[0], 480, 640), ("boxes2", counts[1], 600, 400))
    return [
        {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        for boxes, labels in (fill.boxes(*image) for image in images)
    ]


def test_weights_and_images_are_the_golden_ones(fill, golden_outputs, golden_state, official_keys):
    assert [fill.crc(image) for image in fill.images()] == golden_outputs["images_crc32"].tolist()
    ours = {official: name for name, official in official_keys.items()}
    sums = [fill.crc(golden_state[ours[key]].numpy()) for key in sorted(ours)]
    assert sums == golden_outputs["weights_crc32"].tolist()


@pytest.mark.parametrize(("case", "count"), [("batch", 2), ("single", 1)])
def test_stages_and_detections(golden_model, golden_images, golden_outputs, case, count):
    with torch.inference_mode():
        outputs = golden_model.eval()(golden_images[:count], return_stages=True)
    for stage in range(6):
        np.testing.assert_allclose(
            outputs.logits[stage], golden_outputs[f"{case}_logits"][stage], rtol=0, atol=LOGIT_TOLERANCE
        )
        np.testing.assert_allclose(
            outputs.boxes[stage], golden_outputs[f"{case}_boxes"][stage], rtol=0, atol=BOX_TOLERANCE
        )
    for index, found in enumerate(outputs.detections, start=1):
        expected = {k: golden_outputs[f"{case}_img{index}_post_{k}"] for k in ("scores", "labels", "boxes")}
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=LOGIT_TOLERANCE)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=0, atol=BOX_TOLERANCE)
        np.testing.assert_array_equal(found["labels"], expected["labels"])


def test_feature_pyramid(golden_model, golden_images, golden_outputs):
    with torch.inference_mode():
        batch, _ = golden_model.eval()._normalize(golden_images)
        maps = golden_model.backbone(batch)
    for level, feature in enumerate(maps, start=2):
        expected = golden_outputs[f"batch_p{level}_sub"]
        np.testing.assert_allclose(feature[:, ::32, ::5, ::5], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_losses_and_gradients(golden_model, golden_images, golden_training, fill, official_keys, case):
    expected = golden_training[case]
    losses = golden_model(golden_images, _targets(fill, expected["counts"]))
    sum(losses.values()).backward()
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        expected["losses_weighted"], rel=LOSS_TOLERANCE
    )
    norms = {official_keys[n]: p.grad.norm().item() for n, p in golden_model.named_parameters() if p.requires_grad}
    # A gradient that vanishes in theory (attention's key bias) is rounding noise in both implementations.
    noise = 1e-6 * expected["total_grad_norm"]
    assert norms == pytest.approx(expected["grad_norms"], rel=3e-3, abs=noise)


@pytest.mark.parametrize("case", ["a", "b"])
def test_losses_in_float64(golden_model, golden_images, golden_training, fill, case):
    expected = golden_training[case]["float64"]["losses_weighted"]
    model = golden_model.double()
    with torch.no_grad():
        losses = model(golden_images, _targets(fill, golden_training[case]["counts"]))
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-7)
