"""One data set, written in each format, for the tests of ``data`` and ``engine``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

CLASS_NAMES = ("cat", "dog", "emu")  # in alphabetical order, the only one that VOC knows


@dataclass
class Scene:
    """One picture and what is in it: (label, xmin, ymin, xmax, ymax) in whole pixels."""

    name: str
    pixels: np.ndarray
    boxes: list[tuple[int, int, int, int, int]]


def make_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng, scenes = np.random.default_rng(seed), []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(60, 120, 2))
        boxes = []
        for _ in range(int(rng.integers(0, 4)) if number else 3):  # the first one has some
            x0, y0 = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
            x1, y1 = int(rng.integers(x0 + 10, width + 1)), int(rng.integers(y0 + 10, height + 1))
            boxes.append((int(rng.integers(len(CLASS_NAMES))) if number else len(boxes), x0, y0, x1, y1))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        scenes.append(Scene(f"{seed}-{number:03d}", pixels, boxes))
    return scenes


def save(scene: Scene, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.pixels).save(folder / f"{scene.name}.png")


def write_coco(root: Path, splits: dict[str, list[Scene]]) -> Path:
    for split, scenes in splits.items():
        images, annotations = [], []
        for number, scene in enumerate(scenes, start=1):
            save(scene, root / split)
            height, width = scene.pixels.shape[:2]
            images.append({"id": number, "file_name": f"{scene.name}.png", "height": height, "width": width})
            for label, x0, y0, x1, y1 in scene.boxes:
                box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": label + 1, "image_id": number}
                annotations.append({"id": len(annotations) + 1, **box})
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def yolo_lines(scene: Scene) -> str:
    height, width = scene.pixels.shape[:2]
    return "".join(
        f"{label} {(x0 + x1) / 2 / width!r} {(y0 + y1) / 2 / height!r} {(x1 - x0) / width!r} {(y1 - y0) / height!r}\n"
        for label, x0, y0, x1, y1 in scene.boxes
    )


def write_yolo(root: Path, splits: dict[str, list[Scene]]) -> Path:
    for split, scenes in splits.items():
        labels = root / "labels" / split
        labels.mkdir(parents=True, exist_ok=True)
        for scene in scenes:
            save(scene, root / "images" / split)
            if scene.boxes:  # background may have no file
                (labels / f"{scene.name}.txt").write_text(yolo_lines(scene), encoding="utf-8")
    text = "train: images/train\nval: images/valid\nnames:\n"
    text += "".join(f"  {label}: {name}\n" for label, name in enumerate(CLASS_NAMES))
    (root / "data.yaml").write_text(text, encoding="utf-8")
    return root


def voc_object(name: str, corners: tuple, difficult: bool = False) -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    flag = f"<difficult>{int(difficult)}</difficult>"
    return f"<object><name>{escape(name)}</name>{flag}<bndbox>{sides}</bndbox></object>"


def voc_xml(scene: Scene) -> str:
    height, width = scene.pixels.shape[:2]
    objects = "".join(voc_object(CLASS_NAMES[label], (x0 + 1, y0 + 1, x1, y1)) for label, x0, y0, x1, y1 in scene.boxes)
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>elsewhere.png</filename>{size}{objects}</annotation>"


def write_voc(root: Path, splits: dict[str, list[Scene]]) -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, scenes in splits.items():
        for scene in scenes:
            save(scene, root / "JPEGImages")
            (root / "Annotations" / f"{scene.name}.xml").write_text(voc_xml(scene), encoding="utf-8")
        names = "".join(f"{scene.name}\n" for scene in scenes)
        (root / "ImageSets" / "Main" / f"{'val' if split == 'valid' else split}.txt").write_text(names)
    return root


def write_roboflow_voc(root: Path, splits: dict[str, list[Scene]]) -> Path:
    for split, scenes in splits.items():
        for scene in scenes:
            save(scene, root / split)
            (root / split / f"{scene.name}.xml").write_text(voc_xml(scene), encoding="utf-8")
    return root


def make_splits() -> dict[str, list[Scene]]:
    return {"train": make_scenes(6, seed=1), "valid": make_scenes(3, seed=2)}


WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc, "roboflow-voc": write_roboflow_voc}
