"""``python -m sparse_rcnn.convert IN OUT [--to official|mmdet|safetensors]``: checkpoints between families."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from sparse_rcnn.weights import Checkpoint, export_checkpoint, read_checkpoint, save_pretrained

_NAMES = {"sparse_rcnn": "sparse_rcnn (own format)", "official": "official", "mmdet": "mmdetection"}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = _Parser(
        prog="sparse_rcnn.convert",
        description="Convert a Sparse R-CNN checkpoint; the result is read back and compared first.",
    )
    parser.add_argument("input", metavar="IN", help="own directory, official .pth or .pkl, or mmdetection .pth")
    parser.add_argument("output", metavar="OUT", help="directory for safetensors, .pth file for the others")
    parser.add_argument(
        "--to", default="safetensors", choices=("safetensors", "official", "mmdet"), help="default: safetensors"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="type of the stored weights (default: as in IN)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 (IN cannot be read or OUT cannot hold it) or 2 (bad arguments)."""
    args = build_parser().parse_args(arguments)
    problem = _bad_paths(args)
    if problem:
        return _fail(problem, 2)
    try:
        checkpoint = read_checkpoint(args.input)
        print(describe(checkpoint))
        written = _write(checkpoint, args)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)
    print(f"wrote {written} ({args.to}{f', {args.dtype}' if args.dtype else ''})")
    return 0


def describe(checkpoint: Checkpoint) -> str:
    """What was recognised, in one line."""
    config = checkpoint.config
    facts = (
        f"{_NAMES[checkpoint.family]}: {config.backbone}",
        f"{config.num_proposals} proposals",
        f"{config.num_classes} class" + "es" * (config.num_classes != 1),
        f"{config.num_stages} stages",
        f"{len(checkpoint.state_dict)} tensors",
    )
    return ", ".join(facts)


def _bad_paths(args: argparse.Namespace) -> str | None:
    output = Path(args.output)
    if not Path(args.input).exists():
        return f"IN: expected a checkpoint, there is no {args.input}"
    if args.to == "safetensors":
        return f"OUT: expected a directory, {output} is a file" if output.is_file() else None
    if output.suffix.lower() != ".pth" or output.is_dir():
        return f"OUT: expected a .pth file for --to {args.to}, got {output}"
    return None


def _write(checkpoint: Checkpoint, args: argparse.Namespace) -> Path:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    config, state = checkpoint.config, checkpoint.state_dict
    if args.to == "safetensors":
        return save_pretrained(config, state, args.output, dtype)
    written = export_checkpoint(config, state, args.output, args.to, dtype)
    if config.level_rule != {"official": "detectron2", "mmdet": "mmdet"}[args.to]:
        print(f"note: the weights are for the {config.level_rule} level rule, {args.to} always uses its own")
    return written


def _fail(error: Exception | str, code: int) -> int:
    text = str(error) or type(error).__name__
    print(f"sparse_rcnn.convert: error: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
