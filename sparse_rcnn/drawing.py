"""Drawn detections: boxes with labels, and the strip that shows how the stages refine the proposals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from sparse_rcnn.detections import Detections

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2, all four inside

PANEL_SIDE = 480  # longer side of one panel of the stage strip, in pixels
_GAP = 8
_COLOURS: tuple[Colour, ...] = (
    *((230, 25, 75), (20, 140, 255), (255, 150, 20), (50, 180, 75), (150, 70, 225), (0, 205, 205)),
    *((240, 50, 200), (185, 220, 30), (155, 95, 40), (255, 225, 50), (0, 120, 110), (250, 160, 170)),
)
_SHADES = (0.0, 0.35, -0.35, 0.6, -0.55, 0.18, -0.18)  # towards white, or towards black


def colour_of(index: int) -> Colour:
    """The fixed colour of class (or proposal) ``index``: one of twelve that are far apart, then shades of them."""
    colour, shade = _COLOURS[index % len(_COLOURS)], _SHADES[index // len(_COLOURS) % len(_SHADES)]
    target = 255 if shade > 0 else 0
    return tuple(round(value + (target - value) * abs(shade)) for value in colour)


def text_colour_on(background: Colour) -> Colour:
    """Black or white, whichever has the higher contrast (WCAG 2 relative luminance)."""
    linear = [v / 3294.6 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def draw_detections(image: Any, detections: Detections) -> Image.Image:
    """A copy of the image with every detection drawn, better ones over worse ones.

    Args:
        image: PIL image, uint8 [H, W, 3] RGB array or path, of the size that the detections are for.

    Raises:
        ValueError: the image has another size than ``detections.image_size``.
    """
    canvas = _canvas(image, detections.image_size)
    order = np.argsort(-detections.scores, kind="stable")
    _draw_boxes(
        canvas,
        detections.boxes[order],
        [colour_of(int(label)) for label in detections.labels[order]],
        [f"{detections.names[i]} {detections.scores[i]:.2f}" for i in order],
    )
    return canvas


def draw_stages(image: Any, detections: Detections) -> Image.Image:
    """The panels of :func:`stage_panels` side by side, each under its caption."""
    return _strip(stage_panels(image, detections))


def stage_panels(image: Any, detections: Detections) -> list[tuple[str, Image.Image]]:
    """A captioned panel of the learned proposals, then one of the boxes after each stage.

    Only proposals that ended as one of ``detections`` are shown (so filtering those filters the panels), each in one
    colour through all panels. Stages carry the proposal's best score, the last one the class name too.

    Raises:
        ValueError: the detections were made without their stages, or the image has another size.
    """
    if detections.stage_boxes is None:
        raise ValueError("detections: expected some with stages, predict with return_stages=True")
    picture, scale = _panel(_canvas(image, detections.image_size))
    chosen = _best_of_each_proposal(detections)  # positions in detections
    proposals = detections.proposal_index[chosen]
    colours = [colour_of(rank) for rank in range(len(chosen))]
    last = len(detections.stage_boxes) - 1
    panels = [("proposals", detections.proposal_boxes[proposals], [""] * len(chosen))]
    for stage, (boxes, scores) in enumerate(zip(detections.stage_boxes, detections.stage_scores, strict=True)):
        labels = [f"{score:.2f}" for score in scores[proposals]]
        if stage == last:
            labels = [f"{detections.names[i]} {detections.scores[i]:.2f}" for i in chosen]
        panels.append((f"stage {stage + 1}", boxes[proposals], labels))
    drawn = []
    for caption, boxes, labels in panels:
        panel = picture.copy()
        _draw_boxes(panel, boxes * scale, colours, labels)
        drawn.append((caption, panel))
    return drawn


def annotation_panel(image: Any, boxes: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """What an image was annotated with, at the size of :func:`stage_panels` and in the colours of the classes.

    Args:
        image: PIL image, uint8 [H, W, 3] RGB array or path.
        boxes, labels: [M, 4] xyxy in pixels, [M].
    """
    panel, scale = _panel(_canvas(image))
    _draw_boxes(panel, boxes * scale, [colour_of(int(k)) for k in labels], [class_names[int(k)] for k in labels])
    return panel


def _panel(picture: Image.Image) -> tuple[Image.Image, float]:
    """The picture at the size of a panel, and by what it was scaled."""
    scale = min(PANEL_SIDE / max(picture.size), 2.0)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS), scale


def _canvas(image: Any, size: tuple[int, int] | None = None) -> Image.Image:
    from sparse_rcnn.data.decode import decode_image

    if isinstance(image, np.ndarray):
        canvas = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    elif isinstance(image, Image.Image) and image.mode == "RGB":
        canvas = image.copy()
    else:
        canvas = Image.fromarray(decode_image(image))
    if size is not None and (canvas.height, canvas.width) != size:
        raise ValueError(f"image: expected {size[0]}x{size[1]} (height x width), got {canvas.height}x{canvas.width}")
    return canvas


def _best_of_each_proposal(detections: Detections) -> np.ndarray:
    """Positions of the detections to show, best first: one proposal may have been detected as several classes."""
    order = np.argsort(-detections.scores, kind="stable")
    _, first = np.unique(detections.proposal_index[order], return_index=True)
    return order[np.sort(first)]


def _draw_boxes(canvas: Image.Image, boxes: np.ndarray, colours: list[Colour], labels: list[str]) -> None:
    """Draw boxes [n, 4], the first one topmost; an empty label draws none."""
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 400))
    rectangles = [_inside(box, canvas.size) for box in boxes]
    for rectangle, colour in reversed(list(zip(rectangles, colours, strict=True))):
        side = min(rectangle[2] - rectangle[0], rectangle[3] - rectangle[1])
        draw.rectangle(rectangle, outline=colour, width=max(1, min(line, side // 4)))
    font = _font(min(48, max(11, round(max(canvas.size) / 55))))
    taken: list[Rectangle] = []
    for rectangle, colour, label in zip(rectangles, colours, labels, strict=True):
        place = _label_place(label, font, rectangle, canvas.size, taken) if label else None
        if place is not None:
            taken.append(place)
            draw.rectangle(place, fill=colour)
            draw.text((place[0] + 3, place[1] + 1), label, font=font, fill=text_colour_on(colour), anchor="la")


def _inside(box: np.ndarray, size: tuple[int, int]) -> Rectangle:
    """The pixels that a box covers, kept within an image of ``size`` (width, height)."""
    width, height = size
    x1, y1, x2, y2 = np.nan_to_num(box, posinf=1e6, neginf=-1e6).clip(-1e6, 1e6).round().astype(int).tolist()
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, min(max(x2 - 1, x1), width - 1), min(max(y2 - 1, y1), height - 1)


def _label_place(
    label: str, font: Any, box: Rectangle, size: tuple[int, int], taken: list[Rectangle]
) -> Rectangle | None:
    """Where a label goes: over, in or under the box, where it hides least of the other labels; within the image."""
    ascent, descent = font.getmetrics()
    width, height = int(font.getlength(label)) + 6, ascent + descent + 2
    if width > size[0] or height > size[1]:
        return None  # no room in so small an image
    x1, y1, x2, y2 = box
    places = []
    right, bottom = x2 - width + 1, y2 - height + 1
    corners = ((x1, y1 - height), (x1, y1), (x1, y2 + 1), (right, y1), (x1, bottom), (right, bottom), (right, y2 + 1))
    for x, y in corners:
        x = min(max(x, 0), size[0] - width)
        y = min(max(y, 0), size[1] - height)
        places.append((x, y, x + width - 1, y + height - 1))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))  # the first of equals


def _overlap(a: Rectangle, b: Rectangle) -> int:
    """Pixels that both rectangles cover."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    return max(width, 0) * max(height, 0)


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _strip(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Captioned panels of one size in a row, on white."""
    width, height = panels[0][1].size
    font = _font(min(20, max(11, round(width / 22))))
    caption_height = sum(font.getmetrics()) + 6
    strip = Image.new("RGB", (len(panels) * (width + _GAP) + _GAP, caption_height + height + _GAP), "white")
    draw = ImageDraw.Draw(strip)
    for index, (caption, panel) in enumerate(panels):
        x = _GAP + index * (width + _GAP)
        draw.text((x, 3), caption, font=font, fill=(30, 30, 30), anchor="la")
        strip.paste(panel, (x, caption_height))
    return strip
