"""Processes that measure one implementation each, for its memory, and answer what they are asked line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT


class MeasuredProcess:
    """The parent's end of a module of this package that answers lines with JSON, the first when it is ready.

    Attributes:
        start_up: seconds until it was.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        begin = time.perf_counter()
        self._receive()
        self.start_up = time.perf_counter() - begin

    def ask(self, message: str) -> Any:
        """Send one line, get one back."""
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()
        return self._receive()

    def gate(self) -> Any | None:
        """What it writes for the comparison with the others; None if that is nothing."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gate.pt"
            return torch.load(path) if self.ask(f"gate {path}") else None

    def _receive(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker broke: {self.process.args}")
        return json.loads(line)


@contextlib.contextmanager
def start(module: str, *arguments: Any) -> Iterator[MeasuredProcess]:
    """Run ``python -m module arguments`` for as long as the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield MeasuredProcess(process)
    finally:
        process.stdin.close()
        process.wait()
