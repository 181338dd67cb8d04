"""What is in a data set, said before the first step."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sparse_rcnn.engine.evaluator import ground_truth

_SHOWN = 10


def data_report(dataset: Any, num_proposals: int) -> list[str]:
    """Readable lines: counts, boxes per class, images with none or with more boxes than proposals, problems.

    Args:
        dataset: a ``CocoDataset``.
        num_proposals: of the model; of more boxes in an image, the surplus trains nothing.
    """
    annotations = [a for a in ground_truth(dataset)["annotations"] if not a["iscrowd"]]
    boxes_of = Counter(annotation["image_id"] for annotation in annotations)
    boxes_per_category = Counter(annotation["category_id"] for annotation in annotations)
    lines = [f"data: {len(dataset)} images, {len(annotations)} boxes, {len(dataset.class_names)} classes"]
    lines += [
        f"  {name}: {boxes_per_category[category]} boxes"
        for name, category in zip(dataset.class_names, dataset.category_ids, strict=True)
    ]
    ids = [image["id"] for image in dataset.images]
    empty = sum(boxes_of[image_id] == 0 for image_id in ids)
    if empty:
        lines.append(f"  {empty} images without boxes (used as background)")
    crowded = [image_id for image_id in ids if boxes_of[image_id] > num_proposals]
    if crowded:
        lines.append(
            f"  warning: {len(crowded)} images have more than the {num_proposals} boxes that the proposals can cover "
            f"(at most {max(boxes_of.values())}; image ids {_some(crowded)}); raise num_proposals"
        )
    lines += [f"  problem: {problem}" for problem in dataset.problems[:_SHOWN]]
    if len(dataset.problems) > _SHOWN:
        lines.append(f"  and {len(dataset.problems) - _SHOWN} problems more")
    return lines


def _some(values: list[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (", ..." if len(values) > _SHOWN else "")
