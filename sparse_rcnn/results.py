"""Files of results, written atomically: COCO JSON, JSON lines, CSV, pictures."""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from sparse_rcnn.detections import CSV_HEADER, Detections

# What Pillow writes under each suffix, with the options of a good picture.
PICTURE_FORMATS: dict[str, dict[str, Any]] = {
    ".jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".png": {"format": "PNG", "compress_level": 3},
    ".webp": {"format": "WEBP", "quality": 92},
    ".bmp": {"format": "BMP"},
}


class AtomicFile:
    """A file that appears under its name only when it is complete.

    It is written beside its place under a temporary name; ``commit`` renames it. The parent directories are made.

    Args:
        path: where the file shall be; an existing file is replaced on ``commit``.
        text: UTF-8 text, or bytes.

    Raises:
        OSError: the place cannot be written to, or is a directory.
    """

    def __init__(self, path: str | os.PathLike[str], text: bool = True) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path}: expected a file, it is a directory")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.parent / f".{uuid.uuid4().hex}.tmp"
        # File names of any bytes come back out as they went in (surrogateescape); CSV wants no newline translation.
        options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""} if text else {}
        self.file: IO[Any] = open(self.temporary, "x" if text else "xb", **options)  # noqa: SIM115 -- until commit

    def commit(self) -> None:
        """Put the file in its place."""
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Drop what was written; does nothing after ``commit``."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> None:
    """Call ``write`` on a new file that takes the place of ``path`` only if it succeeds."""
    target = AtomicFile(path, text=False)
    try:
        write(target.file)
        target.commit()
    finally:
        target.discard()


def write_picture(path: str | os.PathLike[str], picture: Any) -> None:
    """Write a PIL image atomically in the format of the suffix, one of ``PICTURE_FORMATS``."""
    options = PICTURE_FORMATS[Path(path).suffix.lower()]
    write_atomic(path, lambda file: picture.save(file, **options))


class CocoWriter:
    """One JSON list of COCO results, one a line; each has the ``file_name`` too."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = AtomicFile(path)
        self.empty = True

    def add(self, detections: Detections, name: str, image_id: int) -> None:
        """Append the detections of one image."""
        lines = [json.dumps({**result, "file_name": name}) for result in detections.to_coco(image_id)]
        if lines:
            start = "[\n" if self.empty else ",\n"
            self.empty = False
            # One write an image: an interruption leaves whole ones.
            self.target.file.write(start + ",\n".join(lines))

    def close(self) -> None:
        """Complete the file and put it in its place."""
        self.target.file.write("[]\n" if self.empty else "\n]\n")
        self.target.commit()


class JsonlWriter:
    """One JSON object a line for each image: ``image_id``, ``file_name``, and what :meth:`Detections.to_dict` gives."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = AtomicFile(path)

    def add(self, detections: Detections, name: str, image_id: int) -> None:
        """Append one image."""
        values = {"image_id": image_id, "file_name": name, **detections.to_dict()}
        del values["source"]
        self.target.file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Put the file in its place."""
        self.target.commit()


class CsvWriter:
    """One row for each detection under ``CSV_HEADER``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = AtomicFile(path)
        self.rows = csv.writer(self.target.file, lineterminator="\n")
        self.rows.writerow(CSV_HEADER)

    def add(self, detections: Detections, name: str, image_id: int) -> None:
        """Append the detections of one image."""
        self.rows.writerows(detections.to_csv(name))

    def close(self) -> None:
        """Put the file in its place."""
        self.target.commit()
