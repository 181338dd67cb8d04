"""One command in several processes: torchrun starts them, they share the inputs, and the first merges the results.

They talk through torchrun's key-value store, and hand over their results in files beside the result that was asked for:
parts, in the form of ``--jsonl``. On several machines these must be in a folder that all of them see.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_rcnn.detections import Detections
from sparse_rcnn.results import JsonlWriter

# Seconds that the others may take to put down what they have once all were told to stop. torchrun kills after 30.
GRACE = 10.0
_PERIOD = 0.1  # seconds between two looks at the store: waiting inside it could not be interrupted
_PIECE = 2**22  # bytes; the store takes no value above 8 MB


class RankDied(RuntimeError):
    """One of the processes ended before its work was done."""


class Shards:
    """This process among those that run the command.

    Attributes:
        rank: its number, from 0.
        count: of the processes.
        local_rank: its number on this machine.
    """

    def __init__(self, store: Any, rank: int, count: int, local_rank: int) -> None:
        self.store, self.rank, self.count, self.local_rank = store, rank, count, local_rank

    @classmethod
    def join(cls) -> Shards | None:
        """What the environment tells of the others; None where there are none.

        From here on SIGTERM, by which torchrun stops the others when one died, interrupts as Ctrl-C does.

        Raises:
            ValueError: the environment is incomplete.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        from torch import distributed

        store, rank, count = next(distributed.rendezvous("env://"))
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return cls(store, rank, count, int(os.environ.get("LOCAL_RANK", rank)))

    def own(self, items: Sequence[Any]) -> list[Any]:
        """This process's share of all items: every ``count``-th."""
        return list(items[self.rank :: self.count])

    def device(self, name: str) -> str:
        """The device for this process; ``auto`` is the GPU of its number, if there are any."""
        import torch

        if name == "auto" and torch.cuda.is_available():
            name = f"cuda:{self.local_rank}"
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # or each process would take memory of the first one too
        return name

    def share(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns in the first process, in all of them; plain values."""
        if self.rank > 0:
            return self._get("shared")
        value = make()
        self._set("shared", value)
        return value

    def gather(
        self, parts: Sequence[str], figures: dict[str, float], interrupted: bool = False
    ) -> tuple[list[str], dict[str, float]] | None:
        """Tell that this process has done its work; in the first one wait for all the others.

        Those that tell nothing are waited for until this process is interrupted, as it is when one died; and then for
        another ``GRACE`` seconds.

        Args:
            parts: the file of its results, if there is one.
            figures: to be added to those of the others.
            interrupted: whether this process was, before.

        Returns:
            in the first process the files of all, in the order of their ranks, and the sums; None in the others.

        Raises:
            RankDied: naming those that did, and the files of the others.
        """
        self._set(f"done/{self.rank}", (list(parts), figures))
        if self.rank > 0:
            return None
        missing, until = list(range(self.count)), time.monotonic() + GRACE if interrupted else None
        while missing and (until is None or time.monotonic() < until):
            try:
                missing = [rank for rank in missing if not self.store.check([f"done/{rank}"])]
                time.sleep(_PERIOD if missing else 0)
            except KeyboardInterrupt:
                until = until or time.monotonic() + GRACE
        done = [self._get(f"done/{rank}") for rank in range(self.count) if rank not in missing]
        files = [file for names, _ in done for file in names]
        if missing:
            kept = f"; the results of the others are in {', '.join(files)}" if files else ""
            raise RankDied(f"rank {', '.join(map(str, missing))} died{kept}")
        return files, {name: sum(figures[name] for _, figures in done) for name in figures}

    def _set(self, key: str, value: Any) -> None:
        text = json.dumps(value)  # ASCII
        pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
        for number, piece in enumerate(pieces):
            self.store.set(f"{key}/{number}", piece)
        self.store.set(key, str(len(pieces)))

    def _get(self, key: str) -> Any:
        while not self.store.check([key]):
            time.sleep(_PERIOD)
        count = int(self.store.get(key))
        return json.loads(b"".join(self.store.get(f"{key}/{number}") for number in range(count)))


class PartWriter(JsonlWriter):
    """The results of one process: a line for each of its inputs, of those that failed too, in their order.

    Args:
        path: of the result that the parts shall become.
    """

    def __init__(self, path: str | os.PathLike[str], shards: Shards) -> None:
        self.path = f"{os.fspath(path)}.part{shards.rank}of{shards.count}.jsonl"
        super().__init__(self.path)

    def skip(self, name: str, error: object) -> None:
        """Append an input that has no result."""
        self.target.file.write(json.dumps({"file_name": name, "error": str(error)}) + "\n")


def merge(parts: Sequence[str], class_names: Sequence[str]) -> Iterator[tuple[Detections, str, int]]:
    """Detections, name and COCO image id of every image of all parts, in the order of the inputs.

    The parts are of all processes, in their order, and go when this has been read to its end.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, encoding="utf-8")) for part in parts]
        for lines in itertools.zip_longest(*files):  # the inputs went round
            for line in lines:
                values = json.loads(line) if line is not None else {"error": "interrupted"}
                if "error" not in values:
                    yield Detections.from_dict(values, class_names), values["file_name"], values["image_id"]
    for part in parts:
        Path(part).unlink()
