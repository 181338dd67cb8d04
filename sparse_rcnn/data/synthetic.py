"""Synthetic scenes for a detector: ten classes of drawn objects on textured backgrounds, as COCO-style data sets.

``python -m sparse_rcnn.data.synthetic DIR --train 1000 --valid 200 --seed 0``

Boxes are *visible* (modal) boxes, as in COCO: the tightest box around the pixels of the object that can be seen, after
other objects and the frame have hidden the rest. No object is hidden by more than ``1 - MIN_VISIBLE`` of its area; a
placement that would do so is not made, so every object in a picture is annotated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from .shapes import SHAPES, random_colour, render

CLASS_NAMES: tuple[str, ...] = tuple(SHAPES)
MIN_VISIBLE = 0.35
MIN_OBJECT, MAX_OBJECT = 12.0, 0.9  # longer side: pixels, and fraction of the shorter side of the frame
EMPTY_SCENES = 0.03
JPEG_QUALITY = 92


@dataclass
class _Placed:
    label: int
    area: int  # pixels of the whole object, hidden ones included
    visible: int


# -------------------------------------------------------------------------------------------------------- background


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise [height, width] float32 in about -1..1 with ``cells`` bumps along the longer side."""
    ratio = cells / max(height, width)
    grid = rng.uniform(-1, 1, (max(2, round(height * ratio)), max(2, round(width * ratio)))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A pattern [height, width] float32, about -1..1: noise of several octaves, a gradient, stripes, or tiles."""
    y, x = np.ogrid[0:height, 0:width]
    angle = rng.uniform(0, math.pi)
    along = ((x * math.cos(angle) + y * math.sin(angle)) / max(height, width)).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        cells = int(rng.integers(2, 6))
        return sum(_noise(rng, height, width, cells * 3**k) * 0.55**k for k in range(3))
    if kind == 1:
        return 2 * (along - along.min()) / (along.max() - along.min()) - 1
    bend = _noise(rng, height, width, 4) * rng.uniform(0, 0.1)
    waves = np.sin((along + bend) * (2 * math.pi * rng.uniform(3, 18)))
    if kind == 2:
        return np.tanh(waves * rng.uniform(0.6, 4))
    across = ((y * math.cos(angle) - x * math.sin(angle)) / max(height, width)).astype(np.float32)
    return np.tanh(waves * np.sin((across + bend) * (2 * math.pi * rng.uniform(3, 12))) * rng.uniform(1, 6))


def _clutter(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Strokes and jagged patches, blurred out of focus: things that are there but belong to no class."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 9)):
        colour = tuple(random_colour(rng, (0.0, 0.6), (0.15, 0.9)).astype(int).tolist())
        centre = rng.uniform((0, 0), (width, height))
        reach = rng.uniform(0.05, 0.3) * min(width, height)
        corners = centre + rng.uniform(-reach, reach, (int(rng.integers(3, 6)), 2))
        if rng.random() < 0.4:
            draw.line(corners.ravel().tolist(), fill=colour, width=int(rng.integers(2, 9)))
        else:
            draw.polygon(corners.ravel().tolist(), fill=colour)
    return image.filter(ImageFilter.BoxBlur(rng.uniform(1, 6)))


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A background [height, width, 3] float32, 0..255."""
    base, other = (random_colour(rng, (0.05, 0.5), (0.2, 0.9)).astype(np.float32) for _ in range(2))
    mix = np.clip(0.5 + 0.5 * _texture(rng, height, width), 0, 1)[..., None]
    image = base + (other - base) * mix * float(rng.uniform(0.3, 1.0))
    if rng.random() < 0.7:
        pixels = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(_clutter(rng, pixels), dtype=np.float32)
    grain = _noise(rng, height, width, max(height, width) // 3) * float(rng.uniform(0, 14))
    return image + grain[..., None]


# ------------------------------------------------------------------------------------------------------------- scene


def _cast_shadow(canvas: np.ndarray, alpha: np.ndarray, left: int, top: int, light: np.ndarray) -> None:
    """Darken ``canvas`` [H, W, 3] in place where the object's soft shadow falls, away from the lamp."""
    height, width = alpha.shape
    reach = max(1, round(0.06 * max(height, width)))
    padded = Image.fromarray(np.pad((alpha * 255).astype(np.uint8), 2 * reach))
    shadow = np.asarray(padded.filter(ImageFilter.BoxBlur(reach)), dtype=np.float32) / 255
    left, top = left - 2 * reach - round(light[0] * reach), top - 2 * reach - round(light[1] * reach)
    inside, outside = _overlap(shadow.shape, canvas.shape[:2], left, top)
    canvas[outside] *= 1 - 0.4 * shadow[inside][..., None]


def _overlap(tile: tuple[int, ...], frame: tuple[int, ...], left: int, top: int) -> tuple[tuple, tuple]:
    """Slices of the tile and of the frame that coincide when the tile's corner lies at (left, top)."""
    y0, y1 = max(0, top), min(frame[0], top + tile[0])
    x0, x1 = max(0, left), min(frame[1], left + tile[1])
    y1, x1 = max(y0, y1), max(x0, x1)
    return (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)), (slice(y0, y1), slice(x0, x1))


def _place(
    rng: np.random.Generator, mask: np.ndarray, owner: np.ndarray, placed: list[_Placed]
) -> tuple[int, int] | None:
    """Find (left, top) for an object where it and everything under it stay visible enough; None after six tries."""
    height, width = mask.shape
    area = int(mask.sum())
    for _ in range(6):
        left = int(rng.integers(-width // 5, owner.shape[1] - width + width // 5 + 1))
        top = int(rng.integers(-height // 5, owner.shape[0] - height + height // 5 + 1))
        inside, outside = _overlap(mask.shape, owner.shape, left, top)
        seen = mask[inside]
        hidden = np.bincount(owner[outside][seen], minlength=len(placed) + 1)[1:]
        enough = all(p.visible - h >= MIN_VISIBLE * p.area for p, h in zip(placed, hidden, strict=True))
        if enough and seen.sum() >= 2 * MIN_VISIBLE * area:
            return left, top
    return None


def _add_object(
    rng: np.random.Generator, canvas: np.ndarray, owner: np.ndarray, placed: list[_Placed], light: np.ndarray
) -> None:
    """Draw one object of a random class and size on ``canvas``, mark its pixels in ``owner`` by its index + 1."""
    label = int(rng.integers(len(CLASS_NAMES)))
    largest = max(MIN_OBJECT, MAX_OBJECT * min(owner.shape))
    size = math.exp(rng.uniform(math.log(MIN_OBJECT), math.log(largest)))
    colour, alpha = render(CLASS_NAMES[label], size, light, rng)
    mask = alpha >= 0.5
    position = _place(rng, mask, owner, placed)
    if position is None:
        return
    inside, outside = _overlap(mask.shape, owner.shape, *position)
    if rng.random() < 0.6:
        _cast_shadow(canvas, alpha, *position, light)
    colour = colour * (1 + rng.uniform(0, 0.12) * _noise(rng, *mask.shape, 9)[..., None])
    canvas[outside] += (colour[inside] - canvas[outside]) * alpha[inside][..., None]
    covered = owner[outside][mask[inside]]
    for index, hidden in enumerate(np.bincount(covered, minlength=len(placed) + 1)[1:]):
        placed[index].visible -= int(hidden)
    owner[outside][mask[inside]] = len(placed) + 1
    placed.append(_Placed(label, int(mask.sum()), int(mask[inside].sum())))


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Uneven light, sensor noise and sometimes a slight blur: [H, W, 3] float32 -> uint8."""
    height, width = canvas.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    tilt = rng.uniform(-0.2, 0.2, 2)
    lighting = rng.uniform(0.8, 1.15) * (1 + tilt[0] * x + tilt[1] * y) - rng.uniform(0, 0.12) * (x * x + y * y)
    cast = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    image = canvas * lighting.astype(np.float32)[..., None] * cast
    image += np.float32(rng.uniform(0, 7)) * rng.standard_normal((height, width, 1), dtype=np.float32)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
        pixels = np.array(blurred)
    return pixels


def make_scene(seed: int, size: tuple[int, int] = (256, 320)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one scene: 1 to 12 objects (3 % of the scenes have none), later ones in front of earlier ones.

    Args:
        seed: non-negative; the same seed and size give the same bytes.
        size: (height, width) in pixels, each at least 16.

    Returns:
        image [H, W, 3] uint8 RGB; boxes [M, 4] float32 xyxy in pixels, of the visible part of each object; labels [M]
        int64, indices into ``CLASS_NAMES``.

    Raises:
        ValueError: a side is below 16 pixels or the seed is negative.
    """
    height, width = size
    if min(size) < 16:
        raise ValueError(f"size: expected (height, width) of at least 16 pixels each, got {tuple(size)}")
    if seed < 0:
        raise ValueError(f"seed: expected a non-negative integer, got {seed}")
    rng = np.random.default_rng(seed)
    canvas = _background(rng, height, width)
    owner = np.zeros((height, width), dtype=np.int64)  # 0 background, i + 1 the i-th object
    placed: list[_Placed] = []
    angle = rng.uniform(-math.pi, 0)  # the lamp is somewhere above
    light = np.array([math.cos(angle), math.sin(angle)])
    for _ in range(0 if rng.random() < EMPTY_SCENES else int(rng.integers(1, 13))):
        _add_object(rng, canvas, owner, placed, light)
    boxes = np.zeros((len(placed), 4), dtype=np.float32)
    for index in range(len(placed)):
        visible = owner == index + 1
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return _photograph(rng, canvas), boxes, np.array([p.label for p in placed], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------- data set


def write_dataset(
    directory: str | Path,
    num_images: int,
    seed: int,
    size: tuple[int, int] = (256, 320),
    split: str = "train",
    progress: bool = True,
) -> Path:
    """Write ``<directory>/<split>/*.jpg`` and ``<directory>/<split>.json`` (COCO; category ids start at 1).

    Scene ``i`` of a split depends on (seed, split, i) only. The pictures appear under their final name when all of
    them are there, and the JSON last of all: what carries the final names is complete.

    Returns:
        the path of the JSON.

    Raises:
        ValueError: ``num_images`` is below 1, or the split is already there.
    """
    directory = Path(directory)
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    images, json_path = directory / split, directory / f"{split}.json"
    for path in (images, json_path):
        if path.exists():
            raise ValueError(f"{path} already exists: choose another directory or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=directory))
    try:
        coco = _write_scenes(scratch, num_images, _scene_seeds(seed, split, num_images), size, progress)
        partial = scratch / "instances.json"
        partial.write_text(json.dumps(coco))
        os.replace(partial, directory / f".{split}.json")
        scratch.chmod(0o755)  # mkdtemp made it private
        os.replace(scratch, images)
        os.replace(directory / f".{split}.json", json_path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return json_path


def _scene_seeds(seed: int, split: str, count: int) -> list[int]:
    """Seeds of the scenes of a split; different splits and seeds share none, but for a chance of about 2^-40."""
    sequence = np.random.SeedSequence([seed, *split.encode()])
    return sequence.generate_state(count, dtype=np.uint64).tolist()


def _write_scenes(directory: Path, count: int, seeds: list[int], size: tuple[int, int], progress: bool) -> dict:
    images, annotations = [], []
    for index in tqdm(range(count), desc="scenes", unit="img", disable=None if progress else True):
        image, boxes, labels = make_scene(seeds[index], size)
        name = f"{index:06d}.jpg"
        Image.fromarray(image).save(directory / name, quality=JPEG_QUALITY)
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "iscrowd": 0}
            annotations.append(annotation | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m sparse_rcnn.data.synthetic``."""
    parser = _Parser("sparse_rcnn.data.synthetic", description="Write a COCO-style data set of synthetic scenes.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="receives train.json, train/, valid.json, valid/")
    parser.add_argument("--train", type=int, default=0, metavar="N", help="number of training images")
    parser.add_argument("--valid", type=int, default=0, metavar="N", help="number of validation images")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("H", "W"), help="default 256 320")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write a training and/or a validation split. Exit codes: 0 done, 1 failed, 2 bad arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.train < 0 or args.valid < 0 or args.train + args.valid == 0:
        parser.error(f"--train and --valid: expected counts with a positive sum, got {args.train} and {args.valid}")
    if args.seed < 0:
        parser.error(f"--seed: expected a non-negative integer, got {args.seed}")
    if min(args.size) < 16:
        parser.error(f"--size: expected at least 16 pixels each way, got {args.size[0]} {args.size[1]}")
    try:
        for split, count in (("train", args.train), ("valid", args.valid)):
            if count:
                path = write_dataset(args.directory, count, args.seed, tuple(args.size), split)
                print(f"{path}: {count} scenes")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
