"""Small charts as SVG text: lines over steps, bars of classes, boxes on an empty image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from sparse_rcnn.drawing import colour_of

# Of a line chart, in its own units, which are pixels at full width.
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 28, 34, 44  # margins of the area that the lines lie in
_LEGEND_ROW, _LETTER = 20, 7.2  # height of a row of the legend; width of a letter of 13 pixels, about
# Okabe and Ito's colours, which colour-blind people tell apart too, less the yellow that white swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_MANY_POINTS = 200
_BAR, _BAR_WIDTH, _NAME_LETTERS = 22, 300, 24

# Of every chart; the page that holds some has it once.
STYLE = """\
svg text { font: 13px system-ui, sans-serif; fill: #444; }
svg .title { font-size: 15px; font-weight: 600; fill: #222; }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .grid { stroke: #e6e6e6; }
svg .axis { stroke: #999; }
svg .back { fill: #f0f2f4; }
svg .bar { fill: #0072b2; }
svg .canvas { fill: #f5f7f9; stroke: #888; }
svg .box { fill: none; stroke-width: 1.4; stroke-opacity: 0.7; }
"""

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str, lines: Mapping[str, Points], x_label: str = "step", log: bool = False, x_start: float | None = 0.0
) -> str:
    """An SVG element with one line for each name.

    Long lines are shown as means of neighbouring points. A value that is not finite, or not positive on a logarithmic
    axis, leaves a gap.

    Args:
        lines: name -> (x, y) in order of x.
        x_label: what x is.
        log: a logarithmic y axis; a linear one begins at 0, or at the smallest value where that is negative.
        x_start: where the x axis begins; None is at the first point.
    """
    lines = {name: thin(points) for name, points in lines.items()}
    shown = [(x, y) for points in lines.values() for x, y in points if _drawable(y, log)]
    if not shown:
        return ""
    xs, ys = zip(*shown, strict=True)
    x_axis = _Axis(min(xs) if x_start is None else x_start, max(xs), LEFT, WIDTH - RIGHT)
    low, high = (min(ys) / 1.05, max(ys) * 1.05) if log else (min(0.0, *ys), max(ys) * 1.05 or 1.0)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    legend, legend_height = _legend(list(lines)) if len(lines) > 1 else ([], 0)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + legend_height}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
    ]
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4.5:.1f}" text-anchor="end">{_number(value)}</text>')
    bottom = HEIGHT - BOTTOM
    for value in x_axis.ticks():
        parts.append(f'<text x="{x_axis(value):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{bottom + 37}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for index, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [(x_axis(x), y_axis(y)) if _drawable(y, log) else None for x, y in points]
        parts.append(f'<path stroke="{colour}" d="{_path(places)}"><title>{escape(name)}</title></path>')
        if len(places) <= 30:  # few points are worth seeing, and one alone makes no line
            parts += [f'<circle fill="{colour}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.5"/>' for p in places if p]
    return "\n".join([*parts, *legend, "</svg>"])


def bar_chart(title: str, values: Mapping[str, float]) -> str:
    """An SVG element with a horizontal bar for each name; values of 0..1, below 0 where there is none."""
    left = int(min(max((len(name) for name in values), default=0), _NAME_LETTERS) * _LETTER) + 12
    width, height = left + _BAR_WIDTH + 58, 34 + _BAR * len(values)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="0" y="20">{escape(title)}</text>',
    ]
    for row, (name, value) in enumerate(values.items()):
        y = 34 + _BAR * row
        short = name if len(name) <= _NAME_LETTERS else name[: _NAME_LETTERS - 1] + "…"
        length = max(value, 0.0) * _BAR_WIDTH
        text = f"{value:.3f}" if value >= 0 else "none"
        parts += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(short)}<title>{escape(name)}</title></text>',
            f'<rect class="back" x="{left}" y="{y + 2}" width="{_BAR_WIDTH}" height="{_BAR - 6}"/>',
            f'<rect class="bar" x="{left}" y="{y + 2}" width="{length:.1f}" height="{_BAR - 6}"/>',
            f'<text x="{left + _BAR_WIDTH + 8}" y="{y + 14}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def box_canvas(title: str, boxes: np.ndarray, centres: bool = False) -> str:
    """An SVG element with boxes on an empty image of 4 : 3, or their centres alone.

    Args:
        boxes: [N, 4], normalised (cx, cy, w, h); they may reach outside the image.
    """
    width, height, margin = 400, 300, 40
    parts = [
        f'<svg viewBox="{-margin} {-margin - 14} {width + 2 * margin} {height + 2 * margin + 14}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<text class="title" x="{-margin}" y="{-margin}">{escape(title)}</text>',
        f'<rect class="canvas" x="0" y="0" width="{width}" height="{height}"/>',
    ]
    for index, (cx, cy, w, h) in enumerate(np.nan_to_num(boxes).tolist()):
        colour = "#{:02x}{:02x}{:02x}".format(*colour_of(index))
        x, y, w, h = cx * width, cy * height, w * width, h * height
        if centres:
            parts.append(f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        else:
            place = f'x="{x - w / 2:.1f}" y="{y - h / 2:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}"'
            parts.append(f'<rect class="box" stroke="{colour}" {place}/>')
    return "\n".join([*parts, "</svg>"])


def as_file(svg: str) -> str:
    """A chart as the text of an SVG file, on white."""
    head, _, rest = svg.partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff" ')
    return f"{head}>\n<style>\n{STYLE}</style>{rest}\n"


def thin(points: Points, limit: int = _MANY_POINTS) -> list[tuple[float, float]]:
    """At most ``limit`` points: means of groups of neighbours where there are more."""
    if len(points) <= limit:
        return list(points)
    groups = np.array_split(np.asarray(points, dtype=np.float64), limit)
    return [tuple(group.mean(0).tolist()) for group in groups]


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values from ``low`` to ``high``, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


class _Axis:
    """Values to places: ``low`` at ``start``, ``high`` at ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        part = (value - low) / (high - low) if high > low else 0.5
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 2, 5)):
            values = [factor * 10.0**decade for decade in decades for factor in factors]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) >= 3:
                return values[:: math.ceil(len(values) / 8)]
        return nice_ticks(self.low, self.high)


def _drawable(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log)


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    parts, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        parts.append(f"{pen}{place[0]:.1f},{place[1]:.1f}")
        pen = "L"
    return " ".join(parts)


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """The elements under the chart, in as many rows as the names need, and the height of these."""
    parts, x, y = [], LEFT, HEIGHT + 10
    for index, name in enumerate(names):
        width = 26 + len(name) * _LETTER
        if x + width > WIDTH and x > LEFT:
            x, y = LEFT, y + _LEGEND_ROW
        parts.append(f'<rect fill="{_COLOURS[index % len(_COLOURS)]}" x="{x:.0f}" y="{y - 8}" width="12" height="6"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="{y}">{escape(name)}</text>')
        x += width + 8
    return parts, y - HEIGHT + 8


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
