"""The image operations of RandAugment, on all frames of a clip at once.

Each result equals that of Pillow frame by frame, byte for byte; `benchmarks/augmentation.py`
measures the speedup. Most operations compute only the part of the frames that a later crop needs.
Boxes describe the parts: `frame` is the whole frame, `window` the part that `clip` holds, and
`region` the part to compute. `fill` is the RGB colour of pixels whose source lies outside of the
frame.
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

# Values interpolated at a time. A clip of 16x256x340 takes 16.5 ms, 20 ms with half or twice as
# many, and 60 ms when the values exceed the processor's cache.
_BLOCK = 1 << 17


class Box(NamedTuple):
    """A rectangular part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, clip: np.ndarray, window: "Box") -> np.ndarray:
        """Returns this part of the frames as a view of `clip`, which holds the part `window`."""
        top, left = self.top - window.top, self.left - window.left
        return clip[:, top : top + self.height, left : left + self.width]


# Lookup tables that are the same for all frames and colour channels.


def invert() -> UInt8[np.ndarray, "256"]:
    return np.arange(255, -1, -1, dtype=np.uint8)


def posterize(bits: int) -> UInt8[np.ndarray, "256"]:
    """Returns the table that keeps only the highest `bits` (0 to 8) bits of each value."""
    return np.arange(256, dtype=np.uint8) & np.uint8(256 - (1 << (8 - bits)))


def solarize(threshold: int) -> UInt8[np.ndarray, "256"]:
    """Returns the table that inverts values from `threshold` on."""
    values = np.arange(256)
    return np.where(values < threshold, values, 255 - values).astype(np.uint8)


def solarize_add(add: int) -> UInt8[np.ndarray, "256"]:
    """Returns the table that adds `add` to values below 128."""
    values = np.arange(256)
    return np.where(values < 128, np.minimum(values + add, 255), values).astype(np.uint8)


def brightness(factor: float) -> UInt8[np.ndarray, "256"]:
    """Returns the table that blends values with black; factor 1 is the identity."""
    return _blend(np.zeros((1, 256), np.uint8), np.arange(256, dtype=np.uint8)[None], factor)[0]


# Lookup tables of each frame and colour channel, which depend on the whole frame.


def autocontrast(clip: Clip) -> UInt8[np.ndarray, "time 256 3"]:
    """Returns the tables that stretch each colour channel of each frame to 0..255."""
    present = _histograms(clip) > 0
    low, high = present.argmax(-1), 255 - present[..., ::-1].argmax(-1)
    scale = 255.0 / np.maximum(high - low, 1)
    offset = -low * scale
    # Truncated before clipping, as in Pillow.
    values = (np.arange(256) * scale[..., None] + offset[..., None]).astype(np.int64)
    table = np.where((high > low)[..., None], np.clip(values, 0, 255), np.arange(256))
    return _by_frame(table)


def equalize(clip: Clip) -> UInt8[np.ndarray, "time 256 3"]:
    """Returns the tables that equalise the histogram of each colour channel of each frame."""
    counts = _histograms(clip)
    last = 255 - (counts > 0)[..., ::-1].argmax(-1)
    of_last = np.take_along_axis(counts, last[..., None], -1)
    step = (counts.sum(-1, keepdims=True) - of_last) // 255
    below = counts.cumsum(-1) - counts
    spread = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    return _by_frame(np.where(step > 0, spread, np.arange(256)))


def contrast(clip: Clip, factor: float) -> UInt8[np.ndarray, "time 256 3"]:
    """Returns the tables that blend each frame with its mean grey; factor 1 is the identity."""
    values = np.arange(256, dtype=np.uint8)[None]
    means = [int(cv2.mean(_grey(frame))[0] + 0.5) for frame in clip]
    tables = [_blend(np.full((1, 256), mean, np.uint8), values, factor) for mean in means]
    return np.stack(tables).repeat(3, 1).transpose(0, 2, 1).copy()


def look_up(clip: Clip, table: Table) -> Clip:
    """Replaces each value by its entry in the table."""
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


# Operations on pixels and their neighbours.


def color(clip: Clip, factor: float) -> Clip:
    """Blends each pixel with its grey; factor 1 is the identity."""
    out = np.empty(clip.shape, np.uint8)
    for frame, target in zip(clip, out, strict=True):
        target[:] = _blend(cv2.cvtColor(_grey(frame), cv2.COLOR_GRAY2RGB), frame, factor)
    return out


def sharpness(clip: Clip, factor: float, window: Box, region: Box) -> Clip:
    """Blends each frame with its smoothed version, except at the frame's edges.

    Args:
      clip: one pixel larger than `region` on all sides, except where the frame ends.
      factor: 0 smooths, 1 is the identity, 2 sharpens.
      window: part of the frames that `clip` holds.
      region: part to compute.
    """
    # Multiples of 1/13 are never halfway between two values, so all rounding modes agree.
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    out = np.empty((len(clip), region.height, region.width, 3), np.uint8)
    for frame, target in zip(clip, out, strict=True):
        smooth = cv2.filter2D(frame, -1, kernel)
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            smooth[edge] = frame[edge]
        blended = _blend(smooth, frame, factor)
        target[:] = region.crop(blended[None], window)[0]
    return out


def _grey(frame: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width"]:
    # Pillow rounds a sum of multiples of 2^-16 half up. The sum has at most 24 bits, which float32
    # represents exactly. OpenCV's own grey has other weights.
    weights = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536
    return cv2.transform(frame.astype(np.float32), weights).astype(np.uint8)


def _blend(
    first: UInt8[np.ndarray, "*shape"], second: UInt8[np.ndarray, "*shape"], share: float
) -> UInt8[np.ndarray, "*shape"]:
    """Returns first + share * (second - first), in float32 and truncated, as in Pillow."""
    blended = cv2.subtract(second, first, dtype=cv2.CV_32F)
    blended *= np.float32(share)
    blended += first
    return np.clip(blended, 0, 255, out=blended).astype(np.uint8)


# Geometric operations, with bicubic interpolation and `fill` outside of the frame.


def rotate(clip: Clip, degrees: float, frame: Box, window: Box, region: Box, fill: Colour) -> Clip:
    """Rotates counterclockwise about the frame's centre.

    `degrees` is between -90 and 90, both excluded. `window` contains the box of `rotate_source`.
    """
    if degrees == 0:
        return region.crop(clip, window)
    if _has_centre_pixel(frame) and region != frame:
        return region.crop(rotate(clip, degrees, frame, window, frame, fill), frame)
    a, b, c, d, e, f = _rotation(degrees, frame)
    # The same map in the coordinates of `region` and `window`.
    c += a * region.left + b * region.top - window.left
    f += d * region.left + e * region.top - window.top
    out = np.empty((len(clip), region.height, region.width, 3), np.uint8)
    for source, target in zip(clip, out, strict=True):
        rotated = Image.fromarray(source).transform(
            (region.width, region.height),
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
        target[:] = np.asarray(rotated)
    return out


def rotate_source(degrees: float, frame: Box, region: Box) -> Box:
    """Returns the part of the frames that `rotate` reads to compute `region`."""
    if _has_centre_pixel(frame):
        return frame
    a, b, c, d, e, f = _rotation(degrees, frame)
    corners = [
        (a * x + b * y + c, d * x + e * y + f)
        for x in (region.left, region.left + region.width)
        for y in (region.top, region.top + region.height)
    ]
    across, down = zip(*corners, strict=True)
    return _source_box(frame, (min(down), max(down)), (min(across), max(across)))


def _has_centre_pixel(frame: Box) -> bool:
    # The source of the centre pixel depends on rounding, which differs between a transform of a
    # region and Pillow's transform of the frame. So the whole frame is rotated.
    return frame.height % 2 == 1 and frame.width % 2 == 1


def _rotation(degrees: float, frame: Box) -> tuple[float, ...]:
    """Returns a to f of the map x' = ax + by + c, y' = dx + ey + f to source pixels."""
    # In the order of Pillow's code, for bit-identical values.
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = frame.width / 2, frame.height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def shift_rows(
    clip: Clip,
    shifts: Float[np.ndarray, " rows"],
    frame: Box,
    window: Box,
    region: Box,
    fill: Colour,
) -> Clip:
    """Shifts rows: pixel x of row y gets the value at x + shifts[y] of the same row.

    This implements shearing and translation. For each value, Pillow reads 16 pixels, of which only
    the 4 of one row matter. `shifts` are in pixels, one per row of `region`. `window` contains the
    box of `shift_source`.
    """
    clip = clip[:, region.top - window.top :]
    out = np.empty((len(clip), region.height, region.width, 3), np.uint8)
    x = np.arange(region.left, region.left + region.width) + 0.5
    rows = max(1, _BLOCK // (3 * len(clip) * region.width))
    for start in range(0, region.height, rows):
        stop = min(start + rows, region.height)
        source = x + shifts[start:stop, None]
        outside = (source < 0) | (source >= frame.width)
        source -= 0.5
        first = np.floor(source[:, 0]).astype(int)
        fraction = source - (first[:, None] + np.arange(region.width))
        taps = np.empty((len(clip), stop - start, region.width + 3, 3), np.int16)
        for i, column in enumerate((first - 1 - window.left).tolist()):
            _copy_row(clip[:, start + i], column, taps[:, i])
        rows_out = out[:, start:stop]
        flat = (len(clip), stop - start, -1)
        _cubic(taps.reshape(flat), fraction.repeat(3, 1), rows_out.reshape(flat))
        if outside.any():
            rows_out[:, outside] = np.array(fill, np.uint8)
    return out


def shift_source(shifts: Float[np.ndarray, " rows"], frame: Box, region: Box) -> Box:
    """Returns the part of the frames that `shift_rows` reads to compute `region`."""
    across = (region.left + shifts.min(), region.left + region.width + shifts.max())
    return _source_box(frame, (region.top, region.top + region.height), across)


def transpose(clip: Clip) -> Clip:
    """Swaps rows and columns of all frames."""
    out = np.empty((len(clip), clip.shape[2], clip.shape[1], 3), np.uint8)
    for source, target in zip(clip, out, strict=True):
        cv2.transpose(source, dst=target)
    return out


def _source_box(frame: Box, rows: Bounds, columns: Bounds) -> Box:
    # The bicubic kernel reads two pixels on either side; one more allows for rounding. If the
    # source lies outside of the frame, the box is one pixel wide or high, at the frame's edge.
    bounds = []
    for (low, high), size in ((rows, frame.height), (columns, frame.width)):
        start = min(max(math.floor(low) - 3, 0), size - 1)
        bounds += [(start, max(min(math.ceil(high) + 3, size), start + 1) - start)]
    (top, height), (left, width) = bounds
    return Box(top, left, height, width)


def _copy_row(row: np.ndarray, start: int, target: np.ndarray) -> None:
    """Copies pixels of `row` from `start` on; outside of the row its edge pixels are repeated."""
    size, length = row.shape[1], target.shape[1]
    low, high = max(start, 0), min(start + length, size)
    if low >= high:
        target[:] = row[:, :1] if start < 0 else row[:, -1:]
        return
    target[:, low - start : high - start] = row[:, low:high]
    target[:, : low - start] = row[:, :1]
    target[:, high - start :] = row[:, -1:]


def _cubic(taps: np.ndarray, fraction: np.ndarray, out: np.ndarray) -> None:
    """Interpolates between the second and third of four neighbouring pixels of three values each.

    The kernel (a = -1) and the order of operations are Pillow's:
    v2 + d (v3 - v1 + d (2 v1 - 2 v2 + v3 - v4 + d (v2 - v1 + v4 - v3))).
    In another order, some results that should be whole numbers would come out slightly smaller and
    be truncated to the next lower number.
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
