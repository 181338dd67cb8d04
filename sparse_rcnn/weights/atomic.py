"""Files that are either the old one or the complete new one, whatever happens in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` (same suffix); when the block succeeds it replaces ``path``.

    The file is flushed to the disk before it is renamed, and the rename after it. When the block raises, the temporary
    file goes and ``path`` stays as it was; one that a killed process left is overwritten by the next, or deleted by
    :func:`remove_leftovers`.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files of :func:`atomic_write` that killed processes left in ``folder``, if there is one."""
    for pattern in (".*.tmp", ".*.tmp.*"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
