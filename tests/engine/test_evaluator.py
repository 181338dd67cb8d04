from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.evaluation import synthetic_results
from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.engine.evaluator import evaluate, match_classes
from sparse_rcnn.engine.scoring import METRICS, coco_metrics, pick_scorer


class Oracle(nn.Module):
    """Says, for every image in turn, the given boxes (in pixels of the file), scores and labels."""

    def __init__(self, answers, class_names, min_size=50, max_size=1000, nms=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(
            **{"class_names": class_names, "num_classes": len(class_names or ()), "nms": nms, "votes": False},
            **{"min_size": min_size, "max_size": max_size},
        )
        self.answers = iter(answers)
        self.seen = []

    def forward(self, images, return_stages=False):
        assert not self.training and not torch.is_grad_enabled()
        results = []
        for image in images:
            self.seen.append((image.dtype, tuple(image.shape)))
            boxes, scores, labels, (width, height) = next(self.answers)
            scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
            results.append(
                {
                    "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * scale,
                    "scores": torch.tensor(scores),
                    "labels": torch.tensor(labels, dtype=torch.int64),
                }
            )
        return results


def annotation(image_id, category_id, box, **more):
    return {"id": more.pop("id", 1), "image_id": image_id, "category_id": category_id, "bbox": box, **more}


def dataset(folder) -> DetectionDataset:
    return open_dataset(folder, "valid")


def test_perfect_detections_are_one_everywhere(write_coco):
    # Two images of different sizes and shapes, resized by the evaluator, and an annotation with id 0.
    boxes = {1: [[10, 10, 30, 30], [60, 20, 140, 90]], 2: [[5, 100, 55, 290]]}
    folder = write_coco(
        {1: (200, 100), 2: (100, 300)},
        {7: "cat", 3: "dog"},
        [
            annotation(1, 7, [10, 10, 20, 20], id=0),
            annotation(1, 3, [60, 20, 80, 70], id=1),
            annotation(2, 7, [5, 100, 50, 190], id=2),
        ],
    )
    # The model's label order is not the data set's.
    model = Oracle(
        [(boxes[1], [0.9, 0.8], [1, 0], (200, 100)), (boxes[2], [0.7], [1], (100, 300))], class_names=("dog", "cat")
    )
    model.train()
    result = evaluate(model, dataset(folder))
    assert model.training
    assert model.seen == [(torch.uint8, (3, 50, 100)), (torch.uint8, (3, 150, 50))]
    assert result.metrics == pytest.approx(dict.fromkeys(METRICS, 1.0))
    # The cats measure 20 x 20 and 50 x 190 pixels, the dog 80 x 70.
    everywhere = {"AP": 1.0, "AP50": 1.0, "AR100": 1.0}
    assert result.per_class == {
        "cat": pytest.approx({**everywhere, "APs": 1.0, "APm": -1.0, "APl": 1.0}),
        "dog": pytest.approx({**everywhere, "APs": -1.0, "APm": 1.0, "APl": -1.0}),
    }
    assert [d["category_id"] for d in result.detections] == [7, 3, 7]
    assert result.detections[1]["bbox"] == pytest.approx([60, 20, 80, 70], abs=1e-4)
    assert result.failed == [] and result.notes == []


def test_a_partial_case_by_hand(write_coco):
    # Two objects. One is found at IoU 0.72, one is not; a second detection, less sure, hits nothing. Recall 0.5 at
    # precision 1 covers 51 of the 101 recall points, at the five thresholds 0.50..0.70 of ten.
    folder = write_coco(
        {1: (400, 400)},
        {1: "cat", 2: "dog"},
        [annotation(1, 1, [0, 0, 100, 100]), annotation(1, 1, [200, 200, 100, 100], id=2)],
    )
    model = Oracle(
        [([[0, 0, 100, 72], [350, 0, 400, 50]], [0.9, 0.8], [0, 0], (400, 400))], ("cat", "dog"), min_size=400
    )
    result = evaluate(model, dataset(folder))
    assert result.metrics["AP50"] == pytest.approx(51 / 101)
    assert result.metrics["AP75"] == 0
    assert result.metrics["AP"] == pytest.approx(51 / 101 / 2)
    assert result.metrics["AR100"] == pytest.approx(0.25)  # half of the objects at half of the thresholds
    assert result.metrics["APs"] == -1 and result.metrics["APl"] == pytest.approx(51 / 101 / 2)
    assert result.per_class["cat"]["AP50"] == pytest.approx(51 / 101)
    assert result.per_class["cat"]["AR100"] == pytest.approx(0.25)
    assert set(result.per_class["dog"].values()) == {-1.0}  # no dog to find


def test_a_false_positive_of_higher_score_halves_precision(write_coco):
    folder = write_coco({1: (400, 400)}, {1: "cat"}, [annotation(1, 1, [0, 0, 100, 100])])
    model = Oracle([([[200, 200, 300, 300], [0, 0, 100, 100]], [0.9, 0.8], [0, 0], (400, 400))], ("cat",), min_size=400)
    result = evaluate(model, dataset(folder))
    assert result.metrics["AP"] == pytest.approx(0.5)
    assert result.metrics["AR1"] == 0 and result.metrics["AR10"] == pytest.approx(1.0)


def test_duplicates_go_by_the_models_own_suppression_or_the_callers(write_coco):
    things = [annotation(1, 1, [0, 0, 100, 100]), annotation(1, 1, [200, 200, 100, 100], id=2)]
    folder = write_coco({1: (400, 400)}, {1: "cat"}, things)
    boxes = [[0, 0, 100, 100], [0, 0, 100, 96], [200, 200, 300, 300]]

    def ap50(own, given):
        model = Oracle([(boxes, [0.9, 0.8, 0.7], [0, 0, 0], (400, 400))], ("cat",), min_size=400, nms=own)
        return evaluate(model, dataset(folder), nms=given).metrics["AP50"]

    # With the duplicate precision is 1 at the first object and 2/3 at the second: 51 and 50 of 101 points of recall.
    with_duplicate = pytest.approx((51 + 50 * 2 / 3) / 101)
    assert [ap50(None, None), ap50(0.6, 1.0), ap50(0.97, None)] == [with_duplicate] * 3
    assert [ap50(0.6, None), ap50(None, 0.6), ap50(1.0, 0.6)] == [pytest.approx(1)] * 3
    with pytest.raises(ValueError, match="nms: expected a number within"):
        ap50(None, 1.1)


def test_a_detection_inside_a_crowd_is_ignored(write_coco):
    folder = write_coco(
        {1: (400, 400)},
        {1: "cat"},
        [annotation(1, 1, [0, 0, 100, 100]), annotation(1, 1, [200, 200, 200, 200], id=2, iscrowd=1)],
    )
    model = Oracle([([[210, 210, 260, 260], [0, 0, 100, 100]], [0.9, 0.8], [0, 0], (400, 400))], ("cat",), min_size=400)
    assert evaluate(model, dataset(folder)).metrics["AP"] == pytest.approx(1.0)


def test_no_detections_score_zero_and_no_annotations_minus_one(write_coco):
    folder = write_coco({1: (100, 100)}, {1: "cat"}, [annotation(1, 1, [0, 0, 50, 50])])
    result = evaluate(Oracle([([], [], [], (100, 100))], ("cat",)), dataset(folder))
    assert result.metrics["AP"] == 0 and result.metrics["AR100"] == 0 and result.detections == []
    nothing_small = {"APs": -1.0, "APl": -1.0}
    assert result.per_class == {"cat": {"AP": 0.0, "AP50": 0.0, "APm": 0.0, "AR100": 0.0, **nothing_small}}


@pytest.mark.parametrize("scorer", ["pycocotools", "hotcoco"])
def test_nothing_to_find_is_minus_one(scorer):
    if scorer == "hotcoco":
        pytest.importorskip("hotcoco")
    empty = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "cat"}], "annotations": []}
    metrics, per_class = coco_metrics(empty, np.array([[1, 0, 0, 5, 5, 0.5, 1.0]]), scorer)
    assert set(metrics.values()) == {-1.0} and set(per_class[1].values()) == {-1.0}
    assert set(coco_metrics(empty, np.zeros((0, 7)), scorer)[0].values()) == {-1.0}
    assert set(coco_metrics({**empty, "images": []}, np.zeros((0, 7)), scorer)[0].values()) == {-1.0}


@pytest.mark.parametrize("seed", range(3))
def test_hotcoco_equals_pycocotools(seed):
    pytest.importorskip("hotcoco")
    case = synthetic_results(60, 5, 130, seed)
    metrics, per_class = coco_metrics(*case, "pycocotools")
    fast, fast_per_class = coco_metrics(*case, "hotcoco")
    assert fast == pytest.approx(metrics, rel=0, abs=1e-6) and 0.02 < metrics["AP"] < 0.9
    assert fast_per_class.keys() == per_class.keys() == {1, 2, 3, 4, 5}
    for category, values in per_class.items():
        assert fast_per_class[category] == pytest.approx(values, rel=0, abs=1e-6)


def test_a_scorer_that_is_unknown_or_missing_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="scorer: expected one of auto, pycocotools, hotcoco, got 'fast'"):
        pick_scorer("fast")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pick_scorer("auto") == "pycocotools"
    with pytest.raises(ValueError, match="hotcoco is not installed"):
        pick_scorer("hotcoco")


def test_boxes_are_clipped_to_the_original_image_and_empty_ones_go(write_coco):
    folder = write_coco({1: (100, 80)}, {4: "cat"}, [annotation(1, 4, [0, 0, 50, 50])])
    model = Oracle([([[-20, 10, 130, 60], [100, 0, 140, 50]], [0.75, 0.5], [0, 0], (100, 80))], ("cat",), min_size=40)
    result = evaluate(model, dataset(folder))
    assert result.detections == [
        {"image_id": 1, "category_id": 4, "bbox": pytest.approx([0, 10, 100, 50], abs=1e-4), "score": 0.75}
    ]


def test_batches_give_what_single_images_give(write_coco):
    folder = write_coco(
        {i: (60 + 10 * i, 80) for i in range(1, 6)},
        {1: "cat"},
        [annotation(i, 1, [5, 5, 40, 40], id=i) for i in range(1, 6)],
    )
    answers = [([[5, 5, 45, 40 + i]], [0.5], [0], (60 + 10 * i, 80)) for i in range(1, 6)]
    single = evaluate(Oracle(answers, ("cat",)), dataset(folder), batch_size=1)
    batched = evaluate(Oracle(answers, ("cat",)), dataset(folder), batch_size=2)
    assert len(single.detections) == 5 and batched.detections == single.detections
    assert batched.metrics == single.metrics


def test_an_unreadable_image_is_named_and_counts_as_empty(write_coco):
    folder = write_coco(
        {1: (100, 100), 2: (100, 100)},
        {1: "cat"},
        [annotation(1, 1, [0, 0, 50, 50]), annotation(2, 1, [0, 0, 50, 50], id=2)],
    )
    (folder / "valid" / "2.png").write_bytes(b"no picture")
    result = evaluate(Oracle([([[0, 0, 50, 50]], [0.9], [0], (100, 100))], ("cat",)), dataset(folder), batch_size=2)
    assert len(result.failed) == 1 and "2.png" in result.failed[0]
    assert result.metrics["AP50"] == pytest.approx(51 / 101)


def classes(*names):
    return SimpleNamespace(class_names=names or None, num_classes=len(names) or 2)


DATA = SimpleNamespace(class_names=("cat", "dog"), category_ids=(7, 3))


def test_classes_match_by_name():
    assert match_classes(classes("dog", "cat"), DATA) == ([3, 7], [])
    ids, notes = match_classes(classes("bird", "cat"), DATA)
    assert ids == [None, 7]
    assert notes == [
        "classes unknown to the model, nothing of them can be found: dog",
        "classes that the data set lacks, their detections are dropped: bird",
    ]
    assert match_classes(classes(), DATA)[0] == [7, 3]


def test_classes_without_a_match_are_an_error():
    with pytest.raises(ValueError, match=r"no class of the model \(bird\) is in the data set \(cat, dog\)"):
        match_classes(classes("bird"), DATA)
    with pytest.raises(ValueError, match="no class names and 3 classes, the data set has 2"):
        match_classes(SimpleNamespace(class_names=None, num_classes=3), DATA)


def test_detections_of_classes_outside_the_data_are_dropped(write_coco):
    folder = write_coco({1: (100, 100)}, {1: "cat"}, [annotation(1, 1, [0, 0, 50, 50])])
    answer = ([[0, 0, 50, 50], [0, 0, 50, 50]], [0.9, 0.8], [0, 1], (100, 100))
    result = evaluate(Oracle([answer], ("bird", "cat")), dataset(folder))
    assert [d["category_id"] for d in result.detections] == [1]
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert json.dumps(result.to_dict())
