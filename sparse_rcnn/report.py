"""``python -m sparse_rcnn.report RUN``: write ``report.html`` of a training run, at its end or while it goes on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from sparse_rcnn.engine.run_report import write_report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = _Parser(prog="sparse_rcnn.report", description="Show a training run in one HTML file.")
    parser.add_argument("run", help="output folder of sparse_rcnn.train")
    parser.add_argument("--val", help="data set to draw and score images of, instead of the run's own")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 (a part could not be made, or the file not written) or 2 (bad arguments)."""
    args = build_parser().parse_args(arguments)
    try:
        path, problems = write_report(args.run, args.val, args.device)
    except (ValueError, OSError) as error:
        print(f"sparse_rcnn.report: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(path)
    for problem in problems:
        print(f"sparse_rcnn.report: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
