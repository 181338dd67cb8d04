from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from sparse_rcnn.data.augment import SmallDataTransform
from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.loader import LoaderError, lost_workers, train_batches
from sparse_rcnn.data.synthetic import write_dataset
from sparse_rcnn.data.transforms import TrainTransform

TRANSFORM = TrainTransform((48, 64, 80), 120, crop=(40, 60))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DetectionDataset:
    path = write_dataset(tmp_path_factory.mktemp("data"), 7, seed=1, size=(48, 64), progress=False)
    return open_dataset(path, "train")


def take(count: int, *args, **kwargs) -> list:
    return list(itertools.islice(train_batches(*args, **kwargs), count))


def same(first: list, second: list) -> bool:
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        for a, b, s, t in zip(images, other_images, targets, other_targets, strict=True):
            if not (torch.equal(a, b) and s["image_id"] == t["image_id"]):
                return False
            if not (torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"])):
                return False
    return True


def test_batches_are_lists_of_images_and_targets(dataset):
    images, targets = next(train_batches(dataset, TRANSFORM, 3, seed=0))
    assert isinstance(images, list) and isinstance(targets, list) and len(images) == len(targets) == 3
    for image, target in zip(images, targets, strict=True):
        assert image.dtype == torch.uint8 and max(image.shape[1:]) <= 120
        assert target["boxes"].dtype == torch.float32 and len(target["boxes"]) == len(target["labels"])


def test_every_epoch_visits_every_image_once_in_its_own_order(dataset):
    batches = take(21, dataset, TRANSFORM, 2, seed=0)  # 42 images, six epochs of seven
    ids = [target["image_id"] for _, targets in batches for target in targets]
    epochs = [tuple(ids[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(1, 8)) for epoch in epochs)
    assert len(set(epochs)) == 6


@pytest.mark.parametrize("start", [1, 5, 12])
def test_resuming_gives_the_batches_of_an_uninterrupted_run(dataset, start):
    whole = take(15, dataset, TRANSFORM, 3, seed=4)
    assert same(whole[start:], take(15 - start, dataset, TRANSFORM, 3, seed=4, start_step=start))


def test_workers_give_the_same_batches(dataset):
    assert same(
        take(6, dataset, TRANSFORM, 2, seed=4, start_step=2),
        take(6, dataset, TRANSFORM, 2, seed=4, start_step=2, workers=2),
    )


def test_seeds_and_epochs_differ_in_augmentation(dataset):
    assert not same(take(1, dataset, TRANSFORM, 7, seed=0), take(1, dataset, TRANSFORM, 7, seed=1))
    first, second = take(2, dataset, TRANSFORM, 7, seed=0)
    shapes = [{t["image_id"]: tuple(i.shape) for i, t in zip(*batch, strict=True)} for batch in (first, second)]
    assert shapes[0] != shapes[1]


def test_global_random_state_plays_no_part(dataset):
    torch.manual_seed(1)
    first = take(3, dataset, TRANSFORM, 2, seed=0)
    torch.manual_seed(2)
    assert same(first, take(3, dataset, TRANSFORM, 2, seed=0))


def test_a_batch_may_be_larger_than_the_data(dataset):
    ((_, targets),) = take(1, dataset, TRANSFORM, 16, seed=0)
    assert sorted(t["image_id"] for t in targets[:7]) == list(range(1, 8)) and len(targets) == 16


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_file_is_named(tmp_path, workers):
    (tmp_path / "train").mkdir()
    images = []
    for number in range(4):
        Image.new("RGB", (20, 16)).save(tmp_path / "train" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 16, "width": 20})
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    (tmp_path / "train" / "2.png").write_bytes(b"junk")
    dataset = open_dataset(path, "train")
    with pytest.raises(ImageError, match=r"^[^\n]*2\.png: not an image of a known format$"):
        take(2, dataset, TRANSFORM, 2, seed=0, workers=workers)
    mosaics = SmallDataTransform((48,), 80, others=dataset)
    with pytest.raises(ImageError, match=r"^[^\n]*2\.png: not an image of a known format$"):
        take(20, [dataset[0], dataset[1]], mosaics, 2, seed=0, workers=workers)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed"), ({"start_step": -1}, "start_step"),
     ({"workers": -1}, "workers"), ({"dataset": []}, "dataset")],
)  # fmt: skip
def test_bad_arguments_are_named_at_once(dataset, arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        train_batches(**{"dataset": dataset, "transform": TRANSFORM, "batch_size": 1, "seed": 0, **arguments})


def test_a_program_that_fails_with_workers_at_work_ends(dataset):
    """Its batches are still held when Python exits, for the traceback holds them."""
    program = f"""
from sparse_rcnn.data.formats import open_dataset
from sparse_rcnn.data.loader import train_batches
from tests.data.test_loader import TRANSFORM
batches = train_batches(open_dataset({str(dataset.source)!r}, "train"), TRANSFORM, 2, seed=0, workers=2)
next(batches)
raise KeyError("a mistake")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1 and ended.stderr.endswith("KeyError: 'a mistake'\n")


class Shaped(Dataset):
    """Images that are their own index, wide where asked for."""

    def __init__(self, wide: list[bool]) -> None:
        self.images = [{"width": 60 if w else 40, "height": 50} for w in wide]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return torch.zeros(3, 50, self.images[index]["width"], dtype=torch.uint8), {"image_id": index}


def unchanged(image, target, generator):
    return image, target


@pytest.mark.parametrize(("count", "batch"), [(24, 4), (25, 4), (7, 3), (10, 16), (11, 1)])
def test_grouped_batches_are_of_one_shape_but_for_two_an_epoch(count, batch):
    data = Shaped([index % 3 == 0 for index in range(count)])
    epochs = 6
    batches = take(count * epochs // batch, data, unchanged, batch, seed=3, group_shapes=True)
    ids = [target["image_id"] for _, targets in batches for target in targets]
    whole = len(ids) // count
    orders = [tuple(ids[epoch * count : (epoch + 1) * count]) for epoch in range(whole)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len(set(orders)) == whole or count < 8  # each epoch has an order of its own
    mixed = sum(len({tuple(image.shape) for image in images}) > 1 for images, _ in batches)
    assert mixed <= 2 * epochs
    if batch == 4:
        plain = take(len(batches), data, unchanged, batch, seed=3)
        assert mixed < 0.6 * sum(len({tuple(image.shape) for image in images}) > 1 for images, _ in plain)


@pytest.mark.parametrize("start", [1, 6, 13])
def test_resuming_grouped_batches_gives_those_of_an_uninterrupted_run(start):
    data = Shaped([index % 3 == 0 for index in range(11)])
    whole = take(20, data, unchanged, 4, seed=5, group_shapes=True)
    rest = take(20 - start, data, unchanged, 4, seed=5, start_step=start, group_shapes=True)
    assert [[t["image_id"] for t in targets] for _, targets in rest] == [
        [t["image_id"] for t in targets] for _, targets in whole[start:]
    ]


def test_images_of_one_shape_come_in_the_same_order_grouped_or_not():
    data = Shaped([True] * 9)
    a, b = (take(12, data, unchanged, 2, seed=0, group_shapes=group) for group in (True, False))
    assert [[t["image_id"] for t in targets] for _, targets in a] == [
        [t["image_id"] for t in targets] for _, targets in b
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_give_the_same_batches(dataset, workers):
    cached = open_dataset(dataset.source, "train", cache_mb=1)
    plain = take(9, dataset, TRANSFORM, 3, seed=2)
    assert same(plain, take(9, cached, TRANSFORM, 3, seed=2, workers=workers))
    assert all(cached._cache.get(index) is not None for index in range(7))  # also what the workers decoded


@pytest.mark.parametrize("group_shapes", [False, True])
def test_shares_are_together_the_batches_of_one_process(dataset, group_shapes):
    whole = take(5, dataset, TRANSFORM, 6, seed=4, start_step=3, group_shapes=group_shapes)
    shares = [
        take(5, dataset, TRANSFORM, 6, seed=4, start_step=3, group_shapes=group_shapes, share=(part, 3), workers=part)
        for part in range(3)
    ]
    together = [tuple(sum(parts, []) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]
    assert all(len(images) == 2 for images, _ in shares[0]) and same(whole, together)


def test_unequal_shares_are_refused(dataset):
    with pytest.raises(ValueError, match="^batch_size: expected a multiple of 2, the number of parts, got 3"):
        train_batches(dataset, TRANSFORM, 3, seed=0, share=(1, 2))


class Deadly(Dataset):
    """Kills who asks for the second image."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 4, 4, dtype=torch.uint8), {}


def test_a_worker_that_dies_is_told_in_one_line():
    advice = "where memory ran out, fewer workers or a smaller cache_mb help"
    with (
        pytest.raises(
            LoaderError, match=rf"^loader worker \d+ (is killed by signal: Killed|exited unexpectedly); {advice}$"
        ),
        lost_workers(),
    ):
        take(2, Deadly(), unchanged, 1, seed=0, workers=1)


def test_other_errors_go_through():
    with pytest.raises(RuntimeError, match="^something else$"), lost_workers():
        raise RuntimeError("something else")
