from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_rcnn.data.coco import find_coco, read_coco
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.data.formats import open_dataset

GOOD = {
    "images": [
        {"id": 11, "file_name": "a.png", "height": 30, "width": 40},
        {"id": 5, "file_name": "sub/b.png", "height": 20, "width": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 11, "category_id": 9, "bbox": [1, 2, 10, 5], "area": 50, "iscrowd": 0},
        {"id": 2, "image_id": 11, "category_id": 3, "bbox": [0.5, 0.25, 39.5, 29.75]},
        {"id": 7, "image_id": 11, "category_id": 3, "bbox": [4, 4, 20, 20], "iscrowd": 1},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train" / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30), (9, 8, 7)).save(tmp_path / "train" / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "sub" / "b.png")
    return tmp_path


def write(folder, content) -> str:
    path = folder / "train.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(part: str, index: int, **entries):
    content = copy.deepcopy(GOOD)
    content[part][index].update(entries)
    return content


def test_reads_images_boxes_and_labels(folder):
    path = write(folder, GOOD)
    dataset = open_dataset(path, "train")
    assert len(dataset) == 2 and dataset.problems == []
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids == (3, 9)
    assert dataset.images[1] == GOOD["images"][1] and dataset.source == path
    image, target = dataset[0]
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8 and image[:, 5, 5].tolist() == [9, 8, 7]
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    assert target["boxes"].tolist() == [[1, 2, 11, 7], [0.5, 0.25, 40, 30]]  # without the crowd
    assert target["labels"].tolist() == [1, 0] and target["image_id"] == 11 and target["size"] == (30, 40)
    target["boxes"].zero_()
    assert dataset[0][1]["boxes"].sum() > 0  # a caller cannot change the data set


def test_an_image_without_boxes_stays(folder):
    image, target = open_dataset(write(folder, GOOD), "train")[1]
    assert image.shape == (3, 20, 20) and target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_more_boxes_than_any_model_has_proposals(folder):
    content = copy.deepcopy(GOOD)
    content["annotations"] = [
        {"id": i, "image_id": 5, "category_id": 3, "bbox": [i % 10, i // 100, 3, 3]} for i in range(1000)
    ]
    assert open_dataset(write(folder, content), "train")[1][1]["boxes"].shape == (1000, 4)


@pytest.mark.parametrize(
    ("box", "kept", "words"),
    [
        ([-5, -5, 15, 10], [0, 0, 10, 5], "clipped"),
        ([30, 20, 15, 15], [30, 20, 40, 30], "clipped"),
        ([0, 0, 40.004, 30], [0, 0, 40, 30], None),  # two-decimal rounding
        ([50, 5, 10, 10], None, "dropped"),
        ([40, 5, 10, 10], None, "dropped"),
        ([5, 5, 0, 10], None, "has no area"),
        ([5, 5, 10, -3], None, "has no area"),
        ([39.9999999, 5, 10, 10], None, "dropped"),  # a sliver that float32 cannot hold
        ([float("nan"), 5, 10, 10], None, "not finite"),
        ([5, 5, float("inf"), 10], None, "not finite"),
    ],
)
def test_mended_boxes_are_reported(folder, box, kept, words):
    dataset = open_dataset(write(folder, changed("annotations", 0, bbox=box)), "train")
    boxes = dataset[0][1]["boxes"].tolist()
    assert boxes == ([] if kept is None else [kept]) + [[0.5, 0.25, 40, 30]]
    assert len(dataset.problems) == (words is not None)
    if words:
        problem = dataset.problems[0]
        assert problem.startswith("annotation 1 (a.png): bbox [") and words in problem and "\n" not in problem


def test_an_annotation_of_an_unlisted_image_is_dropped_and_reported(folder):
    dataset = open_dataset(write(folder, changed("annotations", 0, image_id=99)), "train")
    assert dataset.problems == ["annotation 1: image_id 99 is not listed, dropped"]
    assert dataset[0][1]["labels"].tolist() == [0]


def without(part: str, index: int, key: str):
    content = copy.deepcopy(GOOD)
    del content[part][index][key]
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a JSON file"),
        ("{'single': 'quotes'}", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[1, 2]", "expected a JSON object with images, annotations and categories"),
        ("{}", "expected a list under 'images', got None"),
        ({**GOOD, "annotations": {"1": 2}}, "expected a list under 'annotations'"),
        ({**GOOD, "categories": []}, "annotation 1: unknown category_id 9"),
        ({**GOOD, "categories": [], "annotations": []}, "categories: expected at least one"),
        (changed("annotations", 1, category_id=77), "annotation 2: unknown category_id 77"),
        (changed("annotations", 1, category_id=[3]), r"annotation 2: unknown category_id \[3\]"),
        (without("annotations", 2, "category_id"), "annotation 7: unknown category_id None"),
        (without("annotations", 0, "bbox"), r"annotation 1: expected bbox \[x, y, w, h\], got None"),
        (changed("annotations", 0, bbox=[1, 2, 3]), r"annotation 1: expected bbox .* got \[1, 2, 3\]"),
        (changed("annotations", 0, bbox=[1, 2, "3", 4]), "annotation 1: expected bbox"),
        (changed("annotations", 0, bbox=[1, 2, 3, 10**400]), "annotation 1: expected bbox"),
        (changed("annotations", 0, image_id="11"), "annotation 1: expected an integer image_id"),
        (changed("annotations", 0, iscrowd="no"), "annotation 1: expected iscrowd 0 or 1, got 'no'"),
        (without("annotations", 0, "id"), "annotations: expected entries with an integer id"),
        (changed("annotations", 0, id=7), "annotation ids .* more than once: 7"),
        (changed("images", 0, id=5), "image ids .* more than once: 5"),
        (changed("images", 0, id="x"), "images: expected entries with an integer id"),
        (changed("images", 0, height=0), r"image 11 \(a.png\): expected positive integers .* got 0 and 40"),
        (changed("images", 0, height=10**400), r"image 11 \(a.png\): expected positive integers"),
        (without("images", 0, "width"), r"image 11 \(a.png\): expected positive integers"),
        (without("images", 0, "file_name"), "image 11: expected a file_name, got None"),
        ({**GOOD, "images": [3]}, "images: expected entries with an integer id, got 3"),
        (changed("categories", 0, id=3), "category ids .* more than once: 3"),
        (changed("categories", 0, name="cat"), "category ids or names that occur more than once: cat"),
        (without("categories", 0, "name"), "categories: expected entries with an integer id and a name"),
    ],
)
def test_unusable_files_are_refused_by_name(folder, content, words):
    path = write(folder, content)
    with pytest.raises(ValueError, match=words) as caught:
        open_dataset(path, "train")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(folder):
    path = folder / "train.json"
    path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match="not a JSON file"):
        open_dataset(path, "train")
    with pytest.raises(ValueError, match="none.json: cannot read the annotations: No such file"):
        read_coco(folder / "none.json", folder)


ODD_VALUES = (None, True, -1, 0, 3, 2**70, 1.5, float("nan"), float("-inf"), "", "x", [], [1], {}, {"id": 1})


def test_any_value_anywhere_gives_a_data_set_or_a_value_error(folder):
    """Every node of the JSON in turn is replaced by every odd value."""
    places = [(part, None, None, None) for part in GOOD]
    for part, entries in GOOD.items():
        for index, entry in enumerate(entries):
            places += [(part, index, None, None)] + [(part, index, key, None) for key in entry]
            places += [(part, index, "bbox", corner) for corner in range(4) if part == "annotations"]
    refused = 0
    for part, index, key, corner in places:
        for value in ODD_VALUES:
            content = copy.deepcopy(GOOD)
            route = [part] + [step for step in (index, key, corner) if step is not None]
            node = content
            for step in route[:-1]:
                node = node[step]
            node[route[-1]] = value
            try:
                dataset = open_dataset(write(folder, content), "train")
                boxes = [box for i in range(len(dataset)) for box in dataset.targets(i)[0].tolist()]
            except ValueError:
                refused += 1
            else:
                assert all(0 <= x0 < x1 <= 40 and 0 <= y0 < y1 <= 30 for x0, y0, x1, y1 in boxes)
    assert refused > 300


def test_missing_images_are_left_out_with_their_boxes(folder):
    dataset = open_dataset(write(folder, changed("images", 0, file_name="gone.png")), "train")
    assert dataset.left_out == ["gone.png"] and dataset.problems == ["gone.png: no such file, left out"]
    assert [image["id"] for image in dataset.images] == [5] and len(dataset[0][1]["boxes"]) == 0


def test_a_folder_without_the_images_is_refused(folder):
    content = copy.deepcopy(GOOD)
    content["images"] = [{"id": i, "file_name": f"n{i}.jpg", "height": 5, "width": 5} for i in (11, 5, *range(20, 27))]
    with pytest.raises(ValueError, match=r"all 9 image files are missing in .*: n11.jpg, n5.jpg, n20.jpg, .*, \.\.\.$"):
        open_dataset(write(folder, content), "train")


def test_class_names_decide_the_labels(folder):
    path = write(folder, GOOD)
    dataset = open_dataset(path, "train", class_names=["dog", "cat"])
    assert dataset.class_names == ("dog", "cat") and dataset.category_ids == (9, 3)
    assert dataset[0][1]["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="no category is named bird, cow; there are cat, dog"):
        open_dataset(path, "train", class_names=["bird", "cat", "cow", "dog"])
    with pytest.raises(ValueError, match="annotations of categories that are not in class_names: dog"):
        open_dataset(path, "train", class_names=["cat"])


def test_an_unused_category_that_repeats_a_name_goes(folder):
    content = copy.deepcopy(GOOD)
    content["categories"].append({"id": 0, "name": "dog"})
    dataset = open_dataset(write(folder, content), "train")
    assert dataset.category_ids == (3, 9) and dataset.problems[0].startswith("category 0 (dog)")


def test_undecodable_and_wrongly_sized_images_are_named(folder):
    dataset = open_dataset(write(folder, GOOD), "train")
    (folder / "train" / "a.png").write_bytes(b"junk")
    with pytest.raises(ImageError, match=r"a\.png: not an image"):
        dataset[0]
    Image.new("RGB", (21, 20)).save(folder / "train" / "sub" / "b.png")
    with pytest.raises(ImageError, match=r"b\.png: 21 x 20 pixels, but annotated as 20 x 20"):
        dataset[1]


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30)])
def test_the_recorded_size_tells_how_a_rotated_photograph_was_annotated(folder, height, width):
    exif = Image.Exif()
    exif[274] = 6
    stored = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(stored).save(folder / "train" / "a.png", exif=exif)
    image, _ = open_dataset(write(folder, changed("images", 0, height=height, width=width)), "train")[0]
    expected = stored if height == 30 else np.rot90(stored, -1)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def touch(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize(
    ("split", "json_name", "images"),
    [
        ("train", "train.json", "train"),
        ("valid", "valid.json", "valid"),
        ("valid", "val.json", "val"),
        ("test", "test.json", "test"),
        ("train", "train/_annotations.coco.json", "train"),
        ("valid", "valid/_annotations.coco.json", "valid"),
        ("train", "annotations/instances_train2017.json", "train2017"),
        ("valid", "annotations/instances_val2017.json", "val2017"),
    ],
)
def test_the_layouts(tmp_path, split, json_name, images):
    touch(tmp_path / json_name)
    (tmp_path / images).mkdir(exist_ok=True)
    expected = tmp_path / json_name, tmp_path / images
    assert find_coco(tmp_path, split)[0] == find_coco(tmp_path / json_name, split)[0] == expected


def test_a_file_has_its_images_beside_it(tmp_path):
    touch(tmp_path / "mine" / "labels.json")
    (tmp_path / "labels").mkdir()  # not beside it: somebody else's
    assert find_coco(tmp_path / "mine" / "labels.json", "train")[0][1] == tmp_path / "mine"
