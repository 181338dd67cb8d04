"""Batches for training, a pure function of (seed, step), and a process's share of them."""

from __future__ import annotations

import atexit
import contextlib
import re
import signal
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_rcnn.data.decode import ImageError


def train_batches(
    dataset: Dataset,
    transform: Callable[[Tensor, dict, torch.Generator], tuple[Tensor, dict]],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    group_shapes: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Endless batches of transformed images. Every epoch visits every image once, in an order of its own.

    The batch of a step, augmentation included, depends on the data, the batch size, the seed and the step alone:
    starting at ``start_step`` gives what an uninterrupted run would have seen, with any number of workers, and the
    shares of all processes are together what a single one would see.

    Args:
        dataset: items (image uint8 [3, H, W], target).
        transform: as :class:`~sparse_rcnn.data.transforms.TrainTransform`.
        batch_size: images a batch; a batch may span two epochs.
        seed: non-negative.
        start_step: first step, from 0.
        workers: processes that load; 0 loads in this one.
        group_shapes: make batches of wide images and batches of tall ones, so that less of a batch is padding. At most
            two batches an epoch are mixed. Needs ``dataset.images`` with ``height`` and ``width``.
        share: (i, n): give part i of n equal parts of each batch.

    Raises:
        ValueError: the data set is empty or an argument is out of range.
        ImageError: from the iterator, when an image cannot be decoded; the message names it.
        LoaderError: inside of :func:`lost_workers`, when a worker dies.
    """
    if len(dataset) == 0:
        raise ValueError("dataset: expected at least one image, got none")
    for name, value, least in (
        ("batch_size", batch_size, 1), ("seed", seed, 0), ("start_step", start_step, 0), ("workers", workers, 0)
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    part, parts = share
    if batch_size % parts:
        raise ValueError(f"batch_size: expected a multiple of {parts}, the number of parts, got {batch_size}")
    size = batch_size // parts
    wide = np.zeros(len(dataset), dtype=bool)
    if group_shapes:
        wide = np.array([image["width"] > image["height"] for image in dataset.images])
    loader = DataLoader(
        _Samples(dataset, transform, seed),
        batch_sampler=_Order(wide, batch_size, seed, start_step, slice(part * size, (part + 1) * size)),
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
    )
    batches = _raising(loader)
    atexit.register(_close, weakref.ref(batches))
    return batches


def _close(batches: weakref.ref[Generator[Any]]) -> None:
    """End the workers before Python exits: it would send them SIGTERM, which they ignore, and wait for ever.

    Batches that are still held then are those of a program that failed, by the traceback.
    """
    held = batches()
    if held is not None:
        held.close()


def _ignore_signals(worker: int) -> None:
    """Let a worker go on when a terminal or a scheduler signals all processes: it is the main one that ends the run.

    A worker that died of it would end the run before the checkpoint. They end with the main process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class LoaderError(RuntimeError):
    """A loader process died."""


@contextlib.contextmanager
def lost_workers() -> Iterator[None]:
    """Say in a :class:`LoaderError` what PyTorch raises, wherever the program is just then, when a worker dies."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*?)\.?\s*(?:\n|$)", str(error))
        if found is None:
            raise
        raise LoaderError(
            f"loader worker {found[1]} {found[2]}; where memory ran out, fewer workers or a smaller cache_mb help"
        ) from error


def _raising(loader: DataLoader) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    for batch in loader:
        if isinstance(batch, ImageError):
            raise batch
        yield batch


def _collate(samples: list[tuple[Tensor, dict] | ImageError]) -> tuple[list[Tensor], list[dict]] | ImageError:
    """Separate images from targets; an error goes through as a value, for a worker would wrap it in a traceback."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class _Order:
    """Parts of endless batches of (position in the run, image index), of one group as far as that goes."""

    def __init__(self, group: np.ndarray, batch_size: int, seed: int, start_step: int, part: slice) -> None:
        self.group, self.batch_size, self.seed, self.start_step, self.part = group, batch_size, seed, start_step, part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, epoch, order, num_images = self.start_step * self.batch_size, -1, None, len(self.group)
        while True:
            batch = []
            for _ in range(self.batch_size):
                if position // num_images != epoch:
                    epoch = position // num_images
                    order = self._epoch(epoch)
                batch.append((position, order[position % num_images]))
                position += 1
            yield batch[self.part]

    def _epoch(self, epoch: int) -> list[int]:
        """A permutation of the images, reordered so that each batch that lies within the epoch is of one group."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.group)).tolist()
        first = -epoch * len(self.group) % self.batch_size  # images that complete the last epoch's last batch
        arranged, waiting = order[:first], {False: [], True: []}
        for index in order[first:]:
            group = waiting[bool(self.group[index])]
            group.append(index)
            if len(group) == self.batch_size:
                arranged += group
                group.clear()
        return arranged + waiting[False] + waiting[True]


class _Samples(Dataset):
    """Transformed samples by (position, index); the position, with the seed, decides the augmentation."""

    def __init__(self, dataset: Dataset, transform: Callable, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict] | ImageError:
        position, index = key
        # The 1 keeps these streams apart from those of the epochs' orders.
        state = np.random.SeedSequence([self.seed, position, 1]).generate_state(1, dtype=np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        try:
            return self.transform(*self.dataset[index], generator)
        except ImageError as error:  # of this image or, from the transform, of another
            return error
