from __future__ import annotations

from sparse_rcnn.data.coco import CocoDataset, find_split
from sparse_rcnn.engine.report import data_report


def test_the_report_counts_and_names_what_is_odd(write_coco):
    boxes = [(1, 1, [0, 0, 10, 10]), (1, 2, [5, 5, 10, 10]), (1, 2, [20, 20, 10, 10]), (2, 2, [1, 1, 5, 5])]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box}
        for number, (image, category, box) in enumerate(boxes, start=1)
    ]
    annotations.append({"id": 8, "image_id": 2, "category_id": 1, "bbox": [0, 0, 30, 30], "iscrowd": 1})
    annotations.append({"id": 9, "image_id": 2, "category_id": 1, "bbox": [5, 5, 0, 5]})
    folder = write_coco({1: (40, 40), 2: (40, 40), 3: (40, 40)}, {1: "cat", 2: "dog", 3: "cow"}, annotations)
    dataset = CocoDataset(*find_split(folder, "valid"))
    lines = data_report(dataset, num_proposals=2)
    assert lines[:5] == [
        "data: 3 images, 4 boxes, 3 classes",
        "  cat: 1 boxes",
        "  dog: 3 boxes",
        "  cow: 0 boxes",
        "  1 images without boxes (used as background)",
    ]
    assert lines[5].startswith("  warning: 1 images have more than the 2 boxes")
    assert "(at most 3; image ids 1)" in lines[5]
    assert len(lines) == 7 and lines[6].startswith("  problem: annotation 9 (2.png)")


def test_nothing_odd_adds_no_line(write_coco):
    folder = write_coco({1: (9, 9)}, {1: "cat"}, [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}])
    dataset = CocoDataset(*find_split(folder, "valid"))
    assert data_report(dataset, num_proposals=1) == ["data: 1 images, 1 boxes, 1 classes", "  cat: 1 boxes"]


def test_many_problems_are_cut_short(write_coco):
    annotations = [{"id": n, "image_id": 1, "category_id": 1, "bbox": [0, 0, 0, 5]} for n in range(1, 14)]
    folder = write_coco({1: (9, 9)}, {1: "cat"}, annotations)
    lines = data_report(CocoDataset(*find_split(folder, "valid")), num_proposals=5)
    assert sum(line.startswith("  problem: ") for line in lines) == 10
    assert lines[-1] == "  and 3 problems more"
