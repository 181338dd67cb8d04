"""Images of any sizes in, their results out in the same order; batches of equal padding in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Item(Protocol):
    """What a pipeline takes: an image, or what is left of one that could not be read."""

    error: Exception | None
    shape: tuple[int, int]  # (height, width) that the image is padded to where it is alone; asked for without an error


@dataclass
class _Place:
    """In the order of the results."""

    item: Item | None  # None as soon as there is a result, so that its pixels go
    result: Any = None


class Pipeline:
    """Gathers images into batches, and puts the results into the images' order.

    A batch is of images that are padded to one shape, so that each is padded as if it were alone: results depend
    neither on the batch size nor on what other images there are. No more than ``window`` images are held at a time;
    where they do not fill a batch, the oldest ones run in a smaller one.

    Args:
        submit: begins to compute a batch; returns a call that waits for its results, one an item.
        on_error: told of the items with an error, in the order of the results; may raise.
        batch_size: images in a batch.
        window: images that are taken and neither given out nor dropped; at least ``depth`` batches.
        depth: batches that are under way. Above 1 the next one is made ready while one is computed.
    """

    def __init__(
        self,
        submit: Callable[[Sequence[Any]], Callable[[], Sequence[Any]]],
        on_error: Callable[[Any], None],
        batch_size: int,
        window: int,
        depth: int = 1,
    ) -> None:
        self.submit, self.on_error = submit, on_error
        self.batch_size, self.window, self.depth = batch_size, max(window, depth * batch_size), depth
        self._order: deque[_Place] = deque()
        self._groups: dict[tuple[int, int], list[_Place]] = {}  # that wait for more of their shape, oldest first
        self._running: deque[tuple[list[_Place], Callable[[], Sequence[Any]]]] = deque()

    def run(self, items: Iterable[Any]) -> Iterator[Any]:
        """Results of ``items`` in their order.

        Whatever ends it, in here or thrown into this generator, comes out of it only after the results that are there
        already: those that waited for one before them are not lost.
        """
        try:
            for item in items:
                self._take(item)
                yield from self._finished()
            while self._groups:
                self._launch(next(iter(self._groups)))
                yield from self._finished()
            while self._running:
                self._collect()
                yield from self._finished()
        except (Exception, KeyboardInterrupt):
            yield from [place.result for place in self._order if place.item is None]
            raise

    def _take(self, item: Any) -> None:
        place = _Place(item)
        self._order.append(place)
        if item.error is None:
            group = self._groups.setdefault(item.shape, [])
            group.append(place)
            if len(group) == self.batch_size:
                self._launch(item.shape)
        while len(self._order) >= self.window and not _is_done(oldest := self._order[0]):
            group = self._groups.get(oldest.item.shape)
            if group is not None and group[0] is oldest:
                self._launch(oldest.item.shape)
            else:
                self._collect()

    def _launch(self, shape: tuple[int, int]) -> None:
        places = self._groups.pop(shape)
        self._running.append((places, self.submit([place.item for place in places])))
        while len(self._running) >= self.depth:
            self._collect()

    def _collect(self) -> None:
        """Wait for the batch that has been under way for longest."""
        places, wait = self._running.popleft()
        for place, result in zip(places, wait(), strict=True):
            place.item, place.result = None, result

    def _finished(self) -> Iterator[Any]:
        """What nothing stands before any more."""
        while self._order and _is_done(self._order[0]):
            place = self._order.popleft()
            if place.item is None:
                yield place.result
                continue
            try:
                self.on_error(place.item)
            except Exception:
                self._order.clear()  # an error comes in its turn: nothing after it
                raise


def _is_done(place: _Place) -> bool:
    return place.item is None or place.item.error is not None
