"""``python -m sparse_rcnn.train --data DIR|FILE --output DIR``: train or fine-tune a detector."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparse_rcnn.engine import distributed
from sparse_rcnn.engine.checkpoint import load_checkpoint
from sparse_rcnn.engine.config import TrainConfig
from sparse_rcnn.engine.trainer import Trainer

# What a run is made of; on --resume it comes from the checkpoint and must not be given differently.
_FIXED = ("data", "preset", "weights", "backbone", "backbone_weights", "set", "seed", "batch_size")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n" if distributed.first_to_complain() else None)


def build_parser() -> argparse.ArgumentParser:
    """One flag for each field of :class:`TrainConfig`; a flag that is not given leaves no attribute."""
    parser = _Parser(
        prog="sparse_rcnn.train",
        description="Train a Sparse R-CNN on a data set in COCO, YOLO or Pascal VOC format.",
        epilog="With --resume every flag that is not given keeps the value that the run was started with.",
        argument_default=argparse.SUPPRESS,
    )
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", **_flag(field, types[field.name]))
    return parser


def _flag(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    text = field.metadata["help"]
    if field.default is not dataclasses.MISSING and field.default not in (None, False, ()):
        text += f" (default {field.default})"
    text = text.replace("%", "%%")
    if typing.get_origin(hint) is dict:
        return {"nargs": "+", "action": "extend", "type": _key_value, "metavar": "KEY=VALUE", "help": text}
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if typing.get_origin(hint) is tuple or any(typing.get_origin(member) is tuple for member in members):
        return {"nargs": "+", "type": int, "metavar": "N", "help": text}
    return {"type": members[0] if members else hint, "metavar": field.name.upper(), "help": text}


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key.replace("-", "_"), value


def config_from_flags(flags: dict[str, Any]) -> TrainConfig:
    """The configuration of the given flags; with ``resume``, on top of the one in the checkpoint.

    Raises:
        ValueError: a bad value, a missing flag, or a flag that contradicts the run to be resumed.
    """
    flags = dict(flags)
    if "set" in flags:
        flags["set"] = dict(flags["set"])
    if "output" not in flags:
        raise ValueError("--output: expected a folder for checkpoints, got none")
    if flags.get("resume"):
        saved = dict(load_checkpoint(Path(flags["output"]) / "last.pt")["train_config"])
        saved["time_limit"] = None  # of one sitting, not of the run
        changed = [name for name in _FIXED if name in flags and flags[name] != saved.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"--{name.replace('_', '-')}: the run was started with {saved.get(name)!r}, "
                f"got {flags[name]!r}; it cannot change on --resume"
            )
        flags = {**saved, **flags}
    if "data" not in flags:
        raise ValueError("--data: expected a folder or file in COCO, YOLO or Pascal VOC format, got none")
    return TrainConfig(**flags)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 (training failed), 2 (bad arguments or data) or 128 + the signal's number."""
    distributed.connect()
    flags = vars(build_parser().parse_args(arguments))
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
    distributed.stop()
    return 0 if stopped_by is None else 128 + stopped_by


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
