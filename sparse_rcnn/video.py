"""Frames from video files and webcams, and video files from frames; needs PyAV (``pip install sparse-rcnn[video]``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sparse_rcnn.detections import Detections
from sparse_rcnn.results import AtomicFile

WEBCAM = "/dev/video0"


class VideoError(ValueError):
    """A video that cannot be read or written."""


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise VideoError("video: needs PyAV (pip install av)") from error
    return av


class VideoReader:
    """Frames of a video file, or of the webcam, as uint8 [H, W, 3] RGB arrays.

    Args:
        path: a video file; None opens the first webcam (Linux, video4linux2).

    Raises:
        VideoError: PyAV is not installed, the file is missing or no video, or there is no webcam.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.av = _av()
        self.name = WEBCAM if path is None else os.fspath(path)
        try:
            self.container = self.av.open(self.name, format="v4l2" if path is None else None)
            self.stream = self.container.streams.video[0]
        except (self.av.FFmpegError, ValueError, IndexError) as error:
            raise VideoError(f"{self.name}: cannot be opened as a video ({_reason(error)})") from error
        self.rate = Fraction(self.stream.average_rate or 30)
        self.frames = self.stream.frames or None  # their number, where the file tells it

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for frame in self.container.decode(self.stream):
                yield frame.to_ndarray(format="rgb24")
        except self.av.FFmpegError as error:
            raise VideoError(f"{self.name}: damaged ({_reason(error)})") from error

    def close(self) -> None:
        """Close the file or the webcam."""
        self.container.close()


class VideoWriter:
    """An MP4 file (H.264 where this PyAV has it, else MPEG-4) that appears under its name on ``close``.

    Args:
        path: where the file shall be.
        rate: frames a second.
    """

    def __init__(self, path: str | os.PathLike[str], rate: Fraction) -> None:
        self.av = _av()
        self.target = AtomicFile(Path(path), text=False)
        self.container = self.av.open(self.target.file, "w", format="mp4")
        codec = "libx264" if "libx264" in self.av.codecs_available else "mpeg4"
        self.stream = self.container.add_stream(codec, rate=rate)
        self.stream.pix_fmt = "yuv420p"
        self.empty = True

    def add(self, picture: Any) -> None:
        """Append a PIL image; all of one size, odd sides lose a pixel because the format has none."""
        pixels = np.asarray(picture)
        pixels = np.ascontiguousarray(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2])
        if self.empty:
            self.stream.height, self.stream.width = pixels.shape[:2]
            self.empty = False
        self.container.mux(self.stream.encode(self.av.VideoFrame.from_ndarray(pixels, format="rgb24")))

    def close(self) -> None:
        """Complete the file and put it in its place; without a frame there is none."""
        try:
            if not self.empty:
                self.container.mux(self.stream.encode())
                self.container.close()
                self.target.commit()
        finally:
            self.target.discard()


class VideoFeed:
    """A video as the ``infer`` command takes its inputs: frames in, one drawn video out.

    Args:
        path: a video file; None for the webcam.
        output: an ``.mp4`` file, or the directory to put one of the video's name into; None draws nothing.

    Raises:
        VideoError, OSError: the video cannot be opened, or the output cannot be written to.
    """

    def __init__(self, path: str | None, output: Path | None) -> None:
        self.sources = VideoReader(path)
        self.total = self.sources.frames
        self.seen = 0
        self.writer = None
        if output is not None:
            name = f"{Path(path).stem}.mp4" if path is not None else "webcam.mp4"
            target = output if output.suffix.lower() == ".mp4" else output / name
            if path is not None and os.path.realpath(target) == os.path.realpath(path):
                raise VideoError(f"--output: {target} would overwrite the input")
            self.writer = VideoWriter(target, self.sources.rate)

    def identify(self, detections: Detections) -> tuple[str, int]:
        """Name and COCO image id of the next frame: ``clip.mp4#12`` and 12."""
        number, self.seen = self.seen, self.seen + 1
        return f"{self.sources.name}#{number}", number

    def draw(self, detections: Detections) -> None:
        """Append the drawn frame."""
        if self.writer is not None:
            self.writer.add(detections.draw())

    def close(self) -> None:
        """Complete the drawn video."""
        self.sources.close()
        if self.writer is not None:
            self.writer.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
