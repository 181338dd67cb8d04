"""Detections: selection, suppression, and the values of every exchange format."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparse_rcnn.coco_classes import COCO_CATEGORY_IDS, COCO_NAMES, category_ids_of
from sparse_rcnn.detections import Detections

NAMES = ("fish", "crab", "7")


@pytest.fixture
def found() -> Detections:
    return Detections(
        boxes=torch.tensor([[10.0, 20, 30, 60], [12, 20, 32, 60], [0, 0, 5, 5], [11, 20, 31, 60]]),
        scores=[0.9, 0.75, 0.5, 0.25],
        labels=[0, 0, 2, 1],
        class_names=NAMES,
        image_size=(100, 200),
        source="reef.jpg",
    )


def test_fields_are_numpy_of_fixed_types(found):
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.names == ["fish", "fish", "7", "crab"]
    assert len(found) == 4


def test_rows(found):
    first = next(iter(found))
    assert first.box == (10.0, 20.0, 30.0, 60.0)
    assert (round(first.score, 6), first.label, first.name) == (0.9, 0, "fish")


def test_repr(found):
    assert repr(found) == "Detections(2 fish, 1 7, 1 crab, image_size=(100, 200), source='reef.jpg')"
    assert repr(found[:0]) == "Detections(nothing, image_size=(100, 200), source='reef.jpg')"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, r"boxes: expected shape \[1, 4\]"),
        ({"scores": [0.1, 0.2]}, r"scores: expected shape \[1\], got \[2\]"),
        ({"labels": [3]}, r"labels: expected 0\.\.2, got 3"),
        ({"labels": [-1]}, r"labels: expected 0\.\.2, got -1"),
        ({"stage_boxes": np.zeros((2, 5, 4))}, "proposal_index: expected shape"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    fields = {"boxes": [[1, 2, 3, 4]], "scores": [0.5], "labels": [0], "class_names": NAMES, "image_size": (9, 9)}
    with pytest.raises(ValueError, match=message):
        Detections(**{**fields, **change})


@pytest.mark.parametrize(
    ("selection", "positions"),
    [
        ({}, [0, 1, 2, 3]),
        ({"score_threshold": 0.5}, [0, 1, 2]),  # the threshold itself is in
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"classes": ["crab"]}, [3]),
        ({"classes": [0, "7"]}, [0, 1, 2]),
        ({"classes": ["7"]}, [2]),  # a name before an index
        ({"classes": ["1"]}, [3]),
        ({"classes": []}, []),
        ({"classes": ["fish"], "top_k": 1, "score_threshold": 0.1}, [0]),
        ({"score_threshold": 0.95}, []),
    ],
)
def test_filter(found, selection, positions):
    kept = found.filter(**selection)
    np.testing.assert_array_equal(kept.boxes, found.boxes[positions])
    np.testing.assert_array_equal(kept.labels, found.labels[positions])
    assert len(found) == 4


def test_top_k_takes_the_best_of_unsorted_detections(found):
    kept = found[[3, 2, 0, 1]].filter(top_k=2)
    np.testing.assert_allclose(kept.scores, [0.9, 0.75])
    kept = found[[3, 1, 2, 0]].filter(top_k=2)
    np.testing.assert_allclose(kept.scores, [0.75, 0.9])


@pytest.mark.parametrize("wanted", ["whale", "3", "-1", 17])
def test_unknown_class_lists_the_known(found, wanted):
    with pytest.raises(ValueError, match=r"fish, crab, 7 \(or 0\.\.2\)"):
        found.filter(classes=[wanted])


def test_nms_is_class_wise(found):
    # The second fish overlaps the first by 18/22; the crab overlaps both and stays.
    assert found.nms(0.5).labels.tolist() == [0, 2, 1]
    assert found.nms(0.85).labels.tolist() == [0, 0, 2, 1]


def _greedy(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-scores):
        for j in kept:
            if labels[i] != labels[j]:
                continue
            sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
            overlap = np.prod(sides.clip(0))
            areas = np.prod(boxes[i, 2:] - boxes[i, :2]) + np.prod(boxes[j, 2:] - boxes[j, :2])
            if overlap / (areas - overlap) > iou:
                break
        else:
            kept.append(int(i))
    return kept


@pytest.mark.parametrize("iou", [0.1, 0.5, 0.7])
def test_nms_equals_the_textbook(iou):
    random = np.random.default_rng(4)
    corner, side = random.uniform(0, 60, (80, 2)), random.uniform(10, 40, (80, 2))
    found = Detections(
        np.hstack([corner, corner + side]), random.uniform(size=80), random.integers(0, 3, 80), NAMES, (100, 100)
    )
    expected = _greedy(found.boxes, found.scores, found.labels, iou)
    assert 3 < len(expected) < 80
    np.testing.assert_array_equal(found.nms(iou).boxes, found.boxes[expected])


@pytest.mark.parametrize("iou", [0.1, 0.5, 0.7])
def test_votes_equal_a_slow_search(iou):
    random = np.random.default_rng(7)
    corner, side = random.uniform(0, 40, (60, 2)), random.uniform(20, 30, (60, 2))
    found = Detections(
        np.hstack([corner, corner + side]), random.uniform(size=60), random.integers(0, 2, 60), NAMES, (100, 100),
        source="a.jpg", proposal_index=np.arange(60),
    )  # fmt: skip
    expected = {}
    for i in found.nms(iou).proposal_index:
        support = 0.0
        for j in range(60):
            # Of two alone the second is suppressed where they are of one class and overlap enough.
            pair = found[[i, j]] if found.scores[i] >= found.scores[j] else found[[j, i]]
            support += float(found.scores[j]) if i == j or len(pair.nms(iou)) == 1 else 0.0
        expected[int(i)] = 1 - np.exp(-found.scores[i] * np.sqrt(support))
    voted = found.nms(iou, votes=True)
    assert 3 < len(voted) < 55 and voted.source == "a.jpg"
    assert voted.proposal_index.tolist() == sorted(expected, key=lambda i: -expected[i])
    assert voted.proposal_index.tolist() != found.nms(iou).proposal_index.tolist()  # the order has changed
    np.testing.assert_allclose(voted.scores, sorted(expected.values(), reverse=True), rtol=1e-5)
    np.testing.assert_array_equal(voted.boxes, found.boxes[voted.proposal_index])


def test_votes_of_a_known_case(found):
    voted = found.nms(0.5, votes=True)
    assert voted.labels.tolist() == [0, 2, 1]
    expected = [1 - math.exp(-0.9 * math.sqrt(0.9 + 0.75)), 1 - math.exp(-(0.5**1.5)), 1 - math.exp(-(0.25**1.5))]
    np.testing.assert_allclose(voted.scores, expected, rtol=1e-6)
    # Where nothing is suppressed nobody votes.
    np.testing.assert_array_equal(found.nms(1, votes=True).scores, found.scores)
    # A box without area overlaps nothing, but it has its own vote.
    point = Detections([[5, 5, 5, 5]], [0.25], [0], NAMES, (100, 100)).nms(0.5, votes=True)
    np.testing.assert_allclose(point.scores, [1 - math.exp(-0.125)], rtol=1e-6)
    assert len(found[[]].nms(0.5, votes=True)) == 0


def test_coco_results(found):
    results = found.to_coco(image_id=42)
    assert results[0] == {"image_id": 42, "category_id": 1, "bbox": [10, 20, 20, 40], "score": found.scores[0].item()}
    assert [result["category_id"] for result in results] == [1, 1, 3, 2]
    assert [result["category_id"] for result in found.to_coco(1, [5, 60, 7])] == [5, 5, 7, 60]
    with pytest.raises(ValueError, match="category_ids: expected 3 ids, got 2"):
        found.to_coco(1, [5, 6])


def test_category_ids():
    assert len(COCO_NAMES) == len(COCO_CATEGORY_IDS) == 80
    ids = dict(zip(COCO_NAMES, COCO_CATEGORY_IDS, strict=True))
    # Both ends and both sides of the gaps, from COCO's instances_val2017.json.
    known = {"person": 1, "fire hydrant": 11, "stop sign": 13, "backpack": 27, "umbrella": 28, "handbag": 31}
    known |= {"bottle": 44, "wine glass": 46, "dining table": 67, "toilet": 70, "tv": 72, "toothbrush": 90}
    assert {name: ids[name] for name in known} == known
    assert category_ids_of(COCO_NAMES)[79] == 90
    assert category_ids_of(["a", "b"]) == (1, 2)


def test_csv_rows(found):
    assert found.to_csv()[0] == (
        *("reef.jpg", 200, 100, 0, "fish", "0.9000"),
        *("10.00", "20.00", "30.00", "60.00"),
    )
    assert found.to_csv("other.png")[3][:6] == ("other.png", 200, 100, 1, "crab", "0.2500")


def test_json(found):
    values = json.loads(found.to_json())
    assert (values["source"], values["height"], values["width"]) == ("reef.jpg", 100, 200)
    assert values["detections"][2] == {"box": [0.0, 0.0, 5.0, 5.0], "score": 0.5, "label": 2, "name": "7"}
    assert "stage_boxes" not in values


def test_stages_follow_the_selection():
    found = Detections(
        **{"boxes": [[0, 0, 4, 4], [1, 1, 5, 5]], "scores": [0.9, 0.8], "labels": [0, 1], "class_names": NAMES},
        **{"image_size": (9, 9), "proposal_index": [2, 0], "proposal_boxes": np.zeros((3, 4))},
        **{"stage_boxes": np.ones((2, 3, 4)), "stage_scores": np.full((2, 3), 0.5)},
    )
    crab = found.filter(classes=["crab"])
    assert crab.proposal_index.tolist() == [0]
    assert crab.stage_boxes.shape == (2, 3, 4)
    assert crab.to_dict()["proposal_index"] == [0]
    assert found[np.array([False, False])].proposal_index.shape == (0,)


def test_supervision(found, monkeypatch):
    made = {}
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **fields: made.update(fields)))
    found.to_supervision()
    np.testing.assert_array_equal(made["xyxy"], found.boxes)
    np.testing.assert_array_equal(made["confidence"], found.scores)
    np.testing.assert_array_equal(made["class_id"], [0, 0, 2, 1])
    assert made["data"]["class_name"].tolist() == ["fish", "fish", "7", "crab"]


def test_supervision_that_is_not_installed(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        found.to_supervision()
