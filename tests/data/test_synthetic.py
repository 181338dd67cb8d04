from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from sparse_rcnn.data import synthetic
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.shapes import SHAPES, render
from sparse_rcnn.data.synthetic import CLASS_NAMES, MIN_VISIBLE, main, make_scene, write_dataset

LAMP = np.array([0.0, -1.0])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [12.0, 47.3, 150.0])
def test_an_object_just_fills_its_tile(name, size):
    colour, alpha = render(name, size, LAMP, np.random.default_rng(3))
    assert max(alpha.shape) == math.ceil(size)
    assert colour.shape == (*alpha.shape, 3) and colour.min() >= 0 and colour.max() <= 255
    rows, columns = np.flatnonzero((alpha >= 0.5).any(1)), np.flatnonzero((alpha >= 0.5).any(0))
    # A pointed tip may cover less than half of its outermost pixels.
    slack = 2 + 0.05 * size
    assert rows[0] <= slack and columns[0] <= slack
    assert rows[-1] >= alpha.shape[0] - 1 - slack and columns[-1] >= alpha.shape[1] - 1 - slack


def test_a_ball_has_the_area_of_an_ellipse_and_is_lit_from_the_lamp():
    colour, alpha = render("ball", 100.0, LAMP, np.random.default_rng(0))
    assert alpha.sum() == pytest.approx(math.pi / 4 * alpha.shape[0] * alpha.shape[1], rel=0.03)
    half = alpha.shape[0] // 2
    assert colour[:half].sum() > 1.2 * colour[half:].sum()


def test_the_hole_of_a_ring_is_open():
    _, alpha = render("ring", 100.0, LAMP, np.random.default_rng(0))
    height, width = alpha.shape
    assert alpha[height // 2, width // 2] == 0 and alpha[height // 2, 3] == 1


def test_same_seed_same_bytes():
    for seed in (0, 7, 2**63):
        first, second = make_scene(seed), make_scene(seed)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(make_scene(1)[0], make_scene(2)[0])


def test_the_scenes_of_the_demo_model_stay_what_they_are():
    """The bundled model was trained on seed 1: a change of the generator would part it from its own recipe."""
    seeds = synthetic._scene_seeds(1, "train", 6000)
    assert seeds[:2] == synthetic._scene_seeds(1, "train", 2) == [10996506313556293932, 5889727115614513332]
    image, boxes, labels = make_scene(seeds[0])
    assert [CLASS_NAMES[label] for label in labels] == ["mushroom", "cone", "ball", "cone", "ball", "ring"]
    expected = [
        [60, 34, 79, 52], [156, 67, 240, 179], [157, 177, 210, 230], [0, 0, 53, 74], [37, 185, 58, 206],
        [124, 27, 254, 157],
    ]  # fmt: skip
    # Another Pillow may draw an edge one pixel further.
    np.testing.assert_allclose(boxes, expected, atol=1)
    # Of 255 levels, and so small that no object can change its colour: it allows for Pillow's rounding alone.
    np.testing.assert_allclose(image.mean((0, 1)), [85.4, 56.9, 82.0], atol=0.5)


def test_types_shapes_and_ranges():
    image, boxes, labels = make_scene(5, size=(96, 200))
    assert image.shape == (96, 200, 3) and image.dtype == np.uint8
    assert boxes.dtype == np.float32 and labels.dtype == np.int64 and boxes.shape == (len(labels), 4)


def test_scenes_cover_classes_sizes_and_counts():
    scenes = [make_scene(seed, size=(192, 240)) for seed in range(150)]
    boxes, labels = np.concatenate([s[1] for s in scenes]), np.concatenate([s[2] for s in scenes])
    assert set(labels.tolist()) == set(range(len(CLASS_NAMES))) and len(CLASS_NAMES) == 10
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (240, 192)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert (longer < 20).mean() > 0.1 and (longer > 120).mean() > 0.05 and longer.max() <= 0.9 * 192 + 1
    counts = [len(s[2]) for s in scenes]
    assert min(counts) == 0 and 10 <= max(counts) <= 12
    assert all(s[0].std() > 3 for s in scenes)


def test_hidden_objects_keep_their_minimum():
    """The bookkeeping of what is visible, against the owner map that it describes."""
    occluded = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        canvas, owner, placed = np.zeros((128, 128, 3), np.float32), np.zeros((128, 128), np.int64), []
        for _ in range(12):
            synthetic._add_object(rng, canvas, owner, placed, LAMP)
        for index, item in enumerate(placed):
            assert item.visible == (owner == index + 1).sum() >= MIN_VISIBLE * item.area
            occluded += item.visible < 0.8 * item.area
    assert occluded > 10


def test_boxes_are_tight_around_what_is_seen(monkeypatch):
    """On a flat background, without grain or shadow, every pixel that is not background lies in a box and bounds it."""
    monkeypatch.setattr(synthetic, "_background", lambda rng, h, w: np.full((h, w, 3), 127.5, np.float32))
    monkeypatch.setattr(synthetic, "_cast_shadow", lambda *args: None)
    monkeypatch.setattr(synthetic, "_photograph", lambda rng, canvas: canvas)
    checked = 0
    for seed in range(60):
        image, boxes, _ = make_scene(seed, size=(128, 160))
        if len(boxes) != 1:
            continue
        checked += 1
        rows, columns = (np.flatnonzero((image != 127.5).any(2).any(axis)) for axis in (1, 0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # Faint anti-aliased pixels (alpha below one half) may stick out of the box.
        outside = (seen - boxes[0]) * (-1, -1, 1, 1)
        assert (outside >= 0).all() and (outside <= 1 + 0.05 * (seen[2:] - seen[:2]).max()).all()
    assert checked >= 3


@pytest.mark.parametrize(("arguments", "name"), [((0, (8, 64)), "size"), ((-1,), "seed")])
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        make_scene(*arguments)


def test_write_dataset_is_readable_and_repeatable(tmp_path):
    path = write_dataset(tmp_path / "a", 6, seed=3, size=(64, 80), progress=False)
    again = write_dataset(tmp_path / "b", 6, seed=3, size=(64, 80), progress=False)
    other = write_dataset(tmp_path / "a", 6, seed=3, size=(64, 80), split="valid", progress=False)
    assert path == tmp_path / "a" / "train.json" and sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "train", "train.json", "valid", "valid.json",
    ]  # fmt: skip
    assert path.read_bytes() == again.read_bytes() != other.read_bytes()
    for file in (tmp_path / "a" / "train").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "train" / file.name).read_bytes()
    dataset = open_dataset(path, "train")
    assert dataset.class_names == CLASS_NAMES and dataset.problems == [] and len(dataset) == 6
    seed = synthetic._scene_seeds(3, "train", 6)[2]
    image, boxes, labels = make_scene(seed, (64, 80))
    loaded, target = dataset[2]
    assert np.array_equal(target["boxes"].numpy(), boxes) and np.array_equal(target["labels"].numpy(), labels)
    assert np.abs(loaded.permute(1, 2, 0).numpy().astype(int) - image).mean() < 12  # JPEG
    with pytest.raises(ValueError, match="already exists"):
        write_dataset(tmp_path / "a", 1, seed=0, progress=False)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def failing(seed, size):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.zeros((*size, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)

    monkeypatch.setattr(synthetic, "make_scene", failing)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 5, seed=0, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    arguments = [str(tmp_path), "--train", "3", "--valid", "2", "--size", "32", "48"]
    assert main(arguments) == 0
    assert len(json.loads((tmp_path / "valid.json").read_text())["images"]) == 2
    assert Image.open(tmp_path / "train" / "000002.jpg").size == (48, 32)
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparse_rcnn.data.synthetic: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "name"), [([], "--train"), (["--train", "x"], "--train"), (["--train", "1", "--seed", "-1"], "--seed")]
)
def test_command_line_usage_errors(tmp_path, capsys, flags, name):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and name in error
