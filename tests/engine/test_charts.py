"""Charts: where known data lies in the drawing."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from sparse_rcnn.engine.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    as_file,
    bar_chart,
    box_canvas,
    line_chart,
    nice_ticks,
    thin,
)

X0, X1, Y0, Y1 = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP  # the corners of the drawing area
NASTY = 'a<b>&"c"'


def strokes(svg: str) -> list[list[list[float]]]:
    """Of each line, its unbroken strokes as flat lists x, y, x, y..."""
    paths = [element.get("d") for element in ElementTree.fromstring(svg).iter("path")]
    return [[[float(v) for v in re.findall(r"[-\d.]+", part)] for part in path.split("M")[1:]] for path in paths]


def texts(svg: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter("text")]


def test_a_linear_line_lies_where_its_values_say():
    svg = line_chart("t", {"a": [(0, 0.0), (5, 1.0), (10, 2.0)]})
    height = (Y0 - Y1) / 2.1  # of 1: five per cent stay free over the largest value
    ((line,),) = strokes(svg)
    assert line == pytest.approx([X0, Y0, (X0 + X1) / 2, Y0 - height, X1, Y0 - 2 * height], abs=0.051)
    labels = {text.text: text for text in texts(svg)}
    assert {"0", "0.5", "1", "1.5", "2"} <= labels.keys()
    assert float(labels["1.5"].get("y")) == pytest.approx(Y0 - 1.5 * height + 4.5, abs=0.051)
    assert float(labels["10"].get("x")) == X1


def test_a_logarithmic_line_lies_where_its_values_say():
    svg = line_chart("t", {"a": [(0, 1.0), (1, 10.0), (2, 100.0)]}, log=True)
    decade = (Y0 - Y1) / math.log10(100 * 1.05**2)
    above = math.log10(1.05) * decade
    ((line,),) = strokes(svg)
    assert line[1::2] == pytest.approx([Y0 - above, Y0 - above - decade, Y1 + above], abs=0.051)
    assert {"1", "10", "100"} <= {text.text for text in texts(svg)}


def test_what_cannot_be_drawn_leaves_a_gap():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, -1.0), (4, 3.0), (5, 4.0)]
    ((first, second),) = strokes(line_chart("t", {"a": points}, log=True))
    assert len(first) == len(second) == 4 and first[0] == X0 and second[2] == X1
    assert [len(part) for part in strokes(line_chart("t", {"a": points}))[0]] == [4, 6]
    assert line_chart("t", {"a": [(0, math.nan)]}) == line_chart("t", {}) == ""


def test_where_the_x_axis_begins():
    points = [(4, 1.0), (6, 1.0)]
    assert strokes(line_chart("t", {"a": points}))[0][0][0] == pytest.approx(X0 + (X1 - X0) * 4 / 6, abs=0.051)
    assert strokes(line_chart("t", {"a": points}, x_start=None))[0][0][0] == X0


@pytest.mark.parametrize("points", [[(3, 0.0)], [(0, 0.0), (1, 0.0)], [(5, 2.0), (5, 3.0)], [(1, 1e-9), (2, 1e9)]])
@pytest.mark.parametrize("log", [False, True])
def test_awkward_data_stays_in_the_drawing_area(points, log):
    svg = line_chart("t", {"a": points}, log=log, x_start=None)
    for line in strokes(svg) if svg else []:
        for stroke in line:
            assert all(X0 <= x <= X1 for x in stroke[::2]) and all(Y1 <= y <= Y0 for y in stroke[1::2])
    assert svg or log  # nothing is positive


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.277, [0, 0.05, 0.1, 0.15, 0.2, 0.25]),
        (25, 4275, [1000, 2000, 3000, 4000]),
        (1, 6, [1, 2, 3, 4, 5, 6]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert nice_ticks(low, high) == expected


def test_the_legend_and_the_labels_lie_within_the_chart_and_apart():
    names = [f"a rather long name {i}" for i in range(7)]
    svg = line_chart("t", {name: [(0, 1.0), (123456, 2.0)] for name in names})
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    rows: dict[float, list[tuple[float, float]]] = {}
    for text in texts(svg):
        x, y, size = float(text.get("x")), float(text.get("y")), len(text.text) * 7.2
        left = x - {"end": 1.0, "middle": 0.5}.get(text.get("text-anchor"), 0.0) * size
        assert left >= 0 and left + size <= width and 10 <= y <= height
        rows.setdefault(y, []).append((left, left + size))
    for row in rows.values():
        row.sort()
        assert all(a[1] <= b[0] for a, b in zip(row, row[1:], strict=False))
    assert names == [text.text for text in texts(svg)][-7:]


def test_long_lines_are_means_of_neighbours():
    points = [(i, float(i % 2)) for i in range(1000)]
    assert thin(points[:200]) == points[:200]
    short = thin(points, 100)
    assert short == [(10 * i + 4.5, 0.5) for i in range(100)]


def test_bars_are_as_long_as_their_values():
    svg = bar_chart("t", {"cat": 0.5, NASTY: 1.0, "none at all": -1.0, "x" * 40: 0.123})
    bars = [float(e.get("width")) for e in ElementTree.fromstring(svg).iter("rect") if e.get("class") == "bar"]
    assert bars == [150.0, 300.0, 0.0, 36.9]
    shown = [text.text for text in texts(svg)]
    assert shown[1:] == ["cat", "0.500", NASTY, "1.000", "none at all", "none", "x" * 23 + "…", "0.123"]


def test_boxes_lie_on_the_canvas_as_on_an_image():
    boxes = np.array([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.1, 0.2], [0.0, 1.0, math.nan, -1.0]])
    root = ElementTree.fromstring(box_canvas("t", boxes))
    found = [[float(e.get(k)) for k in ("x", "y", "width", "height")] for e in root.iter("rect")]
    assert found == [[0, 0, 400, 300], [0, 0, 400, 300], [80, 120, 40, 60], [0, 450, 0, 0]]
    root = ElementTree.fromstring(box_canvas("t", boxes, centres=True))
    assert [(e.get("cx"), e.get("cy")) for e in root.iter("circle")] == [
        ("200.0", "150.0"), ("100.0", "150.0"), ("0.0", "300.0")
    ]  # fmt: skip


def test_a_file_has_its_style_and_is_well_formed():
    root = ElementTree.fromstring(as_file(line_chart(NASTY, {NASTY: [(0, 1.0), (1, 2.0)]})))
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and ".title" in root[0].text
    assert root.get("aria-label") == NASTY
