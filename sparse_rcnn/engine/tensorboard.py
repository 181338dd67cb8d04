"""The figures of a run for TensorBoard, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TensorBoard:
    """Event files of a run's records; without TensorBoard, or once it fails, nothing.

    Args:
        folder: for the event files.
        step: completed steps at the start; what an earlier process wrote of later ones does not count.

    Attributes:
        notes: lines for the reader of the run, to be said once.
    """

    def __init__(self, folder: str | Path, step: int) -> None:
        self.notes: list[str] = []
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)
            self.notes.append(f"TensorBoard: tensorboard --logdir {folder}")
        except ImportError:  # it is an extra
            pass
        except Exception as error:  # such as a folder that cannot be written: no reason not to train
            self.notes.append(f"warning: no TensorBoard files: {error}")

    def record(self, values: dict[str, Any]) -> None:
        """Add the numbers of a record of the log."""
        if self.writer is None:
            return
        try:
            for tag, value in scalars(values).items():
                self.writer.add_scalar(tag, value, values["step"])
            self.writer.flush()
        except Exception as error:
            self.writer = None
            self.notes.append(f"warning: no more TensorBoard files: {error}")

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """TensorBoard's names for the numbers of one record: the losses side by side, the figures of each class apart."""
    group = {"train": "train", "val": "validation"}.get(record["kind"], record["kind"])
    found = {}
    for name, value in record.items():
        if name == "per_class":
            found |= {f"AP of classes/{class_name}": ap for class_name, ap in value.items()}
        elif isinstance(value, (int, float)) and name != "step":
            found[f"{'loss' if name.startswith('loss') else group}/{name}"] = value
    return found
