"""The ten objects of the synthetic scenes, as coloured polygons plus a shading rule.

A shape lives in its own coordinates: x to the right, y down, roughly inside the unit circle. Colours are RGB, 0..255.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Points = np.ndarray  # [n, 2] float64, (x, y)
Colour = np.ndarray  # [3] float64, 0..255
# (u, v, light) -> (gain, gloss): u, v [h, w] shape coordinates, light (x, y) unit vector towards the lamp in the same
# coordinates; the colour becomes colour * gain + 255 * gloss.
Shading = Callable[[np.ndarray, np.ndarray, np.ndarray], "tuple[np.ndarray, np.ndarray | float]"]


@dataclass(frozen=True)
class Shape:
    """Polygons painted in order, how light falls on them, and how far the shape may be turned (radians each way)."""

    parts: list[tuple[Points, Colour]]
    shading: Shading
    max_turn: float


def random_colour(rng: np.random.Generator, saturation=(0.55, 1.0), value=(0.6, 1.0)) -> Colour:
    """A random hue [3], 0..255, with saturation and value drawn from the given ranges (0..1)."""
    return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def _two_colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """A main colour and an accent that stands out from it: near white, or dark, or another hue."""
    main = random_colour(rng)
    pale, dark = random_colour(rng, (0.0, 0.15), (0.9, 1.0)), random_colour(rng, (0.3, 0.8), (0.15, 0.3))
    return main, (pale, dark, main[[1, 2, 0]])[rng.integers(3)]


def _arc(cx, cy, rx, ry, start=0.0, stop=2 * math.pi, n=40) -> Points:
    angle = np.linspace(start, stop, n)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


# ----------------------------------------------------------------------------------------------------------- shading


def _soft(u, v, light):
    """A gently domed surface: brighter towards the lamp, darker at the far rim."""
    return 1.0 + 0.28 * (u * light[0] + v * light[1]) - 0.12 * (u * u + v * v), 0.0


def _lambert(nx, ny, light, gloss):
    """Shade a surface of unit normals (nx, ny, sqrt(1 - nx^2 - ny^2)) lit from 45 degrees above the image plane."""
    nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.0))
    facing = np.maximum(0.7 * (nx * light[0] + ny * light[1]) + 0.7 * nz, 0.0)
    return 0.35 + 0.75 * facing, gloss * facing**24


def _sphere(u, v, light):
    return _lambert(u, v, light, 0.7)


def _across(half_width: Callable[[np.ndarray], np.ndarray]) -> Shading:
    """A surface of revolution about the y axis whose half width at height v is half_width(v)."""

    def shade(u, v, light):
        return _lambert(np.clip(u / half_width(v), -1, 1) * 0.95, 0.0 * v, light, 0.25)

    return shade


def _torus(inner: float) -> Shading:
    middle, thickness = (1 + inner) / 2, (1 - inner) / 2

    def shade(u, v, light):
        radius = np.hypot(u, v) + 1e-6
        tilt = np.clip((radius - middle) / thickness, -1, 1)
        return _lambert(u / radius * tilt, v / radius * tilt, light, 0.5)

    return shade


# ------------------------------------------------------------------------------------------------------------ shapes


def _ball(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    parts = [(_arc(0, 0, 1, 1, n=64), main)]
    if rng.random() < 0.6:  # the strip between two meridians, as on a beach ball
        left = rng.uniform(-0.7, 0.1)
        right = left + rng.uniform(0.4, 0.6)
        y = np.linspace(-1, 1, 24)
        half = np.sqrt(1 - y * y)
        strip = np.concatenate([np.stack([left * half, y], 1), np.stack([right * half, y], 1)[::-1]])
        parts.append((strip, accent))
    return Shape(parts, _sphere, math.pi)


def _cube(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    yaw, pitch, tall = rng.uniform(0.35, 1.2), rng.uniform(0.4, 0.75), rng.uniform(0.85, 1.15)

    def project(corners):  # rows of (right, up, towards the viewer), turned by yaw and tipped by pitch
        x, up, z = np.asarray(corners, dtype=float).T
        x, z = x * math.cos(yaw) + z * math.sin(yaw), z * math.cos(yaw) - x * math.sin(yaw)
        return np.stack([x, -(tall * up * math.cos(pitch) - z * math.sin(pitch))], 1) / 1.6

    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    one = np.ones(4)
    inset, parts = (rng.uniform(0.55, 0.75) if rng.random() < 0.6 else 0.0), []
    sides = rng.permutation([0.55, 0.85])
    for gain, face in (
        (1.1, lambda s: np.stack([s[:, 0], one, s[:, 1]], 1)),
        (sides[0], lambda s: np.stack([s[:, 0], s[:, 1], one], 1)),
        (sides[1], lambda s: np.stack([-one, s[:, 1], s[:, 0]], 1)),
    ):
        parts.append((project(face(square)), main * gain))
        if inset:
            parts.append((project(face(square * inset)), accent * gain))
    return Shape(parts, _soft, 0.3)


def _star(rng: np.random.Generator) -> Shape:
    main, _ = _two_colours(rng)
    inner = rng.uniform(0.4, 0.5)
    angle = np.arange(10) * math.pi / 5 - math.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    tips = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    parts = [(tips, main)]  # under the facets, so that no seam shows between them
    for i in range(10):
        parts.append((np.array([(0, 0), tips[i], tips[(i + 1) % 10]]), main * (1.0 if i % 2 else 0.68)))
    return Shape(parts, _soft, math.pi)


def _ring(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    inner, sectors = rng.uniform(0.5, 0.65), int(rng.integers(3, 6))

    def band(start, stop, n):
        return np.concatenate([_arc(0, 0, 1, 1, start, stop, n), _arc(0, 0, inner, inner, stop, start, n)])

    parts = [(band(0, 2 * math.pi, 64), main)]
    if rng.random() < 0.6:
        step = 2 * math.pi / sectors
        parts += [(band(i * step, (i + 0.5) * step, 12), accent) for i in range(sectors)]
    return Shape(parts, _torus(inner), math.pi)


def _cone(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    base, bulge = rng.uniform(0.55, 0.75), rng.uniform(0.12, 0.2)

    def half_width(y):
        return base * (np.asarray(y, dtype=float) + 1.0) / 1.8 + 0.03

    def slice_between(top, bottom):  # the part of the cone between two heights, with round lower edges
        lower = _arc(0, bottom, half_width(bottom), bulge * half_width(bottom) / base, 0, math.pi)
        upper = _arc(0, top, half_width(top), bulge * half_width(top) / base, math.pi, 0)
        return np.concatenate([lower, upper])

    parts = [(slice_between(-1.0, 0.8), main)]
    stripes = int(rng.integers(0, 3))
    parts += [(slice_between(y, y + 0.28), accent) for y in (-0.3, 0.25)[:stripes]]
    return Shape(parts, _across(half_width), 0.35)


def _cylinder(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    half, bulge = rng.uniform(0.42, 0.62), rng.uniform(0.12, 0.2)

    def slice_between(top, bottom):
        return np.concatenate([_arc(0, bottom, half, bulge, 0, math.pi), _arc(0, top, half, bulge, math.pi, 0)])

    parts = [(slice_between(-0.8, 0.8), main)]
    if rng.random() < 0.75:
        edges = np.linspace(-0.8, 0.8, 2 * int(rng.integers(1, 4)) + 2)
        parts += [(slice_between(edges[i], edges[i + 1]), accent) for i in range(1, len(edges) - 1, 2)]
    lid = 0.5 * main + 0.5 * 255
    parts += [(_arc(0, -0.8, half, bulge), lid), (_arc(0, -0.8, half * 0.75, bulge * 0.75), lid * 0.75)]
    return Shape(parts, _across(lambda v: half), 0.6)


def _heart(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    t = np.linspace(0, 2 * math.pi, 64)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    outline = np.stack([16 * np.sin(t) ** 3, y], 1) / 17
    parts = [(outline, main)]
    if rng.random() < 0.4:
        parts += [(outline * 0.72, accent), (outline * 0.5, main)]

    def shade(u, v, light):
        gain, _ = _soft(u, v, light)
        return gain, 0.55 * np.exp(-((u + 0.45) ** 2 + (v + 0.4) ** 2) * 18)

    return Shape(parts, shade, 0.6)


def _flower(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    petals = int(rng.integers(5, 9))
    long, wide = 0.38, 0.9 * math.sin(math.pi / petals)
    parts = []
    for i in range(petals):
        angle = 2 * math.pi * i / petals
        turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
        for scale, gain in ((1.0, 0.72), (0.82, 1.0)):  # a darker rim tells the petals apart
            parts.append((_arc(0.6, 0, long * scale, min(wide, 0.36) * scale, n=24) @ turn, main * gain))
    heart = rng.uniform(0.24, 0.34)
    parts += [(_arc(0, 0, heart, heart), accent * 0.75), (_arc(0, 0, heart * 0.75, heart * 0.75), accent)]
    return Shape(parts, _soft, math.pi)


def _mushroom(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    cream = random_colour(rng, (0.05, 0.25), (0.8, 0.95))
    top, bottom = rng.uniform(0.2, 0.28), rng.uniform(0.28, 0.38)
    stem = np.concatenate([_arc(0, 0.8, bottom, 0.12, 0, math.pi, 16), [(-top, -0.1), (top, -0.1)]])
    cap = np.concatenate([_arc(0, 0, 0.95, 0.9, math.pi, 2 * math.pi), _arc(0, 0, 0.95, 0.18, 0, math.pi)])
    parts = [(stem, cream), (cap, main), (_arc(0, 0.02, 0.8, 0.13), cream * 0.7)]
    if rng.random() < 0.8:
        spots = ((-0.5, -0.3, 0.14), (0.0, -0.55, 0.17), (0.5, -0.28, 0.13), (-0.12, -0.2, 0.1))
        parts += [(_arc(x, y, r, 0.8 * r, n=20), accent) for x, y, r in spots]
    return Shape(parts, _soft, 0.45)


def _fish(rng: np.random.Generator) -> Shape:
    main, accent = _two_colours(rng)
    side = rng.choice([-1.0, 1.0])  # which way it swims
    tall = rng.uniform(0.36, 0.5)
    t = np.linspace(0, math.pi, 32)
    back = np.stack([0.25 - 0.75 * np.cos(t), -tall * np.sin(t) ** 0.9], 1)
    body = np.concatenate([back, (back * (1, -1))[::-1]]) - (0.1, 0)
    tail = np.array([(-0.45, 0), (-1, -0.42), (-0.85, 0), (-1, 0.42)])
    fin = np.array([(-0.1, -0.8 * tall), (0.1, -1.55 * tall), (0.4, -0.8 * tall)])
    parts = [(tail, accent), (fin, accent), (body, main)]
    if rng.random() < 0.7:
        for x in (-0.2, 0.1):
            reach = 0.82 * tall
            parts.append((np.array([(x, -reach), (x + 0.14, -reach), (x + 0.14, reach), (x, reach)]), accent))
    parts += [(_arc(0.58, -0.12, 0.1, 0.1, n=20), np.full(3, 245.0)), (_arc(0.6, -0.12, 0.05, 0.05, n=12), np.zeros(3))]
    return Shape([(points * (side, 1), colour) for points, colour in parts], _soft, 0.55)


SHAPES: dict[str, Callable[[np.random.Generator], Shape]] = {
    "ball": _ball,
    "cube": _cube,
    "star": _star,
    "ring": _ring,
    "cone": _cone,
    "cylinder": _cylinder,
    "heart": _heart,
    "flower": _flower,
    "mushroom": _mushroom,
    "fish": _fish,
}


def render(name: str, size: float, light: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one object, randomly coloured, turned and stretched.

    Args:
        name: a key of ``SHAPES``.
        size: longer side of the object in pixels.
        light: [2] unit vector in the image plane, towards the lamp.
        rng: source of everything random.

    Returns:
        colour [h, w, 3] float32 0..255 and alpha [h, w] float32 0..1 of a tile that just holds the object.
    """
    shape = SHAPES[name](rng)
    angle = rng.uniform(-shape.max_turn, shape.max_turn)
    turn = np.array([(math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))])
    matrix = turn * rng.uniform(0.87, 1.0, size=2)  # stretched along its own axes, then turned
    outline = np.concatenate([points for points, _ in shape.parts]) @ matrix.T
    low, high = outline.min(0), outline.max(0)
    scale = size / (high - low).max()
    width, height = (int(n) for n in np.ceil((high - low) * scale))
    over = 4 if size < 64 else 2  # supersampling gives the smooth edges
    tile = Image.new("RGBA", (width * over, height * over))
    draw = ImageDraw.Draw(tile)
    for points, colour in shape.parts:
        pixels = (points @ matrix.T - low) * (scale * over)
        draw.polygon(pixels.ravel().tolist(), fill=(*np.clip(colour, 0, 255).astype(int).tolist(), 255))
    pixels = np.asarray(tile.reduce(over), dtype=np.float32)

    inverse = np.linalg.inv(matrix).astype(np.float32)
    x = ((np.arange(width) + 0.5) / scale + low[0]).astype(np.float32)
    y = ((np.arange(height) + 0.5) / scale + low[1]).astype(np.float32)[:, None]
    u, v = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
    gain, gloss = shape.shading(u, v, inverse @ (light / np.linalg.norm(inverse @ light)))
    shaded = pixels[..., :3] * np.broadcast_to(gain, u.shape)[..., None]
    shaded += 255 * np.broadcast_to(gloss, u.shape)[..., None]
    return np.clip(shaded, 0, 255), pixels[..., 3] / 255
