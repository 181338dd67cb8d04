"""Stage by stage, and from several views: an answer is known for each, so that the figures are too."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.synthetic import write_dataset
from sparse_rcnn.detections import Detections
from sparse_rcnn.engine.evaluator import evaluate
from sparse_rcnn.engine.stages import evaluate_stages
from sparse_rcnn.engine.views import View, detect, detect_augmented, tta_views
from sparse_rcnn.models import SparseRCNN
from sparse_rcnn.runtime import default_weights

SIZE = 100, 60  # width and height of every picture
CONFIG = SimpleNamespace(class_names=("cat", "dog"), num_classes=2, num_proposals=4, num_stages=3, min_size=30)
CONFIG.max_size = 1000


class Oracle(nn.Module):
    """A detector of three stages whose answers are given, in pixels of the file."""

    def __init__(self, stages) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config, self.stages, self.seen = CONFIG, stages, []

    def forward(self, images, return_stages=False):
        assert not self.training and return_stages
        self.seen += [tuple(image.shape) for image in images]
        return SimpleNamespace(logits=range(len(self.stages)), boxes=range(len(self.stages)))

    def detections(self, logits, boxes, images):
        answer = self.stages[logits]
        scale = images[0].shape[2] / SIZE[0]
        boxes = torch.tensor([box for box, _, _ in answer], dtype=torch.float32).reshape(-1, 4) * scale
        scores, labels = torch.tensor([s for _, s, _ in answer]), torch.tensor([k for _, _, k in answer])
        return [{"boxes": boxes, "scores": scores, "labels": labels.long()} for _ in images]


A, A_AGAIN, B, NOWHERE = [10, 10, 40, 40], [10, 10, 40, 39], [50, 10, 90, 50], [0, 50, 9, 59]


@pytest.fixture
def two_pictures(write_coco):
    """A cat at A and a dog at B in each of two pictures."""
    annotations = [
        {"id": 2 * image + category, "image_id": image, "category_id": category, "bbox": box}
        for image in (1, 2)
        for category, box in ((1, [10, 10, 30, 30]), (2, [50, 10, 40, 40]))
    ]
    return open_dataset(write_coco({1: SIZE, 2: SIZE}, {1: "cat", 2: "dog"}, annotations), "valid")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_figures_of_each_stage(two_pictures, batch_size):
    stages = [
        [(NOWHERE, 0.4, 0), (NOWHERE, 0.3, 1)],
        [(A, 0.9, 0), (A_AGAIN, 0.8, 0), (B, 0.7, 1)],  # the second best is the best once more
        [(A, 0.9, 0), (B, 0.8, 1), (A_AGAIN, 0.1, 0)],
    ]
    model = Oracle(stages).train()
    results = evaluate_stages(model, two_pictures, batch_size, scorer="pycocotools")
    assert model.training and model.seen == [(3, 30, 50)] * 2
    assert [result.stage for result in results] == [0, 1, 2]
    assert [result.metrics["AR100"] for result in results] == pytest.approx([0, 1, 1])
    # A_AGAIN comes after both cats are found: it costs nothing, unless it scores more than the other picture's cat.
    assert [result.metrics["AP"] for result in results] == pytest.approx([0, 1, 1])
    assert [result.ap_with_nms for result in results] == pytest.approx([0, 1, 1])
    assert [result.duplicates for result in results] == pytest.approx([0, 2 / 4, 0])
    assert results[1].to_dict()["metrics"]["AP50"] == pytest.approx(1)


def test_nms_repairs_what_duplicates_cost(write_coco):
    # One picture with a cat found twice, one with a cat found once and with less confidence.
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 30, 30]} for i in (1, 2)]
    dataset = open_dataset(write_coco({1: SIZE, 2: SIZE}, {1: "cat", 2: "dog"}, annotations), "valid")

    class Uneven(Oracle):
        def detections(self, logits, boxes, images):
            self.stages = [[(A, 0.9, 0), (A_AGAIN, 0.8, 0)] if len(self.seen) == 1 else [(A, 0.5, 0)]] * 3
            return super().detections(0, boxes, images)

    (result,) = evaluate_stages(Uneven([[]] * 3), dataset)[:1]
    # Found, found again, found: recall 0.5 at precision 1, recall 1 at 2/3; 51 and 50 of the 101 recall points.
    assert result.metrics["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result.ap_with_nms == pytest.approx(1)


def test_an_unreadable_image_counts_as_empty(two_pictures):
    (two_pictures.image_dir / "2.png").write_bytes(b"junk")
    (result,) = evaluate_stages(Oracle([[(A, 0.9, 0), (B, 0.8, 1)]] * 3), two_pictures)[:1]
    assert result.metrics["AR100"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def bundled():
    return SparseRCNN.from_pretrained(default_weights())


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    return open_dataset(write_dataset(tmp_path_factory.mktemp("few"), 3, seed=5, progress=False), "valid")


def test_the_last_stage_is_what_the_model_answers(bundled, few_scenes):
    results = evaluate_stages(bundled, few_scenes)
    assert len(results) == bundled.config.num_stages
    plain = evaluate(bundled, few_scenes)
    assert results[-1].metrics == pytest.approx(plain.metrics, abs=1e-6)
    assert results[0].metrics["AP"] < 0.5 * results[-1].metrics["AP"] > 0.2


def test_a_mirrored_view_gives_boxes_of_the_upright_image(bundled, few_scenes):
    view = View(bundled.config.min_size, bundled.config.max_size)
    for index in range(2):
        image = few_scenes[index][0]
        ((mirrored,),) = detect(bundled, [image], View(view.min_size, view.max_size, flip=True))
        ((expected,),) = detect(bundled, [image.flip(2)], view)
        sure = expected.scores > 0.05
        width = image.shape[2]
        flipped = torch.from_numpy(expected.boxes[sure])[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1])
        flipped += torch.tensor([width, 0, width, 0])
        torch.testing.assert_close(torch.from_numpy(mirrored.boxes[sure]), flipped, rtol=0, atol=2e-2)
        torch.testing.assert_close(torch.from_numpy(mirrored.scores), torch.from_numpy(expected.scores))


def test_the_usual_views_are_six_and_their_detections_are_merged(bundled, few_scenes):
    config = bundled.config
    assert [(view.min_size / config.min_size, view.flip) for view in tta_views(bundled)] == [
        (pytest.approx(scale, abs=0.01), flip) for scale in (0.8, 1, 1.25) for flip in (False, True)
    ]
    image = few_scenes[0][0]
    merged = detect_augmented(bundled, image)
    assert len(merged) <= config.num_proposals and (merged.scores[:-1] >= merged.scores[1:]).all()
    assert len(merged.nms(0.65)) == len(merged)  # nothing is there twice
    best = max(float(detect(bundled, [image], view)[0][0].scores.max()) for view in tta_views(bundled))
    assert float(merged.scores[0]) == pytest.approx(best)
    result = evaluate(bundled, few_scenes, tta=True)
    assert result.metrics["AP50"] > 0.5
    # Where the model lets what is suppressed vote, the detections of all views do.
    views = [detect(bundled, [image], view)[0][0] for view in tta_views(bundled)]
    arrays = (np.concatenate([getattr(one, name) for one in views]) for name in ("boxes", "scores", "labels"))
    expected = Detections(*arrays, merged.class_names, merged.image_size).nms(0.65, votes=True).filter(top_k=50)
    bundled.config = config.replace(votes=True)
    voted = detect_augmented(bundled, image)
    bundled.config = config
    np.testing.assert_allclose(voted.scores, expected.scores, rtol=1e-5)
    np.testing.assert_allclose(voted.boxes, expected.boxes, atol=1e-3)
    assert voted.scores[0] > merged.scores[0]  # all six views are sure of the best
