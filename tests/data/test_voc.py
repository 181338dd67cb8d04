from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.engine.evaluator import Numbering
from tests.data_formats import voc_object


def document(*objects: str, size: str = "<size><width>40</width><height>30</height></size>", name: str = "") -> str:
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


def write(root: Path, documents: dict[str, str], suffix: str = ".png") -> Path:
    """XML files beside their images."""
    root.mkdir(exist_ok=True)
    for name, text in documents.items():
        Image.new("RGB", (40, 30)).save(root / f"{name}{suffix}")
        (root / f"{name}.xml").write_text(text, encoding="utf-8")
    return root


def test_pixels_count_from_one_and_the_last_one_is_in_the_box(tmp_path):
    root = write(tmp_path, {"a": document(voc_object("cat", (1, 1, 40, 30)), voc_object("cat", (11, 6, 20, 6)))})
    assert open_dataset(root, "train").targets(0)[0].tolist() == [[0, 0, 40, 30], [10, 5, 20, 6]]


def test_a_zero_anywhere_tells_that_they_count_from_zero(tmp_path):
    inside = voc_object("cat", (10.5, 5, 20, 15))
    root = write(tmp_path / "data", {"a": document(inside)})
    assert open_dataset(root, "train").targets(0)[0].tolist() == [[9.5, 4, 20, 15]]
    write(root, {"b": document(voc_object("cat", (0, 5, 40, 30)))})
    dataset = open_dataset(root, "train")
    assert dataset.targets(0)[0].tolist() == [[10.5, 5, 20, 15]]
    assert dataset.targets(1)[0].tolist() == [[0, 5, 40, 30]] and dataset.problems == []


def test_difficult_objects_are_no_targets_and_ignored_in_evaluation(tmp_path):
    objects = voc_object("dog", (1, 1, 9, 9)), voc_object("cat", (5, 5, 30, 30), difficult=True)
    dataset = open_dataset(write(tmp_path, {"a": document(*objects)}), "valid")
    boxes, labels = dataset.targets(0)
    assert boxes.tolist() == [[0, 0, 9, 9]] and labels.tolist() == [1] and dataset.class_names == ("cat", "dog")
    truth = Numbering(dataset).ground_truth()["annotations"]
    assert [(entry["category_id"], entry["iscrowd"]) for entry in truth] == [(2, 0), (1, 1)]


def test_classes_are_those_of_all_splits(tmp_path):
    write(tmp_path / "train", {"a": document(voc_object("dog", (1, 1, 9, 9)))})
    write(tmp_path / "valid", {"b": document(voc_object("cat", (1, 1, 9, 9)))})
    for split, label in (("train", 1), ("valid", 0)):
        dataset = open_dataset(tmp_path, split)
        assert dataset.class_names == ("cat", "dog") and dataset.targets(0)[1].tolist() == [label]
    # A model may know more classes than a VOC folder mentions, for it lists none.
    dataset = open_dataset(tmp_path, "train", class_names=("emu", "cat", "dog", "fox"))
    assert dataset.targets(0)[1].tolist() == [2] and len(set(dataset.category_ids)) == 4


def test_the_sets_of_the_original_layout(tmp_path):
    write(tmp_path / "all", {name: document(voc_object("cat", (1, 1, 9, 9))) for name in "abcd"})
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    for path in sorted((tmp_path / "all").iterdir()):
        path.rename(tmp_path / ("Annotations" if path.suffix == ".xml" else "JPEGImages") / path.name)

    def names(split: str) -> list[str]:
        return [image["file_name"] for image in open_dataset(tmp_path, split).images]

    assert names("train") == names("valid") == [f"JPEGImages/{name}.png" for name in "abcd"]  # not divided
    sets = tmp_path / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("b\na\n\n")
    (sets / "test.txt").write_text("c\n")
    assert names("train") == ["JPEGImages/b.png", "JPEGImages/a.png"]  # in the order of the list
    assert names("valid") == names("test") == ["JPEGImages/c.png"]
    (sets / "train.txt").write_text("a\n")
    (sets / "val.txt").write_text("d\ngone\n")
    assert names("train") == ["JPEGImages/a.png"] and names("valid") == ["JPEGImages/d.png"]
    dataset = open_dataset(tmp_path, "valid")
    assert dataset.left_out == ["gone"] and dataset.problems == ["Annotations/gone.xml: no such file, left out"]
    (sets / "val.txt").write_text("gone\n")
    with pytest.raises(ValueError, match="no image of the split can be read; missing: gone"):
        open_dataset(tmp_path, "valid")
    (sets / "val.txt").unlink()
    (sets / "test.txt").unlink()
    with pytest.raises(ValueError, match="no valid split found.*ImageSets/Main/val.txt, .*ImageSets/Main/test.txt"):
        open_dataset(tmp_path, "valid")


def test_images_are_found_by_the_name_of_the_xml_file_and_else_by_the_name_in_it(tmp_path):
    write(tmp_path, {"a.rf.12": document(voc_object("cat", (1, 1, 9, 9)), name="a.png")}, ".JPG")
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    inner = document(voc_object("cat", (1, 1, 9, 9)), name="C:/data/photo.png".rpartition(":")[2])
    (tmp_path / "b.xml").write_text(inner, encoding="utf-8")
    assert [i["file_name"] for i in open_dataset(tmp_path, "train").images] == ["a.rf.12.JPG", "photo.png"]


def test_images_without_a_size_without_xml_and_xml_without_an_image(tmp_path):
    thing = voc_object("cat", (1, 1, 9, 9))
    documents = {name: document(thing, size="<size><width>0</width></size>" if name == "a" else "") for name in "abcd"}
    root = write(tmp_path, documents)
    (root / "b.png").write_bytes(b"junk")
    (root / "c.png").unlink()
    (root / "d.xml").unlink()
    dataset = open_dataset(root, "train")
    assert [(i["file_name"], i["height"], i["width"]) for i in dataset.images] == [("a.png", 30, 40)]
    assert dataset.left_out == ["b.png", "c.xml"]
    assert dataset.problems == [
        "b.png: not an image of a known format, left out",
        "c.xml: no image of this name, left out",
        "d.png: an image without an XML file, left out",
    ]


BILLION_LAUGHS = (
    '<!DOCTYPE a [<!ENTITY a "cat">'
    + "".join(f'<!ENTITY {name} "{f"&{chr(ord(name) - 1)};" * 10}">' for name in "bcdefghijk")
    + "]><annotation><filename>&k;</filename></annotation>"
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.xml: not a Pascal VOC annotation: no element found"),
        ("<annotation>", "not a Pascal VOC annotation"),
        (document("<object><bndbox/></object>"), "an object has no name"),
        (document("<object><name>cat</name></object>"), "object cat: expected a bndbox with xmin, ymin, xmax and ymax"),
        (document("<object><name>cat</name><bndbox><xmin>1</xmin></bndbox></object>"), "expected a bndbox"),
        (document(voc_object("cat", (1, 2, "x", 4))), "could not convert string to float: 'x'"),
        (document(voc_object("cat", (1, 2, 3, 4)), size="<size><width>w</width></size>"), "could not convert"),
        (document(voc_object("cat", (1, 2, 3, 4)), size="<size><height>inf</height></size>"), "infinity"),
        (document(), "expected objects in the annotations, got none in 1 files"),
        (BILLION_LAUGHS, "a.xml: not a Pascal VOC annotation"),
    ],
)
def test_documents_that_cannot_be_used_are_refused_by_name(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_dataset(write(tmp_path, {"a": text}), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "corners", [(-50, 1, 9, 9), (1, 1, 41.5, 9), (35, 5, 30, 9), ("nan", 1, 9, 9), (1, 1, 9, "inf")]
)
def test_odd_boxes_are_mended_and_reported(tmp_path, corners):
    dataset = open_dataset(write(tmp_path, {"a": document(voc_object("cat", corners))}), "train")
    boxes, _ = dataset.targets(0)
    assert len(dataset.problems) == 1 and dataset.problems[0].startswith("a.xml object 1 (a.png): bbox [")
    assert ((boxes >= 0) & (boxes <= [40, 30, 40, 30])).all()


GOOD = document(voc_object("cat", (1, 1, 40, 30)), voc_object("dog", (5.5, 6, 20, 16), difficult=True), name="a.png")
ODD = ("", "0", "-1", "nan", "inf", "9" * 400, "x", "<a/>", "</object>", "<object>", "&amp;", "\x00", "1e30")


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 30), st.sampled_from(ODD))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spoilt_document_gives_boxes_inside_or_a_value_error(tmp_path, start, length, odd):
    root = write(tmp_path, {"a": GOOD[:start] + odd + GOOD[start + length :]})
    try:
        dataset = open_dataset(root, "train")
        boxes, labels = dataset.targets(0)
    except ValueError as error:
        assert str(error).startswith(str(root)) and "\n" not in str(error)
    else:
        height, width = dataset.images[0]["height"], dataset.images[0]["width"]
        assert ((boxes >= 0) & (boxes <= [width, height, width, height])).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all() and set(labels.tolist()) <= set(range(len(dataset.class_names)))
