"""From what the user typed to images: files, directories, globs, a list on stdin, URLs."""

from __future__ import annotations

import glob
import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sparse_rcnn.data.decode import ImageError

# What a directory is searched for; a file that is named, or matched by a glob, may be called anything.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm")
)
MAX_URL_BYTES = 64 * 2**20
URL_TIMEOUT = 20.0  # seconds without a byte; a whole download gets three times as long


@dataclass
class Inputs:
    """What :func:`expand_inputs` found.

    Attributes:
        sources: paths and URLs, each once, in the order given (sorted within a directory or a glob).
        relative: of each source, its path below the directory it was found in, or its file name.
        problems: one line for each argument that led to no image.
    """

    sources: list[str] = field(default_factory=list)
    relative: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def is_url(source: object) -> bool:
    """Whether ``source`` is an http(s) address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def expand_inputs(arguments: Iterable[str], recursive: bool = False) -> Inputs:
    """Resolve the arguments of the command line.

    An argument is a file, a directory (its images; with ``recursive`` those of its subdirectories too), a glob that
    the shell left alone (``**`` works), ``-`` for paths and URLs on stdin, one a line, or an http(s) URL. Hidden
    files in directories are passed over. What matches nothing is a line in ``problems``.
    """
    inputs = Inputs()
    seen: set[str] = set()
    for argument in _with_stdin(arguments):
        try:
            found = list(_expand(argument, recursive))
        except (OSError, ValueError) as error:  # ValueError: a null byte in a path
            inputs.problems.append(f"{argument}: {getattr(error, 'strerror', None) or error}")
            continue
        for source, relative in found:
            identity = source if is_url(source) else os.path.abspath(source)
            if identity not in seen:
                seen.add(identity)
                inputs.sources.append(source)
                inputs.relative.append(relative)
    return inputs


def _with_stdin(arguments: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument == "-":
            lines = (os.fsdecode(line).strip() for line in sys.stdin.buffer.read().splitlines())
            yield from (line for line in lines if line)
        else:
            yield argument


def _expand(argument: str, recursive: bool) -> Iterator[tuple[str, str]]:
    """(source, relative path) pairs of one argument; raises ``OSError`` if there are none."""
    if is_url(argument):
        yield argument, _name_of_url(argument)
    elif os.path.isdir(argument):
        yield from _images_below(argument, recursive)
    elif os.path.lexists(argument):
        yield argument, os.path.basename(argument)
    elif glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))
        if not matches:
            raise FileNotFoundError("the pattern matches nothing")
        for match in matches:  # as if the shell had expanded it, but `**` alone already walks the directories
            if not os.path.isdir(match):
                yield match, os.path.basename(match)
            elif "**" not in argument:
                yield from _images_below(match, recursive, required=False)
    else:
        raise FileNotFoundError("no such file or directory")


def _images_below(directory: str, recursive: bool, required: bool = True) -> Iterator[tuple[str, str]]:
    found = False
    for folder, folders, files in os.walk(directory, onerror=_reraise):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                continue
            found = True
            yield path, os.path.relpath(path, directory)  # also a dangling link: to be named as a bad file
    if required and not found:
        raise FileNotFoundError("no images in this directory" + ("" if recursive else " (--recursive looks deeper)"))


def _reraise(error: OSError) -> None:
    raise error


def _name_of_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return PurePosixPath(urllib.parse.unquote(parts.path)).name or parts.netloc.replace(":", "_")


def output_names(inputs: Inputs, suffixes: Sequence[str]) -> list[str]:
    """Where the drawn version of each input goes below the output directory; no two are equal.

    The place below the given directory is kept. Where that is not enough to tell the inputs apart, the paths below
    their common parent are, and what is left (URLs that differ in their query) is numbered.

    Args:
        suffixes: file types that can be written; an input of another one has ``.png`` put behind its name.
    """
    names = list(inputs.relative)
    if len(set(names)) < len(names):
        local = [os.path.abspath(source) for source in inputs.sources if not is_url(source)]
        parent = os.path.commonpath([os.path.dirname(path) for path in local]) if local else ""
        names = [
            os.path.join(urllib.parse.urlsplit(source).netloc.replace(":", "_"), name)
            if is_url(source)
            else os.path.relpath(os.path.abspath(source), parent)
            for source, name in zip(inputs.sources, names, strict=True)
        ]
    taken: set[str] = set()
    unique = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        stem, suffix = (stem, suffix) if suffix.lower() in suffixes else (name, ".png")
        candidate, number = stem + suffix, 1
        while candidate in taken or strip_name(candidate) in taken:
            number += 1
            candidate = f"{stem}-{number}{suffix}"
        taken.update((candidate, strip_name(candidate)))
        unique.append(candidate)
    return unique


def strip_name(name: str) -> str:
    """File name of the stage strip that belongs to a drawn image."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.stages{suffix}"


def image_ids(sources: Sequence[str]) -> list[int]:
    """COCO image ids: the file names' numbers if each is a number of its own (COCO's are), else 0, 1, 2 and so on."""
    stems = [Path(_name_of_url(source) if is_url(source) else source).stem for source in sources]
    if all(stem.isascii() and stem.isdecimal() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(len(sources)))


def fetch_url(url: str, max_bytes: int = MAX_URL_BYTES, timeout: float = URL_TIMEOUT) -> bytes:
    """The contents of an http(s) address.

    Raises:
        ImageError: it cannot be reached, answers with an error, is larger than ``max_bytes``, or takes too long.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "sparse_rcnn"})
    deadline = time.monotonic() + 3 * timeout
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > max_bytes:
                    raise ImageError(f"{url}: larger than the limit of {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise ImageError(f"{url}: not there after {3 * timeout:g} s")
    except urllib.error.HTTPError as error:
        raise ImageError(f"{url}: the server answered {error.code} {error.reason}") from error
    except ImageError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{url}: cannot be fetched: {getattr(error, 'reason', error)}") from error
    return bytes(content)
