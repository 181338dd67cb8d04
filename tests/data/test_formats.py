"""The same data set in every format, told apart by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_rcnn.data.fingerprint import changes, fingerprint
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.engine.evaluator import Numbering
from tests.data_formats import CLASS_NAMES, WRITERS, make_splits, write_coco, write_voc, write_yolo


@pytest.fixture(scope="module")
def splits():
    return make_splits()


@pytest.fixture(scope="module")
def copies(splits, tmp_path_factory):
    """Format -> folder."""
    return {name: write(tmp_path_factory.mktemp(name), splits) for name, write in WRITERS.items()}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_format_gives_the_same_images_and_boxes(copies, splits, name, split):
    dataset = open_dataset(copies[name], split)
    assert dataset.class_names == CLASS_NAMES and dataset.category_ids == (1, 2, 3)
    assert dataset.problems == [] and dataset.left_out == [] and len(dataset) == len(splits[split])
    for index, scene in enumerate(splits[split]):
        image, target = dataset[index]
        assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0).numpy(), scene.pixels)
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
        # Not nearly: YOLO's fractions and VOC's counting from 1 give whole pixels again.
        assert target["boxes"].tolist() == [list(map(float, box[1:])) for box in scene.boxes]
        assert target["labels"].tolist() == [box[0] for box in scene.boxes]
        assert target["image_id"] == index + 1 and target["size"] == scene.pixels.shape[:2]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_ground_truth(copies, splits, name):
    truth = Numbering(open_dataset(copies[name], "train")).ground_truth()
    expected = [
        (number, label + 1, [x0, y0, x1 - x0, y1 - y0], 0)
        for number, scene in enumerate(splits["train"], start=1)
        for label, x0, y0, x1, y1 in scene.boxes
    ]
    assert len(truth["images"]) == 6 and [c["name"] for c in truth["categories"]] == list(CLASS_NAMES)
    for entry, (image, category, box, crowd) in zip(truth["annotations"], expected, strict=True):
        assert (entry["image_id"], entry["category_id"], entry["iscrowd"]) == (image, category, crowd)
        assert entry["bbox"] == pytest.approx(box, abs=1e-9)
        assert entry["area"] == pytest.approx(box[2] * box[3], rel=1e-12)


def test_class_names_decide_the_labels_in_every_format(copies):
    for folder in copies.values():
        dataset = open_dataset(folder, "train", class_names=("emu", "cat", "dog"))
        plain = open_dataset(folder, "train")
        assert dataset.class_names == ("emu", "cat", "dog") and dataset.category_ids == (3, 1, 2)
        assert dataset[0][1]["labels"].tolist() == [(label + 1) % 3 for label in plain[0][1]["labels"].tolist()]
        with pytest.raises(ValueError, match="annotations of categories that are not in class_names"):
            open_dataset(folder, "train", class_names=("cat", "dog"))


def test_the_splits_of_a_file_and_what_is_not_there(copies, tmp_path):
    assert len(open_dataset(copies["coco"] / "valid.json", "train")) == 3
    assert len(open_dataset(copies["yolo"] / "data.yaml", "valid")) == 3
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="split: expected one of train, valid, test, got 'dev'"):
        open_dataset(copies["coco"], "dev")
    looked_for = (
        r"no valid split found; looked for COCO \(valid.json, valid/_annotations.*YOLO \(data.yaml\) and "
        r"Pascal VOC \(Annotations/\*.xml with JPEGImages/, valid/\*.xml"
    )
    with pytest.raises(ValueError, match=looked_for):
        open_dataset(tmp_path, "valid")


def test_a_folder_of_several_formats_is_taken_as_coco(splits, tmp_path):
    for write in (write_voc, write_yolo, write_coco):
        write(tmp_path, splits)
    assert open_dataset(tmp_path, "train").source == tmp_path / "train.json"
    (tmp_path / "train.json").unlink()
    assert open_dataset(tmp_path, "train").source == tmp_path / "data.yaml"
    (tmp_path / "data.yaml").unlink()
    assert open_dataset(tmp_path, "train").source == tmp_path


# ------------------------------------------------------------------------------------------------------- the data set


def test_without_leaves_the_other_images_as_they_are(copies):
    dataset = open_dataset(copies["coco"], "train")
    part = dataset.without([0, 4])
    assert len(part) == 4 and part.left_out == ["1-000.png", "1-004.png"] and len(dataset) == 6
    for index, original in enumerate((1, 2, 3, 5)):
        image, target = part[index]
        expected_image, expected = dataset[original]
        assert torch.equal(image, expected_image) and target["image_id"] == expected["image_id"]
        assert torch.equal(target["boxes"], expected["boxes"]) and torch.equal(target["labels"], expected["labels"])
    assert len(Numbering(part).ground_truth()["annotations"]) == sum(len(part.targets(i)[0]) for i in range(4))
    assert len(dataset.without(range(6))) == 0


def test_a_copy_elsewhere_has_the_same_fingerprint(copies, splits, tmp_path):
    plain = fingerprint(open_dataset(copies["coco"], "train"))
    assert plain["names"].split("\0")[0] == "1-000.png" and len(plain["digests"]) == 16 * 6
    assert fingerprint(open_dataset(write_coco(tmp_path, splits), "train")) == plain
    assert fingerprint(open_dataset(copies["coco"], "valid")) != plain
    # VOC and YOLO keep their images in other folders, and the names are part of it; both layouts of a format agree
    # with themselves.
    assert fingerprint(open_dataset(copies["yolo"], "train")) == fingerprint(open_dataset(copies["yolo"], "train"))


CHANGES = {
    "name": ["1 image gone (1-002.png)", "1 image new (other.png)"],
    "box": ["1 image of another size or with other boxes (1-000.png)"],
    "label": ["1 image of another size or with other boxes (1-000.png)"],
    "size": ["1 image of another size or with other boxes (1-002.png)"],
    "classes": ["classes cat, dog, elk instead of cat, dog, emu"],
    "order": ["the same images in another order"],
    "images": ["2 images gone (1-004.png, 1-005.png)"],
    "all images": ["6 images gone (1-000.png, 1-001.png, 1-002.png, 1-003.png, 1-004.png, ...)"],
    "crowd": ["1 image of another size or with other boxes (1-000.png)"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_data_changes_the_fingerprint_and_is_named(copies, change):
    dataset = open_dataset(copies["coco"], "train")
    plain = fingerprint(dataset)
    if change == "name":
        dataset.images[2]["file_name"] = "other.png"
    elif change == "box":
        dataset.boxes.clipped[0, 2] += 0.001
    elif change == "label":
        dataset.boxes.labels[0] += 1
    elif change == "size":
        dataset.images[2]["width"] += 1
    elif change == "classes":
        dataset.class_names = ("cat", "dog", "elk")
    elif change == "order":
        order = [1, 0, 2, 3, 4, 5]
        dataset.images, dataset.boxes = [dataset.images[i] for i in order], dataset.boxes.select(order)
    elif change == "images":
        dataset = dataset.without([4, 5])
    elif change == "all images":
        dataset = dataset.without(range(6))
    else:
        dataset.boxes.target[0] = False
    assert fingerprint(dataset) != plain and changes(plain, plain) == []
    assert changes(plain, fingerprint(dataset)) == CHANGES[change]


def test_images_of_one_name_are_told_apart(copies):
    dataset = open_dataset(copies["coco"], "train")
    dataset.images[1]["file_name"] = dataset.images[0]["file_name"]
    plain = fingerprint(dataset)
    dataset.images[1]["width"] += 1
    assert changes(plain, fingerprint(dataset)) == ["1 image of another size or with other boxes (1-000.png)"]


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_cached_images_are_the_decoded_ones_and_cannot_be_spoilt(copies, splits, cache_mb):
    dataset = open_dataset(copies["coco"], "train", cache_mb=cache_mb)
    for _ in range(3):
        for index, scene in enumerate(splits["train"]):
            image, _ = dataset[index]
            assert np.array_equal(image.permute(1, 2, 0).numpy(), scene.pixels)
            image.zero_()


def test_a_cached_image_is_not_read_again(splits, tmp_path):
    folder = write_coco(tmp_path, splits)
    dataset = open_dataset(folder, "train", cache_mb=1)
    first = dataset[0][0]
    (folder / "train" / "1-000.png").unlink()
    assert torch.equal(dataset[0][0], first)
