"""The eight orientations of a camera, as files state them."""

import struct
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8


class Orientation(NamedTuple):
    """Steps that turn a stored picture upright, in this order."""

    transpose: bool = False
    mirror: bool = False  # left to right
    flip: bool = False  # upside down

    def apply(
        self, image: UInt8[np.ndarray, "_ _ *channels"]
    ) -> UInt8[np.ndarray, "_ _ *channels"]:
        """Returns a view of the upright image."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]


UPRIGHT = Orientation()

# Values 1 to 8 of the EXIF tag.
_OF_EXIF = (
    UPRIGHT,
    Orientation(mirror=True),
    Orientation(mirror=True, flip=True),
    Orientation(flip=True),
    Orientation(transpose=True),
    Orientation(transpose=True, mirror=True),
    Orientation(transpose=True, mirror=True, flip=True),
    Orientation(transpose=True, flip=True),
)


def of_exif(value: object) -> Orientation:
    """Returns the orientation of a value of the EXIF tag; upright for invalid values."""
    return _OF_EXIF[value - 1] if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


class Reader:
    """Reads the orientation of each of a stream's frames.

    PyAV's list of a frame's side data and the frame refer to each other, so that memory is kept
    until the next garbage collection. The list is read only where the rotation changes.
    """

    def __init__(self) -> None:
        self._rotation: int | None = None
        self._orientation = UPRIGHT

    def of_frame(self, frame: av.VideoFrame) -> Orientation:
        """Returns the orientation of the stream's next frame."""
        if frame.rotation != self._rotation:
            self._rotation, self._orientation = frame.rotation, _of_frame(frame)
        return self._orientation


def _of_frame(frame: av.VideoFrame) -> Orientation:
    """Returns the orientation that a decoded frame's display matrix states.

    The matrix maps the pixel (x, y) to (ax + cy, bx + dy), up to a shift. The nearest of the eight
    orientations is returned.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(mirror=a < 0, flip=d < 0)
    return Orientation(transpose=True, mirror=c < 0, flip=b < 0)
