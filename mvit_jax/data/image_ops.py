"""The image operations of RandAugment, on all frames of a clip at once.

Each gives, byte for byte, what Pillow gives frame by frame; `benchmarks/augmentation.py` measures
how much sooner. A "window" is the part of the frames that is held: most operations need no more of
a frame than what becomes of it later. In the arguments `frame` is all of a frame, `held` where the
window `clip` is, `wanted` the part to give, and `fill` the colour that comes in from outside.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image

Clip = UInt8[np.ndarray, "time _ _ 3"]
Table = UInt8[np.ndarray, "256"] | UInt8[np.ndarray, "time 256 3"]
Colour = tuple[int, int, int]
Bounds = tuple[int | float, int | float]

# Values that are interpolated at a time: a clip of 16x256x340 takes 16.5 ms so, 20 with half or
# twice as many, and 60 when they outgrow the processor's cache.
_BLOCK = 1 << 17


class Box(NamedTuple):
    """A part of a frame, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, clip: np.ndarray, of: "Box") -> np.ndarray:
        """This part of frames of which `clip` holds the part `of`; shares memory with it."""
        top, left = self.top - of.top, self.left - of.left
        return clip[:, top : top + self.height, left : left + self.width]


# Tables: new values by old ones, one for all frames and colours.


def invert() -> UInt8[np.ndarray, "256"]:
    return np.arange(255, -1, -1, dtype=np.uint8)


def posterize(bits: int) -> UInt8[np.ndarray, "256"]:
    """Keeps the `bits` highest bits of each value, 0 to 8."""
    return np.arange(256, dtype=np.uint8) & np.uint8(256 - (1 << (8 - bits)))


def solarize(threshold: int) -> UInt8[np.ndarray, "256"]:
    """Inverts values from `threshold` on."""
    values = np.arange(256)
    return np.where(values < threshold, values, 255 - values).astype(np.uint8)


def solarize_add(add: int) -> UInt8[np.ndarray, "256"]:
    """Adds to values below 128."""
    values = np.arange(256)
    return np.where(values < 128, np.minimum(values + add, 255), values).astype(np.uint8)


def brightness(factor: float) -> UInt8[np.ndarray, "256"]:
    """Blends with black; 1 changes nothing."""
    return _blend(np.zeros((1, 256), np.uint8), np.arange(256, dtype=np.uint8)[None], factor)[0]


# Tables that depend on all of a frame: one for each frame and colour.


def autocontrast(clip: Clip) -> UInt8[np.ndarray, "time 256 3"]:
    """Stretches each colour of each frame to 0..255."""
    seen = _histograms(clip) > 0
    low, high = seen.argmax(-1), 255 - seen[..., ::-1].argmax(-1)
    scale = 255.0 / np.maximum(high - low, 1)
    offset = -low * scale
    # Truncated before it is clipped, as Pillow does.
    values = (np.arange(256) * scale[..., None] + offset[..., None]).astype(np.int64)
    table = np.where((high > low)[..., None], np.clip(values, 0, 255), np.arange(256))
    return _by_frame(table)


def equalize(clip: Clip) -> UInt8[np.ndarray, "time 256 3"]:
    """Spreads the values of each colour of each frame evenly."""
    counts = _histograms(clip)
    last = 255 - (counts > 0)[..., ::-1].argmax(-1)
    of_last = np.take_along_axis(counts, last[..., None], -1)
    step = (counts.sum(-1, keepdims=True) - of_last) // 255
    below = counts.cumsum(-1) - counts
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return _by_frame(np.where(step > 0, spread, np.arange(256)))


def contrast(clip: Clip, factor: float) -> UInt8[np.ndarray, "time 256 3"]:
    """Blends each frame with its mean grey; 1 changes nothing."""
    values = np.arange(256, dtype=np.uint8)[None]
    means = [int(cv2.mean(_grey(frame))[0] + 0.5) for frame in clip]
    tables = [_blend(np.full((1, 256), mean, np.uint8), values, factor) for mean in means]
    return np.stack(tables).repeat(3, 1).transpose(0, 2, 1).copy()


def look_up(clip: Clip, table: Table) -> Clip:
    """Replaces values by a table's."""
    out = np.empty(clip.shape, np.uint8)
    for i, frame in enumerate(clip):
        cv2.LUT(frame, table if table.ndim == 1 else table[i][None], dst=out[i])
    return out


def _histograms(clip: Clip) -> Int64[np.ndarray, "time 3 256"]:
    counts = np.empty((len(clip), 3, 256), np.int64)
    for frame, of_frame in zip(clip, counts, strict=True):
        for colour in range(3):
            of_frame[colour] = cv2.calcHist([frame], [colour], None, [256], [0, 256]).ravel()
    return counts


def _by_frame(table: Int64[np.ndarray, "time 3 256"]) -> UInt8[np.ndarray, "time 256 3"]:
    return np.ascontiguousarray(table.transpose(0, 2, 1).astype(np.uint8))


# Pixels and their neighbours.


def color(clip: Clip, factor: float) -> Clip:
    """Blends each pixel with its grey; 1 changes nothing."""
    out = np.empty(clip.shape, np.uint8)
    for frame, target in zip(clip, out, strict=True):
        target[:] = _blend(cv2.cvtColor(_grey(frame), cv2.COLOR_GRAY2RGB), frame, factor)
    return out


def sharpness(clip: Clip, factor: float, held: Box, wanted: Box) -> Clip:
    """Blends with the smoothed frame; 1 changes nothing, and so does any factor at the edges.

    Args:
      clip: has one pixel more on all sides than `wanted`, but for those where the frame ends.
      factor: 0 for smooth, 2 for sharper.
    """
    # Multiples of 1/13 are never halfway between two values, so all ways to round agree.
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    out = np.empty((len(clip), wanted.height, wanted.width, 3), np.uint8)
    for frame, target in zip(clip, out, strict=True):
        smooth = cv2.filter2D(frame, -1, kernel)
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            smooth[edge] = frame[edge]
        blended = _blend(smooth, frame, factor)
        target[:] = wanted.cut(blended[None], held)[0]
    return out


def _grey(frame: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
    # Pillow rounds the sum of multiples of 2^-16 half up, which has 24 bits at most: float32 holds
    # all of them exactly. OpenCV's own grey has other weights.
    weights = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536
    return cv2.transform(frame.astype(np.float32), weights).astype(np.uint8)


def _blend(
    first: UInt8[np.ndarray, "*shape"], second: UInt8[np.ndarray, "*shape"], share: float
) -> UInt8[np.ndarray, "*shape"]:
    """first + share * (second - first), in float32 and truncated, as Pillow does."""
    blended = cv2.subtract(second, first, dtype=cv2.CV_32F)
    blended *= np.float32(share)
    blended += first
    return np.clip(blended, 0, 255, out=blended).astype(np.uint8)


# Geometry: bicubic, and `fill` where there is nothing.


def rotate(clip: Clip, degrees: float, frame: Box, held: Box, wanted: Box, fill: Colour) -> Clip:
    """Turns counterclockwise about the frame's centre.

    `degrees` are between -90 and 90, both excluded. The window has what `rotate_source` says.
    """
    if degrees == 0:
        return wanted.cut(clip, held)
    if _pixel_in_the_centre(frame) and wanted != frame:
        return wanted.cut(rotate(clip, degrees, frame, held, frame, fill), frame)
    a, b, c, d, e, f = _rotation(degrees, frame)
    # The same map between the parts of the frames.
    c += a * wanted.left + b * wanted.top - held.left
    f += d * wanted.left + e * wanted.top - held.top
    out = np.empty((len(clip), wanted.height, wanted.width, 3), np.uint8)
    for source, target in zip(clip, out, strict=True):
        turned = Image.fromarray(source).transform(
            (wanted.width, wanted.height),
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
        target[:] = np.asarray(turned)
    return out


def rotate_source(degrees: float, frame: Box, wanted: Box) -> Box:
    """The part of the frames that `rotate` needs for `wanted`."""
    if _pixel_in_the_centre(frame):
        return frame
    a, b, c, d, e, f = _rotation(degrees, frame)
    corners = [
        (a * x + b * y + c, d * x + e * y + f)
        for x in (wanted.left, wanted.left + wanted.width)
        for y in (wanted.top, wanted.top + wanted.height)
    ]
    across, down = zip(*corners, strict=True)
    return _source(frame, (min(down), max(down)), (min(across), max(across)))


def _pixel_in_the_centre(frame: Box) -> bool:
    # Such a pixel stays where it is, but for rounding, which then decides on its value. So it has
    # to be Pillow's rounding: nothing is cut.
    return frame.height % 2 == 1 and frame.width % 2 == 1


def _rotation(degrees: float, frame: Box) -> tuple[float, ...]:
    """Where in a frame the pixels of the turned one are: x' = ax + by + c, y' = dx + ey + f."""
    # Pillow's own arithmetic, so that every bit is the same.
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = frame.width / 2, frame.height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def shift_rows(
    clip: Clip, shifts: Float[np.ndarray, " rows"], frame: Box, held: Box, wanted: Box, fill: Colour
) -> Clip:
    """Gives pixel x of row y what is at x + shifts[y], of the same row.

    This is shearing and translating, for which Pillow reads 16 pixels although 4 matter. `shifts`
    are of the rows of `wanted`, in pixels; the window has what `shift_source` says.
    """
    clip = clip[:, wanted.top - held.top :]
    out = np.empty((len(clip), wanted.height, wanted.width, 3), np.uint8)
    x = np.arange(wanted.left, wanted.left + wanted.width) + 0.5
    rows = max(1, _BLOCK // (3 * len(clip) * wanted.width))
    for start in range(0, wanted.height, rows):
        stop = min(start + rows, wanted.height)
        source = x + shifts[start:stop, None]
        outside = (source < 0) | (source >= frame.width)
        source -= 0.5
        first = np.floor(source[:, 0]).astype(int)
        fraction = source - (first[:, None] + np.arange(wanted.width))
        taps = np.empty((len(clip), stop - start, wanted.width + 3, 3), np.int16)
        for i, column in enumerate((first - 1 - held.left).tolist()):
            _copy_row(clip[:, start + i], column, taps[:, i])
        rows_out = out[:, start:stop]
        flat = (len(clip), stop - start, -1)
        _cubic(taps.reshape(flat), fraction.repeat(3, 1), rows_out.reshape(flat))
        if outside.any():
            rows_out[:, outside] = np.array(fill, np.uint8)
    return out


def shift_source(shifts: Float[np.ndarray, " rows"], frame: Box, wanted: Box) -> Box:
    """The part of the frames that `shift_rows` needs for `wanted`."""
    across = (wanted.left + shifts.min(), wanted.left + wanted.width + shifts.max())
    return _source(frame, (wanted.top, wanted.top + wanted.height), across)


def transposed(clip: Clip) -> Clip:
    """Swaps rows and columns of all frames."""
    out = np.empty((len(clip), clip.shape[2], clip.shape[1], 3), np.uint8)
    for source, target in zip(clip, out, strict=True):
        cv2.transpose(source, dst=target)
    return out


def _source(frame: Box, rows: Bounds, columns: Bounds) -> Box:
    # Two pixels on either side meet the bicubic kernel; one more for rounding. Where nothing of the
    # frame is needed, a pixel of its edge stays.
    bounds = []
    for (low, high), size in ((rows, frame.height), (columns, frame.width)):
        start = min(max(math.floor(low) - 3, 0), size - 1)
        bounds += [(start, max(min(math.ceil(high) + 3, size), start + 1) - start)]
    (top, height), (left, width) = bounds
    return Box(top, left, height, width)


def _copy_row(row: np.ndarray, start: int, target: np.ndarray) -> None:
    """Copies pixels of `row` from `start` on, which may be outside, where the edges go on."""
    size, wanted = row.shape[1], target.shape[1]
    low, high = max(start, 0), min(start + wanted, size)
    if low >= high:
        target[:] = row[:, :1] if start < 0 else row[:, -1:]
        return
    target[:, low - start : high - start] = row[:, low:high]
    target[:, : low - start] = row[:, :1]
    target[:, high - start :] = row[:, -1:]


def _cubic(taps: np.ndarray, fraction: np.ndarray, out: np.ndarray) -> None:
    """Interpolates between the second and third of four neighbouring pixels, which are three apart.

    Pillow's kernel (a = -1) and its order of operations, without which what should be a whole
    number is now and then truncated to the one before it:
    v2 + d (v3 - v1 + d (2 v1 - 2 v2 + v3 - v4 + d (v2 - v1 + v4 - v3))).
    """
    n = out.shape[-1]
    step = taps[..., 3:] - taps[..., :-3]
    first, second, third = (step[..., 3 * i : 3 * i + n] for i in range(3))
    cubed = first + third
    value = np.multiply(cubed, fraction)
    cubed += first
    value -= cubed
    value *= fraction
    np.add(first, second, out=cubed)
    value += cubed
    value *= fraction
    value += taps[..., 3 : 3 + n]
    np.copyto(cubed, value, casting="unsafe")
    np.clip(cubed, 0, 255, out=out, casting="unsafe")
