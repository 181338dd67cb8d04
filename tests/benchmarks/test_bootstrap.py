"""The bootstrap of a difference: nothing between equals, all between right and wrong, and draws of whole images."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import bootstrap
from benchmarks.bootstrap import difference_intervals
from sparse_rcnn.data import synthetic
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.engine.evaluator import Numbering
from sparse_rcnn.engine.scoring import coco_metrics


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    synthetic.write_dataset(folder, 8, seed=1, size=(96, 128), split="valid")
    return open_dataset(str(folder), "valid")


def truth_as_found(dataset, images=None) -> list[dict]:
    """Everything that is in those images (default: in all), found."""
    numbering = Numbering(dataset)
    wanted = range(1, len(dataset) + 1) if images is None else images
    boxes = [each for each in numbering.ground_truth()["annotations"] if each["image_id"] in wanted]
    return numbering.to_coco(
        np.array([[each["image_id"], *each["bbox"], 0.9, each["category_id"]] for each in boxes]).reshape(-1, 7)
    )


def test_equals_do_not_differ_and_all_differs_from_nothing(scenes):
    everything = truth_as_found(scenes)
    assert difference_intervals(scenes, everything, everything, 10) == {"AP": (0.0, 0.0), "AP50": (0.0, 0.0)}
    for metric, interval in difference_intervals(scenes, everything, [], 10).items():
        assert interval == pytest.approx((1, 1), abs=1e-9), metric
    assert difference_intervals(scenes, [], everything, 10)["AP"] == pytest.approx((-1, -1), abs=1e-9)


def test_a_difference_in_some_images_depends_on_the_draw(scenes):
    """Half of the images are found: by hand, from the draws, what the interval's ends are."""
    half = truth_as_found(scenes, images=range(1, 5))
    numbering = Numbering(scenes)
    truth, differences = numbering.ground_truth(), []
    for drawn in bootstrap._draws(len(scenes), 25, seed=3):
        boxes = [(n, each) for n, i in enumerate(drawn, 1) for each in truth["annotations"] if each["image_id"] == i]
        annotations = [{**each, "id": n, "image_id": new} for n, (new, each) in enumerate(boxes, 1)]
        images = [{"id": number} for number in range(1, len(drawn) + 1)]
        found = [[new, *each["bbox"], 0.9, each["category_id"]] for new, each in boxes if each["image_id"] < 5]
        sample = {"images": images, "annotations": annotations, "categories": truth["categories"]}
        metrics, _ = coco_metrics(sample, np.array(found, dtype=np.float64).reshape(-1, 7), "pycocotools")
        differences.append(1 - metrics["AP50"])
    expected = np.percentile(differences, [2.5, 97.5])
    interval = difference_intervals(scenes, truth_as_found(scenes), half, 25, seed=3)["AP50"]
    assert interval == pytest.approx(expected, abs=1e-6) and interval[0] < interval[1]
    assert 0 < interval[1] < 1


def test_draws_are_with_replacement_and_of_all_images():
    draws = list(bootstrap._draws(6, 200, seed=0))
    assert all(len(drawn) == 6 for drawn in draws) and {image for drawn in draws for image in drawn} == set(range(1, 7))
    assert any(len(set(drawn)) < 6 for drawn in draws) and draws == list(bootstrap._draws(6, 200, seed=0))
