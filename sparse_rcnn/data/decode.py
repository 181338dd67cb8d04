"""Image files of any common kind to RGB pixels, or one named error."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# Named one by one: Pillow can also hand a file to other programs (EPS to Ghostscript), which no picture should decide.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(ValueError):
    """An image cannot be read. The message is one line that starts with the name of the file."""


def decode_image(
    source: str | Path | bytes | Image.Image, max_pixels: int | None = None, apply_exif: bool = True
) -> np.ndarray:
    """Decode an image to 8-bit RGB, upright as its EXIF orientation says.

    The first frame of an animation is taken. Transparency is dropped (not blended), as by Pillow's ``convert("RGB")``.
    16-bit greys are scaled to 8 bits (of 16-bit colours, Pillow keeps the high byte); floating-point greys are taken as
    0..1, or as 0..255 if any pixel exceeds 1.

    Args:
        source: path, the bytes of a file, or an open Pillow image (its current frame; it is not changed).
        max_pixels: refuse larger images. Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS`` (89 million), holds too.
        apply_exif: False gives the pixels as they are stored.

    Returns:
        uint8 [H, W, 3], a new array.

    Raises:
        ImageError: the file is missing, unreadable, truncated, too large, or no image of a kind in ``FORMATS``.
        TypeError: ``source`` is none of the types above.
    """
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "image")
    elif isinstance(source, bytes):
        name = "image bytes"
    elif isinstance(source, str | Path):
        name = str(source)
    else:
        raise TypeError(f"source: expected a path, bytes or a PIL image, got {type(source).__name__}")
    with _named(name):
        if isinstance(source, Image.Image):
            return _pixels(source, max_pixels, apply_exif)
        with _stream(source) as stream, _open(stream) as image:
            return _pixels(image, max_pixels, apply_exif)


def image_size(path: str | Path, apply_exif: bool = True) -> tuple[int, int]:
    """(height, width) of an image as :func:`decode_image` gives it, from the file's header (of a TIFF, from all of it).

    Raises:
        ImageError: the file is missing, or its header is not that of an image that ``decode_image`` takes.
    """
    with _named(str(path)), _stream(path) as stream, _open(stream) as image:
        _check_limit(image, None)
        if image.format == "TIFF" or image.format == "PNG" and _text_after_pixels(stream):
            image.load()  # Pillow turns a TIFF while it decodes, and reads on in a PNG
        turned = apply_exif and _orientation(image) in _SIDEWAYS
        return image.size if turned else image.size[::-1]


def _text_after_pixels(stream: BinaryIO) -> bool:
    """Whether chunks that can hold an orientation follow the pixels of a PNG; by the chunks' lengths alone."""
    position, seen_pixels = 8, False
    while len(head := _read_at(stream, position, 8)) == 8:
        kind = head[4:]
        if seen_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        seen_pixels |= kind == b"IDAT"
        position += int.from_bytes(head[:4], "big") + 12
    return False


def _read_at(stream: BinaryIO, position: int, count: int) -> bytes:
    stream.seek(position)
    return stream.read(count)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns whatever reading an image can raise into an ImageError that names it."""
    with _quiet:
        try:
            yield
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
        # A damaged file can make a plugin of Pillow fail in any way: struct.error, IndexError, MemoryError, ...
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{name}: cannot decode the image: {reason}") from error


def _stream(source: str | Path | bytes) -> BinaryIO:
    """The bytes to read; a file is not read at once, for it may be large and no image at all."""
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):  # a pipe or a device could block for ever
                raise ImageError("not a regular file")
            stream = open(source, "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            raise ImageError("no such file") from None
        except OSError as error:
            raise ImageError(f"cannot read the file: {error.strerror}") from None
    if not stream.seek(0, io.SEEK_END):
        stream.close()
        raise ImageError("empty, 0 bytes")
    stream.seek(0)
    return stream


def _open(stream: BinaryIO) -> Image.Image:
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF
    try:
        return Image.open(stream, formats=formats)
    except UnidentifiedImageError:
        raise ImageError("not an image of a known format") from None


def _check_limit(image: Image.Image, max_pixels: int | None) -> None:
    limits = [limit for limit in (max_pixels, Image.MAX_IMAGE_PIXELS) if limit is not None]
    if limits and image.width * image.height > min(limits):
        raise ImageError(f"{image.width} x {image.height} pixels, more than the limit of {min(limits)}")


def _pixels(image: Image.Image, max_pixels: int | None, apply_exif: bool) -> np.ndarray:
    _check_limit(image, max_pixels)
    image.load()
    turn = _UPRIGHT.get(_orientation(image)) if apply_exif else None
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_grey_to_8_bits(np.asarray(image)))
    image = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> object:
    try:
        # A PNG's own method decodes the pixels to look behind them.
        return Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # damaged EXIF says nothing about the pixels, which are good
        return None


def _grey_to_8_bits(grey: np.ndarray) -> np.ndarray:
    """[H, W] of 16-bit range (also Pillow's 32-bit mode "I", which carries 16-bit files) or float -> uint8."""
    if grey.dtype.kind == "f":
        grey = np.nan_to_num(grey)
        scale = 255 if grey.size and grey.max() <= 1 else 1
        return (np.clip(grey * scale, 0, 255) + 0.5).astype(np.uint8)
    return ((np.clip(grey, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


class _Quiet:
    """Silences warnings while any thread is inside.

    ``warnings.catch_warnings`` alone saves and restores global state, so that overlapping threads can leave the
    filters changed for good; here the first thread in saves it and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_quiet = _Quiet()
