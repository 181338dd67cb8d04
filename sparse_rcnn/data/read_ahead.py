"""Images read by worker processes ahead of whoever wants them: in order, in bounded memory, whatever befalls a worker.

A DataLoader's workers do the same, but one that dies takes all of them along, and every tensor needs new shared memory
of a place that is often small. Here a worker is replaced, what it still had to do is done by its successor, and pixels
go through shared memory that was there from the start. A worker is a program of its own: neither a copy of this
process, which has threads and may use a GPU, nor one that imports its ``__main__``. It loads no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparse_rcnn.data.decode import ImageError, decode_image
from sparse_rcnn.sources import fetch_url, is_url

# Shared memory for one image, of which it takes what it needs: 1920x1080 fits. Larger ones go through a pipe, which is
# slower, but so is their decoding.
SLOT_BYTES = 8 * 2**20
CAN_HAVE_WORKERS = os.name == "posix"
_HAS_MEMFD = hasattr(os, "memfd_create")
_END = object()


@dataclass
class Read:
    """One source that was read, or that could not be.

    Attributes:
        pixels: uint8 [H, W, 3] RGB, contiguous and writable; None if there is an error.
        seconds: that it took, the time that the source itself took to come included.
    """

    source: Any
    pixels: np.ndarray | None
    error: ImageError | None
    seconds: float


def read_file(source: str | os.PathLike[str]) -> np.ndarray:
    """The image of a path or an http(s) URL as uint8 [H, W, 3] RGB.

    Raises:
        ImageError: it cannot be read; see :func:`~sparse_rcnn.data.decode.decode_image`.
    """
    if not is_url(source):
        return decode_image(source if isinstance(source, str) else Path(source))
    content = fetch_url(source)
    try:
        return decode_image(content)
    except ImageError as error:
        raise ImageError(f"{source}: {str(error).removeprefix('image bytes: ')}") from error


def begin_workers(workers: int, ahead: int) -> list[Worker]:
    """Workers for one call of :func:`read_images`, which takes a while less where they have begun before it.

    Raises:
        RuntimeError: not on this system.
    """
    crew = [Worker(depth=-(-ahead // workers)) for _ in range(workers)]
    for worker in crew:
        worker.begin()
    return crew


def read_images(
    sources: Iterable[Any],
    read: Callable[[Any], np.ndarray],
    workers: int | Sequence[Worker] = 0,
    ahead: int = 1,
    threads: int = 1,
) -> Iterator[Read]:
    """Read every source, in order.

    Args:
        sources: any iterable; it is asked for at most ``ahead`` sources before the first is taken.
        read: reads what is no path and no URL, in this process; without workers all of them.
        workers: processes that read paths and URLs, or those of :func:`begin_workers` with this ``ahead``; they end
            with this generator.
        ahead: images at most that are being read or wait to be taken.
        threads: without workers, threads that call ``read`` for ``ahead`` images side by side, and then wait until
            all of these are taken: nothing runs beside whoever takes them.

    Raises:
        RuntimeError: no worker can be started, as on a system that is not POSIX.
        Exception: of ``read``, unless it is an ImageError, which is handed on in its ``Read``.
    """
    iterator, waiting = _timed(sources), deque()
    if isinstance(workers, int) and not workers:
        yield from _read_here(iterator, read, ahead, threads)
        return
    with contextlib.ExitStack() as stack:
        crew = begin_workers(workers, ahead) if isinstance(workers, int) else workers
        for worker in crew:
            stack.callback(worker.stop)
        turns = itertools.cycle(crew)
        while True:
            for source, came in itertools.islice(iterator, ahead - len(waiting)):
                worker = next(turns) if isinstance(source, (str, os.PathLike)) else None
                if worker is not None:
                    worker.give(source)
                waiting.append((source, came, worker))
            if not waiting:
                return
            source, came, worker = waiting.popleft()
            found, seconds = worker.take() if worker is not None else _attempt(read, source)
            yield _as_read(source, found, came + seconds)


def _read_here(
    iterator: Iterator[tuple[Any, float]], read: Callable[[Any], np.ndarray], ahead: int, threads: int
) -> Iterator[Read]:
    if threads == 1:
        for source, came in iterator:
            found, seconds = _attempt(read, source)
            yield _as_read(source, found, came + seconds)
        return
    with ThreadPoolExecutor(threads) as pool:
        while taken := list(itertools.islice(iterator, ahead)):
            reads = [pool.submit(_attempt, read, source) for source, _ in taken]
            wait(reads)  # a decoder silences the warnings of all threads while it is at work
            for (source, came), result in zip(taken, reads, strict=True):
                found, seconds = result.result()
                yield _as_read(source, found, came + seconds)


def _timed(sources: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each with the seconds that it took to come."""
    iterator = iter(sources)
    while True:
        begin = time.perf_counter()
        source = next(iterator, _END)
        if source is _END:
            return
        yield source, time.perf_counter() - begin


def _as_read(source: Any, found: np.ndarray | ImageError, seconds: float) -> Read:
    failed = isinstance(found, ImageError)
    return Read(source, None if failed else found, found if failed else None, seconds)


def _attempt(read: Callable[[Any], np.ndarray], source: Any) -> tuple[np.ndarray | ImageError, float]:
    begin = time.perf_counter()
    try:
        found = read(source)
    except ImageError as error:
        found = error
    return found, time.perf_counter() - begin


@dataclass
class _Task:
    source: str | os.PathLike[str]
    slot: int
    deaths: int = 0  # of workers, over this task


class Worker:
    """A process that reads what it is given, in that order, and the shared memory that it reads into.

    A process that dies died over the first of the tasks that it had not answered. A new one is given them all again,
    for most deaths are not the file's fault; a file that two of them die of is one that cannot be read.

    Args:
        depth: tasks at most that wait for being taken.
    """

    def __init__(self, depth: int) -> None:
        if not CAN_HAVE_WORKERS:
            raise RuntimeError("workers: expected 0 on this system")
        # A nameless file in memory: not in /dev/shm, which may be small.
        self.memory = os.fdopen(os.memfd_create("images"), "r+b") if _HAS_MEMFD else tempfile.TemporaryFile()  # noqa: SIM115
        self.memory.truncate(depth * SLOT_BYTES)
        self.pixels = _slots(self.memory.fileno())
        self.tasks: deque[_Task] = deque()
        self.free = deque(range(depth))
        self.process: subprocess.Popen | None = None
        self.place = _place()
        self.stillborn = 0  # processes in a row that died before they had begun

    def give(self, source: str | os.PathLike[str]) -> None:
        """One more task."""
        if not self.tasks and self.place != _place():  # begun for another folder: paths would be other files
            self.stop()
        self.tasks.append(_Task(source, self.free.popleft()))
        if self.process is None:
            self.begin()
        else:
            self._send((source, self.tasks[-1].slot))

    def take(self) -> tuple[np.ndarray | ImageError, float]:
        """What became of the first task, and how many seconds it took; waits for it.

        Raises:
            RuntimeError: no process even begins.
        """
        task = self.tasks[0]
        while (answer := self._receive()) is None:
            ended = self.stop()
            if self.stillborn == 3:
                raise RuntimeError(f"workers: a process that reads images cannot begin ({ended})")
            task.deaths += self.stillborn == 0
            if task.deaths == 2:
                answer = ImageError(f"{os.fspath(task.source)}: the process that decoded it died ({ended})"), 0.0
                break
            self.begin()
        self.free.append(self.tasks.popleft().slot)
        if self.process is None and self.tasks:
            self.begin()
        found, seconds = answer
        if isinstance(found, tuple):
            found = self.pixels[task.slot, : np.prod(found)].reshape(found).copy()
        return found, seconds

    def stop(self) -> str:
        """End the process, if there is one; how it had ended, in words."""
        if self.process is None:
            return "never begun"
        self.connection.close()
        self.process.terminate()
        code, self.process = self.process.wait(), None
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def begin(self) -> None:
        """Start the process, which is given what is to be done."""
        ours, theirs = socket.socketpair()
        files = (theirs.fileno(), self.memory.fileno())
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sparse_rcnn.data.read_ahead", *map(str, files)],
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C concerns the process that it serves
            )
        self.connection = connection.Connection(ours.detach())
        self.stillborn += 1
        self.place = _place()
        self._send(Image.MAX_IMAGE_PIXELS)
        for task in self.tasks:
            self._send((task.source, task.slot))

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it died: found out when the answer is wanted
            self.connection.send(message)

    def _receive(self) -> tuple[Any, float] | None:
        """The next answer; None from a process that died."""
        try:
            if self.stillborn:
                self.connection.recv()
                self.stillborn = 0
            return self.connection.recv()
        except (EOFError, OSError):
            return None


def _place() -> tuple[str, int | None]:
    """What a process takes over when it begins: the working folder, and Pillow's limit."""
    return os.getcwd(), Image.MAX_IMAGE_PIXELS


def _slots(file: int) -> np.ndarray:
    """uint8 [slots, SLOT_BYTES] of a file in memory, shared with whoever else maps it."""
    return np.frombuffer(mmap.mmap(file, 0), dtype=np.uint8).reshape(-1, SLOT_BYTES)


def _serve(channel: connection.Connection, slots: np.ndarray) -> None:
    """A worker's life: (source, slot) comes in, (shape of the pixels in the slot, or pixels, or error; seconds) goes
    out, until nobody is there any more."""
    with contextlib.suppress(EOFError, ConnectionError):
        Image.MAX_IMAGE_PIXELS = channel.recv()
        channel.send("here")
        while True:
            source, slot = channel.recv()
            found, seconds = _attempt(read_file, source)
            if isinstance(found, np.ndarray) and found.nbytes <= SLOT_BYTES:
                slots[slot, : found.nbytes] = found.reshape(-1)
                found = found.shape
            channel.send((found, seconds))


if __name__ == "__main__":
    _serve(connection.Connection(int(sys.argv[1])), _slots(int(sys.argv[2])))
