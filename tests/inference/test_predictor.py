"""Predictor: every form of input, boxes back at the original size, selection, stages, the real model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.data.transforms import network_size, resize
from sparse_rcnn.detections import Detections
from sparse_rcnn.runtime import Predictor, default_weights, to_original


@pytest.fixture
def predictor(detector):
    return Predictor(detector, device="cpu")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (30, 100, 3), dtype=np.uint8)


def test_boxes_come_back_at_the_original_size(predictor, pixels):
    found = predictor.predict(pixels)
    # 30x100: the longer side is capped at 96, so the network sees 29x96 and the two axes scale differently.
    assert predictor.model.batches == [[(3, 29, 96)]]
    expected = [[25, 7.5, 75, 15], [50, 0, 100, 30], [10, 3, 30, 9], [26, 7.5, 76, 15]]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.6, 0.2])  # the empty box at 0.5 is dropped
    assert found.names == ["fish", "crab", "star", "fish"]
    assert found.image_size == (30, 100)
    assert found.source is None and found.image is None


def test_scaling_is_per_axis():
    boxes = to_original(torch.tensor([[4.0, 6, 8, 12]]), network=(24, 16), original=(48, 80))
    assert boxes.tolist() == [[20, 12, 40, 24]]


def test_every_form_of_an_image(predictor, pixels, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    reference = predictor.predict(pixels)
    for source in (str(path), path, Image.open(path), tensor, tensor.float() / 255, pixels[:, ::-1][:, ::-1]):
        found = predictor.predict(source)
        np.testing.assert_array_equal(found.boxes, reference.boxes)
        assert found.source == (str(path) if isinstance(source, (str, Path)) else None)


def test_every_form_gives_the_network_the_same_pixels(detector, pixels, tmp_path):
    seen = []
    detector.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][0]))
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    Predictor(detector, device="cpu").predict([path, pixels, tensor, tensor.double() / 255, Image.fromarray(pixels)])
    expected = resize(tensor, network_size(30, 100, 64, 96))
    assert len(seen) == 5
    for image in seen:
        assert image.dtype == torch.uint8
        assert torch.equal(image, expected)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (np.zeros((4, 4), np.uint8), ValueError),
        (np.zeros((4, 4, 3)), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (torch.zeros(1, 4, 4), ValueError),
        (torch.full((3, 4, 4), 7.0), ValueError),
        (torch.full((3, 4, 4), float("nan")), ValueError),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError),
        (17, TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_image(predictor, source, error):
    with pytest.raises(error, match="source: expected"):
        predictor.predict(source)


def test_list_and_iterator(predictor, pixels):
    assert predictor.predict([]) == []
    found = predictor.predict([pixels, pixels[:20]])
    assert [one.image_size for one in found] == [(30, 100), (20, 100)]
    pulled = []
    stream = predictor.predict(pulled.append(i) or pixels for i in range(1000))
    assert isinstance(next(stream), Detections)
    assert pulled == [0]  # nothing is read ahead


def test_batches(detector, pixels):
    found = Predictor(detector, device="cpu", batch_size=2).predict([pixels, pixels[:20], pixels[:10]])
    assert detector.batches == [[(3, 29, 96), (3, 19, 96)], [(3, 10, 96)]]
    np.testing.assert_allclose(found[1].boxes[0], [25, 5, 75, 10], atol=1e-4)


def test_selection(detector, pixels):
    def scores(**options):
        return [round(row.score, 4) for row in Predictor(detector, device="cpu", **options).predict(pixels)]

    assert scores(score_threshold=0.6) == [0.9, 0.8, 0.6]
    assert scores(classes=["fish"]) == [0.9, 0.2]
    assert scores(classes=[1, "star"]) == [0.8, 0.6]
    assert scores(top_k=1) == [0.9]
    assert scores(nms=0.5) == [0.9, 0.8, 0.6]
    detector.config = detector.config.replace(nms=0.5)  # the model's own, where the caller says nothing
    assert scores() == [0.9, 0.8, 0.6]
    assert scores(nms=1.0) == [0.9, 0.8, 0.6, 0.2]
    detector.config = detector.config.replace(nms=None)
    # Suppression comes before the k best: the duplicate does not take a place.
    assert scores(nms=0.5, classes=["fish"], top_k=2) == [0.9]
    # And where the model lets them vote, before the threshold: that of the duplicate counts, though it is below.
    detector.config = detector.config.replace(nms=0.5, votes=True)
    voted = round(1 - math.exp(-0.9 * math.sqrt(0.9 + 0.2)), 4)
    assert scores(score_threshold=0.6) == [voted] and voted > 0.6 > 1 - math.exp(-(0.9**1.5))
    assert scores(nms=0.6, classes=["fish"]) == [voted]
    assert scores(nms=1.0) == [0.9, 0.8, 0.6, 0.2]
    detector.config = detector.config.replace(nms=None)
    assert scores() == [0.9, 0.8, 0.6, 0.2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "int8"),
        ("batch_size", 0),
        ("score_threshold", 1.5),
        ("score_threshold", float("nan")),
        ("top_k", 0),
        ("nms", -0.1),
        ("classes", ["whale"]),
        ("device", "cuda:99"),
        ("device", "toaster"),
    ],
)
def test_wrong_options(detector, option, value):
    with pytest.raises(ValueError, match=f"^{option}: "):
        Predictor(detector, **{"device": "cpu", option: value})


def test_errors_are_raised_or_handed_over(predictor, pixels, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        predictor.predict([pixels, bad])
    told = []
    found = list(predictor.stream([pixels, bad, pixels], on_error=lambda source, error: told.append(source)))
    assert (len(found), told) == (2, [bad])


def test_stages_at_the_original_size(predictor, pixels):
    found = predictor.predict(pixels, return_stages=True)
    assert found.stage_boxes.shape == (2, 5, 4)
    assert found.proposal_index.tolist() == [4, 3, 2, 0]  # as the known detector has them
    np.testing.assert_allclose(found.stage_boxes[1][found.proposal_index], found.boxes, atol=1e-4)
    np.testing.assert_allclose(found.stage_boxes[0, 4], [18.75, 5.625, 56.25, 11.25], atol=1e-4)
    np.testing.assert_allclose(found.proposal_boxes[4], [12.5, 3.75, 37.5, 7.5], atol=1e-4)
    np.testing.assert_allclose(found.stage_scores[1], [0.2, 0.5, 0.6, 0.8, 0.9], atol=1e-6)


def test_kept_image(predictor, pixels):
    found = next(predictor.stream([pixels], keep_images=True))
    np.testing.assert_array_equal(found.image, pixels)
    assert found.draw().size == (100, 30)


def test_timings(predictor, pixels):
    predictor.predict([pixels, pixels])
    phases = predictor.timings.per_image()
    assert list(phases) == ["decode", "preprocess", "forward", "postprocess"]
    assert predictor.timings.images == 2
    assert all(value > 0 for value in phases.values())
    assert phases["forward"] == predictor.timings.forward * 500


def test_default_weights_name_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="weights: the bundled demo model is missing"):
        default_weights()
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    (tmp_path / "assets" / "demo" / "model.safetensors").touch()
    assert default_weights() == tmp_path / "assets" / "demo"


def test_real_model_equals_the_steps_by_hand(tiny_weights, pixels):
    predictor = Predictor(tiny_weights, device="cpu", optimize=False)
    found = predictor.predict(pixels, return_stages=True)
    model = predictor.model
    assert not model.training
    image = resize(torch.from_numpy(pixels).permute(2, 0, 1), (29, 96))
    with torch.inference_mode():
        outputs = model([image], return_stages=True)
    scale = np.array([100 / 96, 30 / 29] * 2)
    expected = outputs.detections[0]
    assert len(found) == len(expected["boxes"]) > 0
    np.testing.assert_allclose(found.boxes, expected["boxes"].numpy() * scale, rtol=1e-5)
    np.testing.assert_array_equal(found.scores, expected["scores"].numpy())
    np.testing.assert_allclose(found.stage_boxes, outputs.boxes[:, 0].numpy() * scale, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.proposal_boxes[0], [0, 0, 100, 30], atol=1e-4)
    # Each detection is its proposal: the same box (clipped), and its score among the proposal's.
    last = np.clip(found.stage_boxes[-1][found.proposal_index], 0, [100, 30, 100, 30])
    np.testing.assert_allclose(last, found.boxes, atol=1e-3)
    scores = outputs.logits[-1, 0].sigmoid().numpy()[found.proposal_index, found.labels]
    np.testing.assert_allclose(scores, found.scores, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_keep_float32_boxes_near_the_reference(tiny_weights, pixels, dtype):
    reference = Predictor(tiny_weights, device="cpu", optimize=False).predict(pixels, return_stages=True)
    found = Predictor(tiny_weights, device="cpu", dtype=dtype, optimize=False).predict(pixels, return_stages=True)
    assert found.boxes.dtype == np.float32
    assert not np.array_equal(found.stage_scores, reference.stage_scores)  # autocast did something
    np.testing.assert_allclose(found.stage_scores[0], reference.stage_scores[0], rtol=0.1)
    assert np.abs(found.stage_boxes[0] - reference.stage_boxes[0]).mean() < 0.5
    # A sample more than a cell outside the map counts as zero: of these thin boxes at the image's rim, one that a
    # rounding moves over that line may read something else in the second stage.
    close = np.abs(found.stage_scores[1] / reference.stage_scores[1] - 1) < 0.1
    assert close.sum() >= close.size - 1
    assert np.median(np.abs(found.stage_boxes[1] - reference.stage_boxes[1])) < 0.5


def test_softmax_model_has_scores_of_classes_only(pixels):
    from sparse_rcnn import SparseRCNN, SparseRCNNConfig

    torch.manual_seed(1)
    config = SparseRCNNConfig(
        **{"num_classes": 2, "num_proposals": 6, "num_stages": 1, "backbone": "resnet18", "hidden_dim": 32},
        **{"dim_dynamic": 8, "dim_feedforward": 64, "num_heads": 4, "min_size": 64, "max_size": 96},
        **{"classification": "softmax"},
    )
    found = Predictor(SparseRCNN(config), device="cpu").predict(pixels, return_stages=True)
    assert found.class_names == ("0", "1")
    np.testing.assert_allclose(found.stage_scores[-1][found.proposal_index], found.scores, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_optimized_finds_what_the_model_finds(tiny_weights, batch_size):
    rng = np.random.default_rng(0)
    sizes = [(30, 100), (64, 64), (90, 200), (30, 100)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    optimized = Predictor(tiny_weights, device="cpu", batch_size=batch_size)
    assert optimized.optimized is not None
    plain = Predictor(tiny_weights, device="cpu", batch_size=batch_size, optimize=False)
    assert plain.optimized is None
    for stages in (False, True):
        pairs = zip(optimized.predict(images, stages), plain.predict(images, stages), strict=True)
        for found, expected in pairs:
            assert len(found) == len(expected) > 0 and found.image_size == expected.image_size
            np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-4, atol=5e-3)
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
            np.testing.assert_array_equal(found.labels, expected.labels)
            if stages:
                np.testing.assert_allclose(found.stage_boxes, expected.stage_boxes, rtol=1e-4, atol=5e-3)
                np.testing.assert_array_equal(found.proposal_index, expected.proposal_index)
    assert optimized.timings.images == 8 and optimized.timings.forward > 0


@pytest.mark.parametrize("stages", [False, True])
def test_a_model_trained_further_is_optimized_again(tiny_weights, pixels, stages):
    predictor = Predictor(tiny_weights, device="cpu")
    before, made = predictor.predict(pixels, stages), predictor.optimized
    with torch.no_grad():
        predictor.model.head.stages[-1].class_logits.bias.add_(1)
    after = predictor.predict(pixels, stages)
    assert predictor.optimized is not made
    np.testing.assert_allclose(
        torch.logit(torch.tensor(after.scores)), torch.logit(torch.tensor(before.scores)) + 1, rtol=1e-4
    )
    assert predictor.predict(pixels, stages) and not predictor.optimized.is_stale()


def test_type_follows_the_device_unless_named(tiny_weights):
    assert Predictor(tiny_weights, device="cpu", dtype="auto").dtype == torch.float32
    assert Predictor(tiny_weights, device="cpu", dtype="auto", optimize=False).dtype == torch.float32


def test_warm_up_resizes_as_prediction_does(tiny_weights):
    predictor, seen = Predictor(tiny_weights, device="cpu"), []
    predictor.optimized.detect = lambda images, sizes: seen.append((tuple(images[0].shape), sizes))
    predictor.warm_up([(30, 100)])
    assert seen == [((3, 29, 96), [(29, 96)])]
    Predictor(tiny_weights, device="cpu", optimize=False).warm_up([(30, 100)])
