"""What is in a data set and what is wrong with it, said before the first step."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparse_rcnn.data.dataset import DetectionDataset, some
from sparse_rcnn.data.decode import ImageError, decode_image, image_size
from sparse_rcnn.data.transforms import network_size
from sparse_rcnn.weights.atomic import atomic_write

_SHOWN = 10  # classes, and problems, that the short form lists
_TINY = 4.0  # pixels of the network's image: one cell of the finest feature map


@dataclass
class DataReport:
    """What :func:`check_data` found.

    Attributes:
        counts: one line on the size of the data set, and one for each class, the most frequent first.
        notes: what is no mistake but good to know.
        problems: mistakes in the data, one line each; what could be mended was.
        unreadable: indices of the images that training would stop at.
    """

    counts: list[str]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)

    def full(self) -> list[str]:
        """Every line."""
        return [*self.counts, *(f"note: {n}" for n in self.notes), *(f"problem: {p}" for p in self.problems)]

    def short(self, full_text: str | Path | None = None) -> list[str]:
        """The lines to print: at most ten classes and ten problems.

        Args:
            full_text: where the others can be read.
        """
        head, *classes = self.counts
        lines = [head, *(f"  {line}" for line in classes)]
        if len(classes) > _SHOWN:
            half = _SHOWN // 2
            lines[1 + half : -half] = [f"  ... {len(classes) - _SHOWN} classes between these ..."]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  and {len(self.problems) - _SHOWN} problems more")
        hidden = len(self.problems) > _SHOWN or len(classes) > _SHOWN
        return lines + ([f"  all of it: {full_text}"] if hidden and full_text is not None else [])

    def write(self, path: str | Path) -> None:
        """Write every line to a text file, atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join(self.full()) + "\n", encoding="utf-8")

    def require_clean(self) -> None:
        """Refuse data with problems.

        Raises:
            ValueError: there are some; the first twenty are listed.
        """
        if self.problems:
            raise ValueError(f"data: {len(self.problems)} problems: {some(self.problems, 20)}")


def check_data(
    dataset: DetectionDataset,
    num_proposals: int,
    network: tuple[int, int],
    val: DetectionDataset | None = None,
    decode: bool = False,
) -> DataReport:
    """Look through a data set: classes, boxes, and the header of every image file.

    Problems are those that opening it found (``dataset.problems``, and ``val.problems``), images that cannot be read
    or have another size than annotated, the same box twice, and the same file twice. Notes are classes without boxes,
    images without boxes, images with more boxes than proposals, boxes of less than 4 pixels a side at network size,
    and images that the validation split shares.

    Args:
        dataset: the training split.
        num_proposals: of the model; of more boxes in an image, the surplus trains nothing.
        network: shortest side and limit of the longest one, as the model's ``min_size`` and ``max_size``.
        val: the validation split.
        decode: decode every image, which finds truncated ones too but takes as long as reading an epoch does.
    """
    report = DataReport(_counts(dataset), problems=list(dataset.problems))
    report.notes += _notes_on_boxes(dataset, num_proposals, network)
    for index, problem in _unreadable(dataset, decode):
        report.unreadable.append(index)
        report.problems.append(problem)
    report.problems += _repeated_boxes(dataset)
    report.problems += [] if val is None else [f"validation split: {problem}" for problem in val.problems]
    _add_identical(report, dataset, val)
    return report


def _counts(dataset: DetectionDataset) -> list[str]:
    labels = dataset.boxes.labels[dataset.boxes.target]
    boxes = np.bincount(labels, minlength=len(dataset.class_names))
    image_of = np.repeat(np.arange(len(dataset)), np.diff(dataset.boxes.offsets))[dataset.boxes.target]
    images = Counter(label for label, _ in set(zip(labels.tolist(), image_of.tolist(), strict=True)))
    crowds = int(dataset.boxes.crowd.sum())
    ignored = f" and {crowds} crowds or difficult objects (ignored)" if crowds else ""
    head = f"data: {len(dataset)} images, {len(labels)} boxes{ignored}, {len(dataset.class_names)} classes"
    order = np.argsort(-boxes, kind="stable").tolist()
    return [head] + [
        f"{dataset.class_names[label]}: {boxes[label]} boxes in {images[label]} images"
        f" ({boxes[label] / max(len(labels), 1):.1%})"
        for label in order
    ]


def _notes_on_boxes(dataset: DetectionDataset, num_proposals: int, network: tuple[int, int]) -> list[str]:
    boxes, notes = dataset.boxes, []
    unused = sorted(set(range(len(dataset.class_names))) - set(boxes.labels[boxes.target].tolist()))
    if unused:
        notes.append(
            f"classes without boxes, which cannot be learned: {some([dataset.class_names[i] for i in unused])}"
        )
    image_of = np.repeat(np.arange(len(dataset)), np.diff(boxes.offsets))[boxes.target]
    count = np.bincount(image_of, minlength=len(dataset))
    if (count == 0).any():
        notes.append(f"{int((count == 0).sum())} images without boxes (used as background)")
    crowded = np.flatnonzero(count > num_proposals)
    if len(crowded):
        names = some([dataset.images[index]["file_name"] for index in crowded])
        notes.append(
            f"{len(crowded)} images have more than the {num_proposals} boxes that the proposals can cover "
            f"(at most {count.max()}; {names}); raise num_proposals"
        )
    scale = np.array([network_size(i["height"], i["width"], *network)[0] / i["height"] for i in dataset.images])
    clipped = boxes.clipped[boxes.target]
    sides = (clipped[:, 2:] - clipped[:, :2]) * scale[image_of][:, None]
    tiny = int((sides.max(1) < _TINY).sum()) if len(sides) else 0
    if tiny:
        notes.append(f"{tiny} boxes of less than {_TINY:g} pixels a side at network size; a larger min_size shows them")
    return notes


def _unreadable(dataset: DetectionDataset, decode: bool) -> list[tuple[int, str]]:
    def problem(index: int) -> str | None:
        path, image = dataset.image_path(index), dataset.images[index]
        try:
            height, width = decode_image(path).shape[:2] if decode else image_size(path)
        except ImageError as error:
            return f"{image['file_name']}: {str(error).removeprefix(f'{path}: ')}"
        size = image["height"], image["width"]
        if size == (height, width) or size == (width, height) == image_size(path, apply_exif=False):
            return None
        return f"{image['file_name']}: {width} x {height} pixels, but annotated as {size[1]} x {size[0]}"

    with ThreadPoolExecutor(8) as pool:  # waits for the disk, mostly
        problems = list(pool.map(problem, range(len(dataset))))
    return [(index, text) for index, text in enumerate(problems) if text is not None]


def _repeated_boxes(dataset: DetectionDataset) -> list[str]:
    boxes = dataset.boxes
    image_of = np.repeat(np.arange(len(dataset)), np.diff(boxes.offsets))
    rows = np.column_stack([image_of, boxes.labels, boxes.clipped])[boxes.target]
    unique, count = np.unique(rows, axis=0, return_counts=True)
    return [
        f"{dataset.images[int(row[0])]['file_name']}: {times} times the same box of class "
        f"{dataset.class_names[int(row[1])]}, {row[2:].tolist()} (xyxy)"
        for row, times in zip(unique[count > 1], count[count > 1], strict=True)
    ]


def _add_identical(report: DataReport, dataset: DetectionDataset, val: DetectionDataset | None) -> None:
    names = {dataset.image_path(index): image["file_name"] for index, image in enumerate(dataset.images)}
    held_out = set() if val is None else {val.image_path(index) for index in range(len(val))}
    shared = held_out & names.keys()
    for group in identical([*names, *sorted(held_out - names.keys())]):
        same = [names[path] for path in group if path in names]
        if len(same) > 1:
            report.problems.append(f"the same image: {', '.join(same)}")
        shared |= held_out.intersection(group) if same else set()
    if shared:
        report.notes.append(f"{len(shared)} images of the validation split are in the training split too")


def identical(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files with the same bytes. Files are read as far as they could still be equal to another."""
    groups = [list(paths)]
    for key in (lambda path: path.stat().st_size, _head, _digest):
        groups = [equal for group in groups for equal in _split(group, key)]
    return groups


def _split(group: list[Path], key: Callable[[Path], Any]) -> Iterator[list[Path]]:
    by_key: dict[Any, list[Path]] = defaultdict(list)
    for path in group:
        with contextlib.suppress(OSError):  # gone or not accessible, which the reading of headers reports
            by_key[key(path)].append(path)
    return (equal for equal in by_key.values() if len(equal) > 1)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def _digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes()).digest()
