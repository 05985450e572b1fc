"""Drawn boxes: where their pixels are, contrast by the formula of WCAG, labels in tight frames."""

import numpy as np
import pytest
from PIL import ImageColor

from mvit_jax.analysis import box_drawing
from mvit_jax.analysis.box_drawing import draw_boxes

GREY = np.full((240, 320, 3), 128, np.uint8)
LONG = "take (an object) from (a person), whoever that is, and give it to another person"


def luminance(colour):
    shares = [c / 255 for c in colour]
    linear = [s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", box_drawing.COLOURS)
def test_text_is_readable_on_every_colour(colour):
    background = ImageColor.getrgb(colour)
    light, dark = sorted((luminance(background), luminance(box_drawing.text_colour(background))))[
        ::-1
    ]
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def fills(frame, track):
    """Returns the pixels of a track's colour."""
    return (frame == box_drawing.colour_of(track)).all(-1)


def test_lines_run_along_the_edges_of_a_box_and_nothing_else_changes():
    boxes = np.array([(0.25, 0.25, 0.75, 0.5)])
    drawn = draw_boxes(GREY, boxes, [[]], [2])
    assert (GREY == 128).all() and drawn.shape == GREY.shape
    rows, columns = np.nonzero(fills(drawn, 2))
    assert (rows.min(), rows.max()) == (60, 119) and (columns.min(), columns.max()) == (80, 239)
    assert fills(drawn, 2)[60:120, 80].all() and fills(drawn, 2)[119, 80:240].all()
    inside, outside = drawn[63:117, 83:237], drawn.copy()
    outside[59:121, 79:241] = 128
    assert (inside == 128).all() and (outside == 128).all()
    # Boxes at and beyond the border, and without area.
    odd = np.array([(0, 0, 1, 1), (-0.2, 0.5, 1.2, 0.5), (0.5, 0.5, 0.5, 0.5)], float)
    assert draw_boxes(GREY, odd, [[("a", 0.5)]] * 3, [0, 1, 2]).shape == GREY.shape


@pytest.mark.parametrize("shape", [(240, 320), (1080, 1920), (64, 48)])
def test_labels_are_whole_and_inside_the_frame(shape):
    frame = np.full((*shape, 3), 128, np.uint8)
    for corner in [(0.0, 0.0), (0.8, 0.8), (0.9, 0.0), (0.0, 0.85)]:
        box = np.array([(*corner, corner[0] + 0.1, corner[1] + 0.1)])
        drawn = draw_boxes(frame, box, [[("stand", 0.8), (LONG, 0.4)]], [0])
        # The block of two lines: its height is that of a box in the middle of a large frame.
        height = 2 * round(1.2 * max(11, round(min(shape) / 42)))
        full = fills(drawn, 0).any(1).sum()
        assert full >= min(height, shape[0])


def test_labels_of_neighbours_do_not_cover_each_other():
    boxes = np.array([(0.4, 0.4, 0.45, 0.7), (0.42, 0.4, 0.47, 0.7), (0.44, 0.4, 0.49, 0.7)])
    labels = [[("walk", 0.9), ("talk to (e.g., self, a person, a group)", 0.6)]] * 3
    together = draw_boxes(GREY, boxes, labels, [0, 1, 3], caption="0:04")
    for i, track in enumerate((0, 1, 3)):
        bare = [fills(draw_boxes(GREY, boxes[i : i + 1], [x], [track]), track).sum()
                for x in ([], labels[i])]  # fmt: skip
        block = bare[1] - bare[0]
        assert fills(together, track).sum() > 0.98 * block


def test_scripts_that_matplotlibs_font_lacks_and_line_breaks():
    drawn = draw_boxes(GREY, np.array([(0.2, 0.2, 0.4, 0.6)]), [[("走\n路", 0.5)]], [0])
    assert fills(drawn, 0).any()
