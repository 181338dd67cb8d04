from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.health import DataReport, check_data, identical

NETWORK = 40, 60  # what shortest and longest side are resized to


@pytest.fixture
def write(tmp_path):
    """Writes a COCO data set of noise: ``(images {name: (w, h)}, categories, boxes [(image, category, box)])``."""

    def write_(images, categories, boxes, name="data"):
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        rng = np.random.default_rng(len(name))
        for image, (width, height) in images.items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / image)
        numbers = {image: number for number, image in enumerate(images, start=1)}
        content = {
            "images": [
                {"id": numbers[image], "file_name": image, "width": size[0], "height": size[1]}
                for image, size in images.items()
            ],
            "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
            "annotations": [
                {"id": number, "image_id": numbers[image], "category_id": category, "bbox": box, **dict(more)}
                for number, (image, category, box, *more) in enumerate(boxes, start=1)
            ],
        }
        (folder / "train.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write_


def check(folder, proposals=100, **more) -> DataReport:
    return check_data(open_dataset(folder, "train"), proposals, NETWORK, **more)


def test_counts_and_notes(write):
    boxes = [("a.png", 1, [0, 0, 10, 10]), ("a.png", 2, [5, 5, 10, 10]), ("a.png", 2, [20, 20, 10, 10])]
    boxes += [("b.png", 2, [1, 1, 9, 9]), ("b.png", 1, [0, 0, 30, 30], ("iscrowd", 1)), ("b.png", 1, [5, 5, 0, 5])]
    report = check(write(dict.fromkeys(("a.png", "b.png", "c.png"), (40, 40)), ("cat", "dog", "cow"), boxes), 2)
    assert report.counts == [
        "data: 3 images, 4 boxes and 1 crowds or difficult objects (ignored), 3 classes",
        "dog: 3 boxes in 2 images (75.0%)",
        "cat: 1 boxes in 1 images (25.0%)",
        "cow: 0 boxes in 0 images (0.0%)",
    ]
    assert report.notes == [
        "classes without boxes, which cannot be learned: cow",
        "1 images without boxes (used as background)",
        "1 images have more than the 2 boxes that the proposals can cover (at most 3; a.png); raise num_proposals",
    ]
    assert report.problems == ["annotation 6 (b.png): bbox [5, 5, 0, 5] has no area, dropped"]
    assert report.unreadable == []
    assert report.short() == [
        report.counts[0],
        *(f"  {line}" for line in report.counts[1:]),
        *(f"  note: {line}" for line in report.notes),
        f"  problem: {report.problems[0]}",
    ]


def test_nothing_odd_adds_no_line(write):
    report = check(write({"a.png": (9, 9)}, ("cat",), [("a.png", 1, [0, 0, 5, 5])]), 1)
    assert report.short() == ["data: 1 images, 1 boxes, 1 classes", "  cat: 1 boxes in 1 images (100.0%)"]
    report.require_clean()


def test_tiny_boxes_are_measured_as_the_network_sees_them(write):
    boxes = [("a.png", 1, [0, 0, 7, 7]), ("a.png", 1, [0, 0, 8, 3]), ("b.png", 1, [0, 0, 3.9, 3.9])]
    boxes += [("b.png", 1, [0, 0, 4, 4])]
    report = check(write({"a.png": (80, 80), "b.png": (40, 40)}, ("cat",), boxes))  # a.png is halved
    assert report.notes == ["2 boxes of less than 4 pixels a side at network size; a larger min_size shows them"]


def test_unreadable_and_wrongly_sized_images(write):
    images = dict.fromkeys(("a.png", "b.png", "c.png", "d.jpg"), (40, 30))
    folder = write(images, ("cat",), [("a.png", 1, [0, 0, 9, 9])])
    (folder / "train" / "b.png").write_bytes(b"junk")
    Image.new("RGB", (41, 30)).save(folder / "train" / "c.png")
    (folder / "train" / "d.jpg").write_bytes((folder / "train" / "d.jpg").read_bytes()[:-200])
    report = check(folder)
    problems = ["b.png: not an image of a known format", "c.png: 41 x 30 pixels, but annotated as 40 x 30"]
    assert report.problems == problems and report.unreadable == [1, 2]
    report = check(folder, decode=True)  # finds the truncated one too
    assert report.unreadable == [1, 2, 3] and report.problems[:2] == problems
    assert report.problems[2].startswith("d.jpg: cannot decode the image: ") and "truncated" in report.problems[2]
    with pytest.raises(ValueError, match=r"^data: 3 problems: b.png: .*, c.png: .*, d.jpg: "):
        report.require_clean()


@pytest.mark.parametrize("size", [(40, 30), (30, 40)])
def test_a_photograph_on_its_side_may_be_annotated_either_way(write, size):
    folder = write({"a.jpg": size}, ("cat",), [("a.jpg", 1, [0, 0, 9, 9])])
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 30)).save(folder / "train" / "a.jpg", exif=exif)
    assert check(folder).problems == [] and check(folder, decode=True).problems == []


def test_boxes_that_occur_twice(write):
    boxes = [("a.png", 1, [0, 0, 9, 9]), ("a.png", 2, [0, 0, 9, 9]), ("b.png", 1, [0, 0, 9, 9])]
    boxes += [("b.png", 1, [0, 0, 9, 9]), ("b.png", 1, [0, 0, 9, 9])]
    report = check(write(dict.fromkeys(("a.png", "b.png"), (40, 40)), ("cat", "dog"), boxes))
    assert report.problems == ["b.png: 3 times the same box of class cat, [0.0, 0.0, 9.0, 9.0] (xyxy)"]


def test_images_that_occur_twice_and_leak_into_the_validation_split(write):
    names = ("a.png", "b.png", "c.png", "d.png")
    folder = write(dict.fromkeys(names, (40, 40)), ("cat",), [("a.png", 1, [0, 0, 9, 9])])
    shutil.copy(folder / "train" / "a.png", folder / "train" / "c.png")
    other = write(dict.fromkeys(("x.png", "y.png"), (40, 40)), ("cat",), [("x.png", 1, [0, 0, 0, 9])], "other")
    shutil.copy(folder / "train" / "a.png", other / "train" / "x.png")
    report = check(folder, val=open_dataset(other, "train"))
    assert report.problems == [
        "validation split: annotation 1 (x.png): bbox [0, 0, 0, 9] has no area, dropped",
        "the same image: a.png, c.png",
    ]
    assert report.notes[-1] == "1 images of the validation split are in the training split too"
    report = check(folder, val=open_dataset(folder, "train"))
    assert report.notes[-1] == "4 images of the validation split are in the training split too"


def test_identical_files_are_found_however_late_they_differ(tmp_path):
    contents = {"a": b"x" * 5000, "b": b"x" * 5000, "c": b"x" * 4999 + b"y", "d": b"x" * 4999, "e": b"", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    groups = identical([tmp_path / name for name in (*contents, "gone")])
    assert sorted([path.name for path in group] for group in groups) == [["a", "b"], ["e", "f"]]


def test_long_lists_are_cut_short_and_written_in_full(write, tmp_path):
    names = [f"class {number:02d}" for number in range(14)]
    boxes = [("a.png", number + 1, [0, 0, 9, 9 + k]) for number in range(14) for k in range(14 - number)]
    boxes += [("a.png", 1, [0, 0, 0, 5])] * 13
    report = check(write({"a.png": (40, 40)}, names, boxes))
    lines = report.short("run/data_report.txt")
    assert [line.split(":")[0].strip() for line in lines[1:12]] == [
        *names[:5],
        "... 4 classes between these ...",
        *names[-5:],
    ]
    assert sum(line.startswith("  problem: ") for line in lines) == 10
    assert lines[-2:] == ["  and 3 problems more", "  all of it: run/data_report.txt"]
    report.write(tmp_path / "report.txt")
    written = (tmp_path / "report.txt").read_text(encoding="utf-8").splitlines()
    assert written == report.full() and len(written) == 1 + 14 + len(report.notes) + 13


def test_an_empty_data_set_can_be_reported(write):
    assert check(write({}, ("cat",), [])).counts == [
        "data: 0 images, 0 boxes, 1 classes",
        "cat: 0 boxes in 0 images (0.0%)",
    ]
