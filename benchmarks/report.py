"""Figures as people read them: the table on the terminal and the one in the README."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OPERATORS, MODEL = "benchmarks", "model"  # the tables in the README
COMMAND_MODEL = "python -m benchmarks.model --compile --json benchmarks/results/cpu.json --readme"
COMMAND = "python -m benchmarks --json benchmarks/results/cpu.json --readme"
_RATES = (("bytes_per_s", "GB/s", "copy_bytes_per_s"), ("flop_per_s", "GFLOP/s", "gemm_flop_per_s"))


def show_ceilings(dtype: str, limits: Mapping[str, float]) -> None:
    """One line: what this machine does at best."""
    copy, gemm = limits["copy_bytes_per_s"], limits["gemm_flop_per_s"]
    print(f"\nceilings of {dtype}, measured now: copy {copy / 1e9:.1f} GB/s, matrix product {gemm / 1e12:.3f} TFLOP/s")


def print_case(operator: str, row: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """The table of one case and mode."""
    print(f"\n{operator}: {row['case']}, {row['dtype']}, {row['device']}, {row['mode'] or 'RED GATE'}")
    for name, gate in row["gate"].items():
        if not gate["passed"]:
            print(f"  {name}: {_reason(gate)}")
    for name, figures in row["implementations"].items():
        cells = [f"  {name:14s}{figures['median_ms']:10.3f} ms  {figures['q20_ms']:8.3f} .. {figures['q80_ms']:8.3f}"]
        ratio = row["ratios"].get(name)
        cells.append(f"{ratio['median']:6.2f}x" if ratio else " " * 7)
        for rate, unit, limit in _RATES:
            if figures[rate]:
                cells.append(f"{figures[rate] / 1e9:8.1f} {unit} {figures[rate] / limits[limit]:6.1%}")
        if figures.get("peak_bytes") is not None:
            cells.append(f"{figures['peak_bytes'] / 2**20:8.1f} MiB")
        print("  ".join(cells))
    for name, reason in row["ungated"].items():
        print(f"  {name} is not compared: {reason}")


def _reason(gate: Mapping[str, Any]) -> str:
    if "error" in gate:
        return gate["error"]
    return f"{gate['tensor']}: error {gate['max_error']:.3g}, {gate['share_of_allowed']:.3g} of what is allowed"


def readme_table(report: Mapping[str, Any]) -> str:
    """The headline rows as a Markdown table of ratios, and a line that says what made it."""
    lines = [
        "| operator | problem | type | forward | forward + backward | memory of the forward |",
        "|---|---|---|---|---|---|",
    ]
    for operator, case, dtype, modes in _headlines(report):
        cells = [f"`{operator}`", case, dtype, *(_speed(modes.get(mode)) for mode in ("forward", "both"))]
        lines.append(f"| {' | '.join([*cells, _memory(modes.get('forward'))])} |")
    return "\n".join([*lines, "", *made_by(report["environment"], COMMAND)])


def model_table(report: Mapping[str, Any]) -> str:
    """The whole detector's figures as a Markdown table, and a line that says what made it."""
    rows = report["implementations"]
    lines = [
        "| | whole image | backbone + FPN | head | start-up | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in rows.items():
        ratios = figures["ratios"]
        speeds = [f"{ratios[part]:.2f}x" if part in ratios else "–" for part in ("whole", "backbone+FPN", "head")]
        if not ratios:
            speeds = ["1"] * 3
        seconds, memory = figures["start_up_s"], figures["peak_rss_gib"]
        lines.append(f"| {' | '.join([name, *speeds, f'{seconds:.1f} s', f'{memory:.2f} GiB'])} |")
    height, width = report["size"]
    note = made_by(report["environment"], COMMAND_MODEL)
    note[0] = f"Preset `{report['preset']}`, one image of {height}x{width}, speed against `reference`. {note[0]}"
    return "\n".join([*lines, "", *note])


def made_by(env: Mapping[str, Any], command: str) -> list[str]:
    """The lines under a table: on what, and by which command."""
    commit = (env["commit"] or "unknown")[:7] + (" with changes" if env["dirty"] else "")
    machine = env.get("gpu") or f"{env['processor']} ({env['isa']}), {env['threads']} threads"
    return [f"Times in one run on {machine}, torch {env['torch']}, commit {commit}; made by", f"`{command}`."]


def update_readme(path: Path, table: str, name: str = OPERATORS) -> None:
    """Put ``table`` between the two markers of that name in the README.

    Raises:
        ValueError: the file has not one of each marker.
    """
    before, _, after = _split(path, name)
    begin, end = _markers(name)
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def table_in(path: Path, name: str = OPERATORS) -> str:
    """What stands between the two markers of that name."""
    return _split(path, name)[1]


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def _split(path: Path, name: str) -> tuple[str, str, str]:
    text, (begin, end) = path.read_text(), _markers(name)
    found = re.fullmatch(rf"(.*){re.escape(begin)}\n(.*?)\n?{re.escape(end)}(.*)", text, re.DOTALL)
    if found is None or text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path.name}: expected {begin} and {end}, each once and on lines of their own")
    return found[1], found[2], found[3]


def _headlines(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(operator, case, dtype, mode -> row) in the order of the report."""
    grouped: dict[tuple[str, str, str], dict[str, Any]] = {}
    for operator, result in report["operators"].items():
        for row in result["cases"]:
            if row["headline"]:
                grouped.setdefault((operator, row["case"], row["dtype"]), {})[row["mode"]] = row
    for key, modes in grouped.items():
        yield *key, modes


def _speed(row: Mapping[str, Any] | None) -> str:
    """How many times as fast as each peer."""
    if row is None or not row["ratios"]:
        return "–"
    return ", ".join(f"{ratio['median']:.1f}x {name}" for name, ratio in row["ratios"].items())


def _memory(row: Mapping[str, Any] | None) -> str:
    """Beyond what was held before, as a share of what eager takes."""
    if row is None or "native" not in row["implementations"]:
        return "–"
    ours, eager = (row["implementations"][name].get("peak_bytes") for name in ("native", "reference"))
    return f"{ours / eager:.0%} of eager's" if ours is not None and eager else "–"
