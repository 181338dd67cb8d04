"""Drawing: where pixels change, which colours, and the layout of the strip."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sparse_rcnn.detections import Detections
from sparse_rcnn.drawing import PANEL_SIDE, _font, _label_place, colour_of, text_colour_on

NAMES = ("fish", "crab")


def _detections(boxes, size, **fields) -> Detections:
    count = len(boxes)
    scores = np.linspace(0.9, 0.5, count) if count else []
    return Detections(boxes, scores, [i % 2 for i in range(count)], NAMES, size, **fields)


def test_outline_lies_on_the_box():
    picture = np.asarray(_detections([[40, 100, 140, 180]], (240, 320)).draw(np.zeros((240, 320, 3), np.uint8)))
    colour = colour_of(0)
    assert tuple(picture[150, 40]) == tuple(picture[150, 139]) == tuple(picture[179, 90]) == colour
    assert not picture[150, 39].any() and not picture[150, 140].any() and not picture[180, 90].any()
    assert not picture[120:170, 50:130].any()  # nothing within
    assert tuple(picture[98, 42]) == colour  # the label over the box


def test_the_given_image_is_left_alone():
    pixels = np.zeros((50, 80, 3), np.uint8)
    picture = Image.fromarray(pixels)
    drawn = _detections([[5, 5, 60, 40]], (50, 80)).draw(picture)
    assert np.asarray(drawn).any() and not np.asarray(picture).any() and not pixels.any()


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (40, 40), (300, 200)])
def test_any_size_and_any_box(size):
    height, width = size
    boxes = [[0, 0, width, height], [width - 0.5, height - 0.5, width, height], [-50, -50, 1e9, 1e9], [0, 0, 0.2, 0.2]]
    drawn = _detections(boxes, size).draw(np.full((height, width, 3), 99, np.uint8))
    assert drawn.size == (width, height)
    assert (np.asarray(drawn) != 99).any()


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected 20x30 .*, got 30x20"):
        _detections([], (20, 30)).draw(np.zeros((30, 20, 3), np.uint8))


def test_nothing_to_draw_on():
    with pytest.raises(ValueError, match="image: expected the image to draw on"):
        _detections([], (20, 30)).draw()


def test_the_image_of_the_source_is_drawn_on(tmp_path, write_image):
    path = write_image(tmp_path / "a.png", 20, 30)
    drawn = _detections([], (20, 30), source=str(path)).draw()
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(Image.open(path)))


def test_labels_stay_inside_and_apart():
    font, taken = _font(14), []
    for box in [(0, 0, 50, 50), (0, 0, 50, 50), (280, 2, 299, 90), (150, 180, 170, 199)]:
        place = _label_place("starfish 0.91", font, box, (300, 200), taken)
        assert place[0] >= 0 and place[1] >= 0 and place[2] < 300 and place[3] < 200
        for other in taken:
            assert place[0] > other[2] or other[0] > place[2] or place[1] > other[3] or other[1] > place[3]
        taken.append(place)
    assert _label_place("starfish 0.91", font, (0, 0, 9, 9), (20, 20), []) is None


def test_colours_are_stable_distinct_and_readable():
    colours = [colour_of(i) for i in range(80)]
    assert len(set(colours)) == 80
    assert colour_of(5) == colour_of(5)
    assert text_colour_on((255, 255, 0)) == (0, 0, 0)
    assert text_colour_on((0, 0, 160)) == (255, 255, 255)


def _with_stages() -> Detections:
    last = np.array([[10, 10, 30, 30], [100, 40, 180, 90], [0, 0, 8, 8]], np.float32)
    return Detections(
        **{"boxes": last[[1, 0, 1]], "scores": [0.9, 0.7, 0.6], "labels": [0, 1, 1], "class_names": NAMES},
        **{"image_size": (120, 240), "proposal_index": [1, 0, 1], "proposal_boxes": last + 5},
        **{"stage_boxes": np.stack([last + 2, last]), "stage_scores": np.full((2, 3), 0.5)},
    )


def test_strip_has_a_panel_for_the_proposals_and_each_stage():
    strip = np.asarray(_with_stages().draw_stages(np.zeros((120, 240, 3), np.uint8)))
    assert strip.shape[1] == 3 * (PANEL_SIDE + 8) + 8  # 240 px are shown at twice their size
    panels = [strip[-8 - 240 : -8, 8 + i * (PANEL_SIDE + 8) :][:, :PANEL_SIDE] for i in range(3)]
    for panel, shift in zip(panels, (5, 2, 0), strict=True):
        # Left edges of proposals 1 and 0, best first, in the colours of their ranks.
        assert tuple(panel[2 * (70 + shift), 2 * (100 + shift)]) == colour_of(0)
        assert tuple(panel[2 * (25 + shift), 2 * (10 + shift)]) == colour_of(1)
        assert not panel[:16, :16].any() or shift == 5  # proposal 2 became no detection
    assert (strip[0] == 255).all()


def test_strip_without_detections_and_without_stages():
    found = _with_stages()
    strip = found.filter(score_threshold=0.95).draw_stages(np.zeros((120, 240, 3), np.uint8))
    assert not np.asarray(strip)[-8 - 240 : -8, 8 : 8 + PANEL_SIDE].any()
    with pytest.raises(ValueError, match="return_stages=True"):
        _detections([], (20, 30)).draw_stages(np.zeros((20, 30, 3), np.uint8))
