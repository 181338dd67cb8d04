"""Reading ahead: the order, the bound, and workers that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_rcnn.data import read_ahead
from sparse_rcnn.data.decode import ImageError
from sparse_rcnn.data.read_ahead import SLOT_BYTES, read_file, read_images


class Deadly(os.PathLike):
    """A path that kills the worker that opens it, as a file does that a decoder crashes on."""

    def __init__(self, path):
        self.path, self.home = str(path), os.getpid()

    def __fspath__(self):
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.path


@pytest.fixture
def workers(monkeypatch):
    """The processes that were started and have not ended."""
    started, popen = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(read_ahead.subprocess, "Popen", start)
    return lambda: [process for process in started if process.poll() is None]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Twelve small pictures, by relative paths; the fourth is none, and the sixth is larger than a slot."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(name)
    (tmp_path / "3.png").write_bytes(b"no image")
    side = int((SLOT_BYTES / 3) ** 0.5) + 2
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint32).astype(np.uint8).reshape(side, side, 3)).save("5.bmp")
    names[5] = "5.bmp"
    return names


def check(found, source, expected=None):
    assert found.source is source and found.seconds > 0
    if isinstance(source, str) and source == "3.png":
        assert found.pixels is None and "3.png: not an image" in str(found.error)
    else:
        assert found.error is None and found.pixels.flags.writeable and found.pixels.flags.c_contiguous
        np.testing.assert_array_equal(found.pixels, read_file(source) if expected is None else expected)


@pytest.mark.parametrize(("workers", "ahead", "threads"), [(0, 1, 1), (0, 5, 3), (1, 1, 1), (2, 5, 1)])
def test_all_are_read_in_order(files, workers, ahead, threads):
    array = np.full((3, 4, 3), 7, np.uint8)  # pixels need no worker
    sources = [*files[:2], array, *files[2:]]

    def read(source):
        return read_file(source) if isinstance(source, str) else source

    results = list(read_images(iter(sources), read, workers, ahead, threads))
    assert len(results) == len(sources)
    for found, source in zip(results, sources, strict=True):
        check(found, source, array if source is array else None)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_than_so_many_are_ahead(files, workers):
    pulled = 0

    def sources():
        nonlocal pulled
        for name in files * 2:
            pulled += 1
            yield name

    for taken, found in enumerate(read_images(sources(), read_file, workers, ahead=4)):
        check(found, files[taken % 12])
        assert pulled <= taken + 4
    assert pulled == 24


def test_threads_read_side_by_side_and_rest_while_the_images_are_taken(files):
    both, running = threading.Barrier(2, timeout=60), []

    def read(source):
        running.append(source)
        both.wait()  # for another thread that reads
        return np.zeros((1, 1, 3), np.uint8)

    for taken, found in enumerate(read_images(files, read, ahead=4, threads=2)):
        assert found.source is files[taken]
        assert len(running) <= taken // 4 * 4 + 4
    assert sorted(running) == sorted(files)


def test_an_error_of_reading_comes_in_its_turn(files):
    def read(source):
        if source == files[2]:
            raise TypeError("no image")
        return read_file(source)

    reader = read_images(files, read, ahead=4, threads=2)
    assert [next(reader).source, next(reader).source] == files[:2]
    with pytest.raises(TypeError, match="no image"):
        next(reader)


def test_a_killed_worker_is_replaced_and_nothing_lost(files, workers):
    results = []
    for found in read_images(files * 3, read_file, workers=2, ahead=6):
        results.append(found)
        if len(results) in (4, 20):
            assert len(workers()) == 2
            for process in workers():
                process.kill()
    assert len(results) == 36
    for found, source in zip(results, files * 3, strict=True):
        check(found, source)
    assert workers() == []


def test_a_file_that_kills_its_worker_fails_alone(files):
    sources = [*files[:3], Deadly("2.png"), *files[4:7]]
    results = list(read_images(sources, read_file, workers=1, ahead=4))
    assert isinstance(results[3].error, ImageError)
    assert str(results[3].error) == "2.png: the process that decoded it died (signal 9)"
    for found, source in zip(results, sources, strict=True):
        if source is not sources[3]:
            check(found, source)


def test_workers_that_cannot_begin(files, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"workers: a process that reads images cannot begin \(exit status 1\)"):
        next(read_images(files, read_file, workers=1))


def test_the_limit_of_pixels_is_that_of_this_process(files, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (found,) = read_images(["0.png"], read_file, workers=1)
    assert "exceeds limit of 200 pixels" in str(found.error)  # Pillow refuses twice as many


def test_workers_end_with_the_reader(files, workers):
    reader = read_images(files, read_file, workers=2, ahead=4)
    next(reader)
    assert len(workers()) == 2
    reader.close()
    assert workers() == []


def test_workers_that_began_before(files, workers):
    crew = read_ahead.begin_workers(2, ahead=4)
    begun = workers()
    assert len(begun) == 2
    for found, source in zip(read_images(files, read_file, crew, ahead=4), files, strict=True):
        check(found, source)
        assert workers() == begun
    assert workers() == []


def test_workers_that_began_in_another_folder(files, workers, tmp_path_factory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("other"))
        Image.new("RGB", (5, 5)).save("0.png")
        crew = read_ahead.begin_workers(1, ahead=2)
    for found, source in zip(read_images(files[:3], read_file, crew, ahead=2), files, strict=False):
        check(found, source)
    assert workers() == []


def test_workers_end_when_their_process_is_killed(files):
    """A script needs no guard for them, either."""
    script = (
        "import os, signal\n"
        "from sparse_rcnn.data import read_ahead\n"
        "reader = read_ahead.Worker(1)\n"
        "reader.give('0.png')\n"
        "print(reader.take()[0].shape, reader.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    shape, _, worker = done.stdout.strip().rpartition(" ")
    assert (done.returncode, shape, done.stderr) == (-signal.SIGKILL, "(20, 30, 3)", "")
    while is_alive(worker):
        time.sleep(0.1)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
