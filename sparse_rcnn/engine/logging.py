"""What a training run says: a progress bar, readable lines, one JSON record a line, and TensorBoard's files."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparse_rcnn.engine.tensorboard import TensorBoard
from sparse_rcnn.weights.atomic import atomic_write

METRICS_FILE = "metrics.jsonl"
_LOSS_KINDS = ("ce", "bbox", "giou")


class RunLog:
    """Progress bar, ``metrics.jsonl`` and TensorBoard files of one training run; a context manager.

    A line of ``metrics.jsonl`` is a JSON object with ``kind`` (``train``, ``val``, ``skipped``) and ``step``; a
    number that is not finite, which JSON has no word for, is null there.

    Args:
        folder: of the run. Records are appended; those of later steps than ``step`` are dropped first (they belong to
            work that a crash lost), and so is a line that a crash cut short.
        step: completed steps at the start.
        steps: the last step.
    """

    def __init__(self, folder: str | Path, step: int, steps: int) -> None:
        self.path = Path(folder) / METRICS_FILE
        _drop_after(self.path, step)
        self.steps, self.first_step, self.start = steps, step, time.monotonic()
        # disable=None: a bar on a terminal, plain lines in a file.
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self.board = TensorBoard(Path(folder) / "tensorboard", step)

    def __enter__(self) -> RunLog:
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 -- closed in __exit__
        self._say_notes()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # of a record whose failure was raised
            self.file.close()
        self.board.close()

    def record(self, values: dict[str, Any]) -> None:
        """Append one record to the log, at once on the disk's side of this process.

        Raises:
            OSError: the disk is full, or the file cannot be written for another reason.
        """
        values = {name: _json_value(value) for name, value in values.items()}
        try:
            self.file.write(json.dumps(values, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: cannot write the log ({error.strerror})") from error
        self.board.record(values)
        self._say_notes()

    def training(self, values: dict[str, Any]) -> None:
        """Record one interval of training, and show its losses and speed."""
        self.record({"kind": "train", **values})
        losses, speed = f"loss {values['loss']:.3f}", f"{values['images_per_second']:.2f} img/s"
        parts = " ".join(f"{kind} {total:.2f}" for kind, total in loss_kinds(values).items())
        losses += f" ({parts})" if parts else ""
        self.bar.set_postfix_str(f"{losses}, grad {values['grad_norm']:.1f}, lr {values['lr']:.1e}, {speed}")
        if self.bar.disable:
            self.say(
                f"step {values['step']}/{self.steps}  {losses}  grad {values['grad_norm']:.2f}  "
                f"lr {values['lr']:.2e}  {speed}  {values['seconds']:.0f} s, {self._left(values['step'])} left"
            )

    def _left(self, step: int) -> str:
        """The time to the last step, evaluations and checkpoints as often as so far."""
        done = step - self.first_step
        seconds = (time.monotonic() - self.start) / max(done, 1) * (self.steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))

    def _say_notes(self) -> None:
        while self.board.notes:
            self.say(self.board.notes.pop(0))

    @staticmethod
    def say(line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def advance(self) -> None:
        """One step is done."""
        self.bar.update()


class NoLog:
    """What :class:`RunLog` is to a process that leaves writing and talking to another."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def record(self, values: dict[str, Any]) -> None:
        pass

    def training(self, values: dict[str, Any]) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def advance(self) -> None:
        pass


class Meter:
    """Means over the steps since the last log record."""

    def __init__(self) -> None:
        self.start = self.clock = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.images = 0

    def add(self, losses: dict[str, float], grad_norm: float, images: int) -> None:
        for name, value in {"loss": sum(losses.values()), **losses, "grad_norm": grad_norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self.images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time inside, of an evaluation or a checkpoint, out of img/s."""
        start = time.monotonic()
        yield
        self.clock += time.monotonic() - start

    def flush(self) -> dict[str, float]:
        now = time.monotonic()
        means = {name: round(total / self.steps, 6) for name, total in self.sums.items()}
        means["images_per_second"] = round(self.images / max(now - self.clock, 1e-9), 3)
        means["seconds"] = round(now - self.start, 1)
        self.clock = now
        self._clear()
        return means


def loss_kinds(values: dict[str, Any]) -> dict[str, float]:
    """The losses of a training record by kind (``ce``, ``bbox``, ``giou``), each summed over the stages it has."""
    totals: dict[str, float] = {}
    for kind in _LOSS_KINDS:
        found = [value for name, value in values.items() if name.split("_")[:2] == ["loss", kind] and value is not None]
        if found:
            totals[kind] = sum(found)
    return totals


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``, less a line that was cut short; none where there is no such file."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept != text:  # which a complete last line without its end is, too: the next would be added to it
        with atomic_write(path) as temporary:
            temporary.write_text(kept, encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
