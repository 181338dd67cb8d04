"""The part of a data set that a process evaluates, and how the parts come together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from sparse_rcnn.data.dataset import DetectionDataset
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.engine import distributed

T = TypeVar("T")


class Shard:
    """This process's images: every n-th batch of n processes, so that a batch is the same for any number of them.

    Args:
        dataset: what is evaluated.
        batch_size: images a forward pass.

    Attributes:
        indices: of its images in the data set, ascending.
        failed: index -> one line, of those that could not be read.
    """

    def __init__(self, dataset: DetectionDataset, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        batches = range(0, len(dataset), batch_size)[distributed.rank() :: distributed.world_size()]
        self.indices = [index for first in batches for index in range(len(dataset))[first : first + batch_size]]
        self.failed: dict[int, str] = {}

    def images(self) -> Iterator[tuple[int, Tensor]]:
        """Index and image, uint8 [3, H, W], of each that can be read."""
        for index in self.indices:
            try:
                image, _ = self.dataset[index]
            except ImageError as error:
                self.failed[index] = str(error)
            else:
                yield index, image

    def batches(self) -> Iterator[tuple[list[int], list[Tensor]]]:
        """The same, ``batch_size`` at a time."""
        images = self.images()
        while batch := list(islice(images, self.batch_size)):
            indices, pixels = zip(*batch, strict=True)
            yield list(indices), list(pixels)

    def bar(self, steps: Iterable[T], name: str, progress: bool) -> Iterator[T]:
        """``steps`` of an image each, with a progress bar in the main process."""
        shown = progress and distributed.is_main()
        return tqdm(steps, name, len(self.indices), leave=False, disable=None if shown else True)

    def gather(self, values: Mapping[int, T]) -> list[T]:
        """What all processes have by the indices of their images, in the order of the data set."""
        everything = {index: value for part in distributed.gather(dict(values)) for index, value in part.items()}
        return [everything[index] for index in sorted(everything)]
