"""What a training run says: a progress bar, readable lines, and one JSON record a line in ``log.jsonl``."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Progress bar and JSON-lines log of one training run; a context manager.

    Args:
        path: the log; records are appended. Records of later steps than ``step`` are dropped first (they belong to
            work that a crash lost), and so is a line that a crash cut short.
        step: completed steps at the start.
        steps: the last step.
    """

    def __init__(self, path: str | Path, step: int, steps: int) -> None:
        self.path = Path(path)
        _drop_after(self.path, step)
        # disable=None: a bar on a terminal, plain lines in a file.
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 -- closed in __exit__
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.file.close()

    def record(self, values: dict[str, Any]) -> None:
        """Append one record to the log, at once on the disk's side of this process."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def training(self, values: dict[str, Any]) -> None:
        """Record one interval of training, and show its total loss."""
        self.record({"kind": "train", **values})
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, grad {values['grad_norm']:.2f}, lr {values['lr']:.2e}")
        if self.bar.disable:
            self.say(
                f"step {values['step']}/{self.bar.total}  loss {values['loss']:.4f}  grad {values['grad_norm']:.2f}  "
                f"lr {values['lr']:.2e}  {values['images_per_second']:.2f} img/s  {values['seconds']:.0f} s"
            )

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


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
