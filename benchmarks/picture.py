"""Where the time goes: a stacked bar for each optimized detector and batch, and beside it one of the floors, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

COLOURS = (
    *("#9aa0a6", "#08306b", "#08519c", "#2171b5", "#4292c6", "#6baed6"),
    *("#c7a76c", "#b30000", "#e34a33", "#fc8d59", "#fdbb84", "#fdd49e", "#5b5b5b"),
)
WIDTH, LEFT, BAR, GAP, TOP, KEY = 900, 210, 26, 14, 70, 18  # pixels


def draw(report: Mapping[str, Any]) -> str:
    """The picture of a report of ``benchmarks.model``."""
    bars = list(_bars(report))
    steps = list(dict.fromkeys(step for _, bar in bars for step in bar))
    colours = {step: COLOURS[index % len(COLOURS)] for index, step in enumerate(steps)}
    longest = max(sum(bar.values()) for _, bar in bars)
    height = TOP + len(bars) * (BAR + GAP) + KEY * (2 + -(-len(steps) // 4))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="16">{escape(_title(report))}</text>',
        f'<text x="16" y="48" fill="#555">{escape(_subtitle(report))}</text>',
    ]
    for index, (name, bar) in enumerate(bars):
        lines += _bar(name, bar, TOP + index * (BAR + GAP), (WIDTH - LEFT - 110) / longest, colours)
    for index, step in enumerate(steps):
        x, y = 16 + index % 4 * 215, TOP + len(bars) * (BAR + GAP) + KEY * (1 + index // 4)
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colours[step]}"/>')
        lines.append(f'<text x="{x + 18}" y="{y + 11}">{escape(step)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _bars(report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Label, and seconds an image of each step."""
    for name, figures in report["implementations"].items():
        batches: dict[int, dict[str, Any]] = {}
        for label, row in figures["components"].items():
            step, _, count = label.rpartition(" x")
            batches.setdefault(int(count), {})[step] = row
        for count, rows in batches.items():
            label = name.removeprefix("optimized, ") + (f", batch {count}" if len(batches) > 1 else "")
            yield label, {step: row["seconds"]["median"] / count for step, row in rows.items()}
            yield "its floor", {step: row["floor_s"] / count for step, row in rows.items()}


def _bar(
    name: str, bar: Mapping[str, float], y: int, pixels_a_second: float, colours: Mapping[str, str]
) -> Iterator[str]:
    is_floor = name == "its floor"
    middle, x, thick = y + BAR // 2 + 4, float(LEFT), BAR - 10 * is_floor
    yield f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>'
    for step, seconds in bar.items():
        width = seconds * pixels_a_second
        opacity = ' fill-opacity="0.6"' if is_floor else ""
        yield (
            f'<rect x="{x:.1f}" y="{y + (BAR - thick) // 2}" width="{width:.1f}" height="{thick}" '
            f'fill="{colours[step]}"{opacity}><title>{escape(step)}: {1e3 * seconds:.3f} ms</title></rect>'
        )
        x += width
    yield f'<text x="{x + 8:.1f}" y="{middle}">{1e3 * sum(bar.values()):.3g} ms</text>'


def _title(report: Mapping[str, Any]) -> str:
    height, width = report["size"]
    return f"Where the time of an image goes: {report['preset']}, {height}x{width}"


def _subtitle(report: Mapping[str, Any]) -> str:
    env = report["environment"]
    machine = env.get("gpu") or f"{env['processor']} ({env['isa']}), {env['threads']} threads"
    return f"{machine}, torch {env['torch']}; each step alone, floors from this machine's best product and copy"
