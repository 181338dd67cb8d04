from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.yolo import label_path


def write(root: Path, yaml: str, labels: dict[str, str], size=(40, 20)) -> Path:
    """A data set with ``images/<name>.png`` for each of ``labels`` (name -> text, None for no file)."""
    for name, text in labels.items():
        image, label = root / "images" / f"{name}.png", root / "labels" / f"{name}.txt"
        image.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(image)
        if text is not None:
            label.write_text(text, encoding="utf-8")
    (root / "data.yaml").write_text(yaml, encoding="utf-8")
    return root


YAML = "train: images\nval: images\nnames: [cat, dog]\n"


def boxes_of(root: Path, index: int = 0) -> list:
    boxes, labels = open_dataset(root, "train").targets(index)
    return [[label, *box] for label, box in zip(labels.tolist(), boxes.tolist(), strict=True)]


def test_boxes_polygons_and_background(tmp_path):
    polygon = "1 0.1 0.2 0.5 0.1 0.9 0.95 0.3 0.5"
    root = write(tmp_path, YAML, {"a": f"0 0.5 0.5 0.5 0.5\n\n{polygon}\n", "b": "", "c": None, "d": "1.0 .5 .5 1 1"})
    assert boxes_of(root) == [[0, 10, 5, 30, 15], [1, 4, 2, 36, 19]]
    assert boxes_of(root, 1) == [] and boxes_of(root, 2) == [] and boxes_of(root, 3) == [[1, 0, 0, 40, 20]]
    assert open_dataset(root, "train").problems == []


def test_boxes_that_reach_outside_are_clipped_and_reported(tmp_path):
    root = write(tmp_path, YAML, {"a": "0 0.9 0.5 0.4 0.5\n0 1.5 0.5 0.2 0.2\n0 nan 0.5 0.2 0.2\n0 .5 .5 0 0"})
    dataset = open_dataset(root, "train")
    assert boxes_of(root) == [[0, 28, 5, 40, 15]]
    assert [problem.split(" (")[0] for problem in dataset.problems] == [f"a.txt line {n}" for n in (1, 2, 3, 4)]
    endings = ("clipped", "dropped", "is not finite, dropped", "has no area, dropped")
    assert all(problem.endswith(end) for problem, end in zip(dataset.problems, endings, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 .5 .5 .1 .1", "expected a class within 0..1, got 2"),
        ("-1 .5 .5 .1 .1", "expected a class within 0..1, got -1"),
        ("0.5 .5 .5 .1 .1", "expected a class within 0..1, got 0.5"),
        ("nan .5 .5 .1 .1", "expected a class within 0..1, got nan"),
        ("cat .5 .5 .1 .1", "expected numbers, got 'cat .5 .5 .1 .1'"),
        ("0 .5 .5 .1", "expected class x y w h, or a class and at least three points, got 4 numbers"),
        ("0 .5 .5 .1 .1 .9", "got 6 numbers"),
        ("0", "got 1 numbers"),
    ],
)
def test_lines_that_cannot_be_read_are_listed(tmp_path, text, words):
    root = write(tmp_path, YAML, {"a": f"0 .5 .5 .1 .1\n{text}\n", "b": text})
    with pytest.raises(ValueError) as caught:
        open_dataset(root, "train")
    message = str(caught.value)
    assert message.startswith(f"{root}/data.yaml: 2 lines of labels cannot be read: ")
    assert f"a.txt line 2: {words}" in message or "line 2: expected" in message and words in message
    assert "b.txt line 1" in message and "\n" not in message


def test_labels_that_are_no_text_are_named(tmp_path):
    root = write(tmp_path, YAML, {"a": ""})
    (root / "labels" / "a.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(ValueError, match=r"1 lines of labels cannot be read: .*a\.txt: .*decode"):
        open_dataset(root, "train")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: [cat, dog]", ("cat", "dog")),
        ("names: {1: dog, 0: cat}", ("cat", "dog")),
        ("names: {'0': cat, '1': dog}", ("cat", "dog")),
        ("nc: 2\nnames: [cat, dog]", ("cat", "dog")),
        ("nc: 3", ("class_0", "class_1", "class_2")),
        ("names: [1, yes]", ("1", "True")),
    ],
)
def test_names(tmp_path, names, expected):
    dataset = open_dataset(write(tmp_path, f"train: images\n{names}\n", {"a": "0 .5 .5 .1 .1"}), "train")
    assert dataset.class_names == expected and dataset.category_ids == tuple(range(1, len(expected) + 1))


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("train: images", "names: expected a list of class names"),
        ("train: images\nnames: []", "names: expected a list of class names"),
        ("train: images\nnames: [[1], 2]", "names: expected a list of class names"),
        ("train: images\nnames: {0: a, 2: b}", "names: expected the keys 0 to 1, got 0, 2"),
        ("train: images\nnames: [a, a]", "names that occur more than once: a"),
        ("train: images\nnc: 3\nnames: [a, b]", "nc is 3, but there are 2 names"),
        ("val: images\nnames: [a]", "no train; there are val, names"),
        ("train: nowhere\nnames: [a]", "train: no such file or folder: .*nowhere"),
        ("train: {a: b}\nnames: [a]", "train: expected a path or a list of paths"),
        ("train: images\npath: 3\nnames: [a]", "train: expected a path or a list of paths"),
        ("train: labels\nnames: [a]", "train: no images in .*labels"),
        ("[1, 2]", "expected train, val and names, got"),
        ("a: b: c", "not a YAML file"),
        ("!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_yaml_files_that_cannot_be_used_are_refused_by_name(tmp_path, yaml, words):
    root = write(tmp_path, yaml, {"a": "0 .5 .5 .1 .1"})
    with pytest.raises(ValueError, match=words) as caught:
        open_dataset(root, "train")
    assert str(caught.value).startswith(f"{root}/data.yaml: ") and "\n" not in str(caught.value)


def test_where_the_images_are(tmp_path, monkeypatch):
    root = write(tmp_path / "data", YAML, {"train/a": "0 .5 .5 .1 .1", "train/deep/b": None, "valid/c": None})
    outside = tmp_path / "elsewhere"
    outside.mkdir()

    def names(yaml: str, split: str = "train", at: Path = root) -> list[str]:
        (at / "data.yaml").write_text(f"{yaml}\nnames: [cat]\n", encoding="utf-8")
        dataset = open_dataset(at, split)
        assert all(dataset.image_path(index).is_file() for index in range(len(dataset)))
        return [Path(image["file_name"]).stem for image in dataset.images]

    assert names("train: images/train") == ["a", "b"]
    assert names("train: images/train\nval: images/valid", "valid") == ["c"]
    assert names("train: x\nvalidation: images/valid", "valid") == ["c"]
    assert names("train: x\nval: x\ntest: images/valid", "test") == ["c"]
    assert names("train: [images/valid, images/train]") == ["a", "b", "c"]  # in the order of their paths
    assert names("train: [images/valid, images]") == ["a", "b", "c"]  # none twice
    assert names(f"path: {root}\ntrain: images/train", at=outside) == ["a", "b"]
    assert names(f"train: {root}/images/train", at=outside) == ["a", "b"]
    assert names("path: ../data\ntrain: images/train", at=outside) == ["a", "b"]
    assert names("path: /content/gone\ntrain: images/train") == ["a", "b"]  # written on another machine
    assert names("train: ../images/train") == ["a", "b"]  # as Roboflow has it
    monkeypatch.chdir(tmp_path)
    assert names("path: data\ntrain: images/valid", at=outside) == ["c"]
    monkeypatch.chdir(root)
    assert [image["file_name"] for image in open_dataset("data.yaml", "train").images] != []


def test_lists_of_images(tmp_path, monkeypatch):
    root = write(tmp_path, "train: lists/train.txt\nnames: [cat, dog]\n", {"a": "1 .5 .5 .5 .5", "b": None, "c": None})
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text(f"../images/c.png\n./../images/a.png\n\n{root}/images/b.png\n")
    dataset = open_dataset(root, "train")
    assert sorted(Path(image["file_name"]).name for image in dataset.images) == ["a.png", "b.png", "c.png"]
    assert sum(len(dataset.targets(index)[0]) for index in range(3)) == 1  # found from wherever the list leads
    monkeypatch.chdir(root)
    (root / "lists" / "train.txt").write_text("images/a.png\nimages/gone.png\n")
    dataset = open_dataset(root, "train")
    assert len(dataset) == 1 and dataset.left_out[0].endswith("images/gone.png")
    (root / "lists" / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"train\.txt: cannot read the list of images"):
        open_dataset(root, "train")


def test_unreadable_images_and_labels_without_an_image_are_reported(tmp_path):
    root = write(tmp_path, YAML, {"a": "0 .5 .5 .1 .1", "b": "0 .5 .5 .1 .1"})
    (root / "images" / "b.png").write_bytes(b"junk")
    (root / "labels" / "c.txt").write_text("0 .5 .5 .1 .1")
    (root / "labels" / "classes.txt").write_text("cat\ndog\n")
    dataset = open_dataset(root, "train")
    assert dataset.left_out == ["images/b.png"] and len(dataset) == 1
    assert dataset.problems == [
        "images/b.png: not an image of a known format, left out",
        f"{root / 'labels' / 'c.txt'}: labels without an image",
    ]
    (root / "images" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="train: no images in .*images; these are missing or unreadable: images/a.png"):
        open_dataset(root, "train")


def test_a_photograph_on_its_side_is_upright(tmp_path):
    """Fractions are of the image as people see it."""
    root = write(tmp_path, YAML, {"a": "0 0.5 0.25 1 0.5"})
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(root / "images" / "a.png", exif=exif)
    dataset = open_dataset(root, "train")
    assert (dataset.images[0]["height"], dataset.images[0]["width"]) == (40, 20)
    assert boxes_of(root) == [[0, 0, 0, 20, 20]] and dataset[0][0].shape == (3, 40, 20)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("images/a.b.jpg", "labels/a.b.txt"),
        ("/images/x/images/a.jpg", "/images/x/labels/a.txt"),
        ("/d/photos/a.jpg", "/d/photos/a.txt"),
        ("/d/my_images/images.jpg", "/d/my_images/images.txt"),
    ],
)
def test_label_path(image, label):
    assert label_path(Path(image)) == Path(label)


def test_the_only_yaml_file_with_class_names_is_taken(tmp_path):
    root = write(tmp_path, YAML, {"a": None})
    (root / "data.yaml").rename(root / "coco8.yaml")
    (root / "other.yaml").write_text("lr: 3")
    (root / "broken.yml").write_text("a: b: c")
    assert len(open_dataset(root, "train")) == 1
    (root / "other.yaml").write_text("nc: 3")
    with pytest.raises(ValueError, match="no train split found"):
        open_dataset(root, "train")


FIELDS = st.sampled_from(
    ["0", "1", "2", "-1", "0.5", "1e400", "nan", "-inf", "x", "", "0x1", "9" * 400, "\u0663", "1_0"]
)
LINES = st.lists(st.lists(FIELDS, max_size=9).map(" ".join), max_size=4).map("\n".join)


@given(LINES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_label_file_gives_boxes_inside_or_a_value_error(tmp_path, text):
    root = write(tmp_path, YAML, {"a": text})
    try:
        boxes, labels = open_dataset(root, "train").targets(0)
    except ValueError as error:
        assert "lines of labels cannot be read" in str(error)
    else:
        assert ((boxes >= 0) & (boxes <= [40, 20, 40, 20])).all() and (boxes[:, :2] < boxes[:, 2:]).all()
        assert set(labels.tolist()) <= {0, 1}
