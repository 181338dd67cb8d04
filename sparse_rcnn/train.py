"""``python -m sparse_rcnn.train --config RECIPE --data DIR|FILE --output DIR``: train or fine-tune a detector."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.arguments import read_arguments
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.logging import RunLog
from sparse_rcnn.engine.run_report import try_report
from sparse_rcnn.engine.trainer import Trainer

# What a run is made of; on --resume it comes from the checkpoint and must not be given differently.
_FIXED = ("data", "preset", "weights", "backbone", "backbone_weights", "set", "seed", "batch_size")
# Given on --resume, the first takes the place of the second, which would win otherwise.
_DERIVED = {"epochs": "steps", "base_lr": "lr", "decay_at": "decay_steps"}


def config_from_flags(flags: dict[str, Any]) -> TrainConfig:
    """The configuration of the given fields; with ``resume``, on top of the one in the checkpoint.

    Raises:
        ValueError: a bad value, a missing flag, or a flag that contradicts the run to be resumed.
    """
    if "output" not in flags:
        raise ValueError("--output: expected a folder for checkpoints, got none")
    if flags.get("resume"):
        saved = dict(load_checkpoint(Path(flags["output"]) / "last.pt")["train_config"])
        saved.update(time_limit=None, accept_changed_data=False)  # of one sitting, not of the run
        changed = [name for name in _FIXED if name in flags and flags[name] != saved.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"--{name.replace('_', '-')}: the run was started with {saved.get(name)!r}, "
                f"got {flags[name]!r}; it cannot change on --resume"
            )
        saved |= {name: None for given, name in _DERIVED.items() if given in flags}
        flags = {**saved, **flags}
    if "data" not in flags:
        raise ValueError("--data: expected a folder or file in COCO, YOLO or Pascal VOC format, got none")
    return TrainConfig(**flags)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 (SIGTERM and a time limit are asked for), 1 (training failed), 2 (bad arguments or
    data) or 130 (interrupted by SIGINT, after a checkpoint if once)."""
    distributed.connect()
    flags = read_arguments(arguments)
    try:
        distributed.start(flags.get("device", "auto"))
        trainer = Trainer(config_from_flags(_after_restart(flags)))
        distributed.remember(_started(flags))
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, 2)
    try:
        stopped_by = trainer.run()
    except (RuntimeError, ValueError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:  # the second one; the first lets the step end and saves
        return _fail("interrupted before the step was done; the last checkpoint is as it was", 130)
    main_process = distributed.is_main()
    distributed.stop()
    if main_process and trainer.step == trainer.config.steps and stopped_by is None:
        try_report(trainer.output, trainer.config.device, RunLog.say)
    return 130 if stopped_by == signal.SIGINT else 0


def _after_restart(flags: dict[str, Any]) -> dict[str, Any]:
    """With ``resume``, if ``torchrun`` started the processes anew after they had begun this very run and saved."""
    last = Path(flags.get("output", ""), "last.pt")
    if distributed.restarts() and distributed.remembered(_started(flags)) and last.exists():
        return {**flags, "resume": True}
    return flags


def _started(flags: dict[str, Any]) -> str:
    return f"training into {flags.get('output')}"


def _fail(error: Exception | str, code: int) -> int:
    if distributed.first_to_complain():
        print(f"sparse_rcnn.train: error: {distributed.describe(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
