"""All operators' benchmarks, one process each, into one JSON file.

    python -m benchmarks [--device cpu|cuda] [--dtype ...] [--quick] [--case TEXT] [--compile] [--json FILE] [--readme]

``--readme`` puts the table of FILE into README.md; without ``--json`` that of the committed figures, measuring nothing.
"""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.environment import ROOT, write_sections
from benchmarks.harness import build_parser
from benchmarks.report import readme_table, update_readme
from sparse_rcnn import ops

FIGURES = ROOT / "benchmarks" / "results" / "cpu.json"


# Benchmarks of operators that work together, which have none of their own.
TOGETHER = {"losses": ("set_focal_loss", "set_box_loss"), "matching": ("matching_cost", "linear_assignment")}


def names() -> list[str]:
    """The benchmark files here, each of an operator or of several."""
    wanted = {*ops.__all__, *TOGETHER}
    return [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 when a gate was red or a benchmark broke."""
    parser = build_parser("benchmarks")
    parser.description = "Gate and time all operators."
    parser.add_argument("--readme", action="store_true", help="put the table into README.md; alone, measures nothing")
    options = parser.parse_args(arguments)
    failed: list[str] = []
    if options.json or not options.readme:
        failed = run_all(names(), _flags(options), options.json)
    if options.readme and not failed:
        update_readme(ROOT / "README.md", readme_table(json.loads((options.json or FIGURES).read_text())))
    if failed:
        print(f"red or broken: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run_all(names: Sequence[str], flags: Sequence[str], target: Path | None) -> list[str]:
    """Run each operator's file in a process of its own, merge what they report; returns those that failed.

    A kernel that breaks its process, or the GPU's context, leaves the others their figures; ``target`` is written
    after each.
    """
    merged: dict[str, Any] = {"environment": None, "failed": [], "operators": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            part = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", *flags, "--json", str(part)]
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                merged["failed"].append(name)
            if part.exists():
                report = json.loads(part.read_text())
                merged["environment"] = merged["environment"] or report["environment"]
                merged["operators"] |= report["operators"]
            if target:
                write_sections(target, **merged)
    return merged["failed"]


def _flags(options: Any) -> list[str]:
    flags = ["--device", options.device, "--dtype", *options.dtype, "--case", options.case]
    return flags + [f"--{name}" for name in ("quick", "compile") if getattr(options, name)]


if __name__ == "__main__":
    sys.exit(main())
