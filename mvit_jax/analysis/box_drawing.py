"""Boxes with class names and scores, drawn on frames."""

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont

from mvit_jax.analysis import fonts
from mvit_jax.common.text import printable

Label = tuple[str, float]  # name and score
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels

# The colour-blind safe palette of Okabe and Ito (2008) without black, and violet.
COLOURS = (
    "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#d55e00", "#0072b2", "#8a6fc0",
)  # fmt: skip
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_SMALLEST = 11  # height of the font in pixels: smaller letters are not readable
_SHARE = 42  # the font is this part of a frame's short side


def draw_boxes(
    frame: UInt8[np.ndarray, "height width 3"],
    boxes: Float[np.ndarray, "boxes 4"],
    labels: Sequence[Sequence[Label]],
    colours: Sequence[int],
    caption: str = "",
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the frame with boxes, and a line per label beside each box.

    Labels stay inside the frame and avoid each other and the boxes. A name that is wider than the
    frame is cut off.

    Args:
      frame: RGB.
      boxes: x1, y1, x2, y2, as fractions of the frame.
      labels: names and scores of each box.
      colours: index of each box's colour in `COLOURS`.
      caption: text in the lower left corner.
    """
    image = Image.fromarray(frame)
    width, height = image.size
    draw = ImageDraw.Draw(image)
    size = max(_SMALLEST, round(min(width, height) / _SHARE))
    line = max(2, round(min(width, height) / 300))
    corners = [_in_frame(box, (width, height)) for box in boxes]
    fills = [colour_of(index) for index in colours]
    for corner, colour in zip(corners, fills, strict=True):
        # The dark edges set the line off from a background of its colour.
        _outline(draw, corner, line + 2, 1, _BLACK)
        _outline(draw, corner, line, 0, colour)
    blocks: list[Rectangle] = []
    if caption:
        blocks.append(_write(draw, (0, height), [caption], size, _BLACK, (width, height)))
    for corner, colour, lines in zip(corners, fills, labels, strict=True):
        if lines:
            texts = _fitted(lines, size, width)
            block = _extent(texts, size)
            where = _place(corner, block, (width, height), blocks, corners)
            blocks.append(_write(draw, where, texts, size, colour, (width, height)))
    return np.asarray(image)


def colour_of(index: int) -> tuple[int, int, int]:
    """Returns a colour of `COLOURS` as RGB."""
    red, green, blue = ImageColor.getrgb(COLOURS[index])[:3]
    return red, green, blue


def text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns black or white, whichever has the higher contrast with the background."""
    linear = [
        (c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return _BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _WHITE


def _in_frame(box: Float[np.ndarray, " 4"], frame: tuple[int, int]) -> Rectangle:
    """Returns the first and the last column and row of a box, at least one pixel."""
    x1, y1, x2, y2 = np.rint(box * [*frame, *frame]).astype(int).tolist()
    x1, y1 = (min(max(x, 0), n - 1) for x, n in zip((x1, y1), frame, strict=True))
    return x1, y1, min(max(x2 - 1, x1), frame[0] - 1), min(max(y2 - 1, y1), frame[1] - 1)


def _outline(
    draw: ImageDraw.ImageDraw, corner: Rectangle, width: int, out: int, colour: tuple[int, int, int]
) -> None:
    x1, y1, x2, y2 = corner
    draw.rectangle((x1 - out, y1 - out, x2 + out, y2 + out), outline=colour, width=width)


def _fitted(labels: Sequence[Label], size: int, width: int) -> list[str]:
    """Returns a line of text per label, at most as wide as the frame."""
    lines = []
    for name, score in labels:
        name, end = printable(name), f" {score:.2f}"
        text = name + end
        while name and _extent([text], size)[0] > width:
            name = name[:-1]
            text = f"{name.rstrip()}…{end}"
        lines.append(text)
    return lines


def _extent(lines: Sequence[str], size: int) -> tuple[int, int]:
    """Returns width and height of a block of text with its margins."""
    width = max(_font(size, text).getlength(text) for text in lines)
    return int(width) + 1 + 2 * _margin(size), _line_height(size) * len(lines) + _margin(size)


def _place(
    corner: Rectangle,
    block: tuple[int, int],
    frame: tuple[int, int],
    blocks: Sequence[Rectangle],
    boxes: Sequence[Rectangle],
) -> tuple[int, int]:
    """Returns the upper left corner of a block that covers little of other blocks and boxes."""

    def cost(at: tuple[int, int]) -> int:
        x, y = at
        rectangle = (x, y, x + block[0], y + block[1])
        covered = 10 * sum(_shared(rectangle, other) for other in blocks)
        covered += 3 * sum(_shared(rectangle, box) for box in boxes)
        distance = max(corner[0] - rectangle[2], x - corner[2], 0)
        distance += max(corner[1] - rectangle[3], y - corner[3], 0)
        return covered + distance * block[1]

    best, smallest = (0, 0), sys.maxsize
    for at in _candidates(corner, block, frame):
        if (current := cost(at)) < smallest:
            best, smallest = at, current
        if smallest == 0:
            break
    return best


def _candidates(
    corner: Rectangle, block: tuple[int, int], frame: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Yields upper left corners within the frame: above, below, beside and in the box, others."""
    x1, y1, x2, y2 = corner
    w, h = block
    beside = [(x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x2, y1), (x1 - w, y1),
              (x2, y2 - h), (x1 - w, y2 - h), (x1, y1), (x1, y2 - h)]  # fmt: skip
    rest = itertools.product((x1, x2 - w, 0, frame[0]), range(0, frame[1], max(h // 2, 1)))
    for x, y in itertools.chain(beside, rest):
        yield min(max(x, 0), max(frame[0] - w, 0)), min(max(y, 0), max(frame[1] - h, 0))


def _shared(a: Rectangle, b: Rectangle) -> int:
    """Returns the area of the intersection."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    lines: Sequence[str],
    size: int,
    colour: tuple[int, int, int],
    frame: tuple[int, int],
) -> Rectangle:
    """Writes lines on a block of a colour, moved into the frame; returns the block."""
    w, h = _extent(lines, size)
    x, y = (max(min(at[i], frame[i] - (w, h)[i]), 0) for i in range(2))
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
    margin, ink = _margin(size), text_colour(colour)
    for i, text in enumerate(lines):
        middle = y + margin / 2 + (i + 0.5) * _line_height(size)
        draw.text((x + margin, middle), text, ink, _font(size, text), anchor="lm")
    return x, y, x + w, y + h


def _margin(size: int) -> int:
    return max(size // 4, 2)


def _line_height(size: int) -> int:
    return round(1.2 * size)


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    return _load(fonts.path_for(text), size)


_load = functools.lru_cache(maxsize=16)(ImageFont.truetype)
