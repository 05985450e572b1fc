"""Still images, with Pillow's values, and the frames that they and arrays give."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError

from mvit_jax.common.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Endings, in capitals or not, of the files that are read as images."""


class DecodeError(UserError):
    """A file that is no video and no image, or a broken one, or one that a clip cannot come from.

    Attributes:
      path: the file.
      reason: what is wrong with it, without the path.
    """

    def __init__(self, path: str, reason: str):
        # Both are arguments of the base class so that the error survives pickling.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be decoded: {self.reason}"


@runtime_checkable  # for beartype, in the tests
class Footage(Protocol):
    """Something opened that clips come from: a video file, an image, a folder of frames."""

    @property
    def num_frames(self) -> int:
        """Number of frames, at least 1."""
        ...

    @property
    def fps(self) -> float:
        """Frames a second."""
        ...

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """RGB frames of these numbers in `range(num_frames)`, in any order.

        Raises:
          DecodeError: what holds them is broken.
        """
        ...


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames in memory, which are sampled in the same way as those of a `decoding.Video`."""

    pixels: UInt8[np.ndarray, "time height width 3"]
    fps: float = 30.0

    @property
    def num_frames(self) -> int:
        return len(self.pixels)

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """A copy of the frames of these numbers."""
        return self.pixels[np.asarray(indices)]


def distinct(
    indices: Sequence[int] | Int[np.ndarray, " frames"], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of these frame numbers, rising, and the place of each number among them.

    Raises:
      IndexError: a frame number out of range.
    """
    wanted, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    if wanted[0] < 0 or wanted[-1] >= num_frames:
        raise IndexError(f"frames {wanted[0]} to {wanted[-1]} of a video of {num_frames} frames")
    return wanted, places


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like an image's; every other file is taken for a video."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "1 height width 3"]:
    """Reads an image as a clip of one frame, RGB.

    Greyscale, palettes and CMYK become RGB and transparency is dropped, by Pillow's
    `convert("RGB")`. An orientation in the EXIF data is not applied, since the evaluations by
    which the published accuracies were measured do not apply it either.

    Raises:
      DecodeError: no such file, no image, a broken one, or one of far too many pixels.
    """
    path = os.fspath(path)
    try:
        return _rgb(Path(path).read_bytes())
    except _UNREADABLE as error:
        raise DecodeError(path, _reason_of_file(Path(path), error)) from error


def decode_image(encoded: bytes, name: str) -> UInt8[np.ndarray, "1 height width 3"]:
    """Reads an image from the bytes of its file; as `read_image`, and errors call it `name`."""
    try:
        return _rgb(encoded)
    except _UNREADABLE as error:
        raise DecodeError(name, _reason(error) if encoded else "it is empty") from error


def check_still(name: str, clip_frames: int) -> None:
    """Raises `DecodeError` where the image `name` is to be a clip of several frames."""
    if clip_frames != 1:
        reason = f"it is an image, and the model takes clips of {clip_frames} frames"
        raise DecodeError(name, reason)


_END_OF_JPEG = b"\xff\xd9"

_UNREADABLE = (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError)


def _rgb(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        # OpenCV decodes the JPEGs of cameras and data sets to the same values in less
        # time; but it takes what is missing of a file that was cut off for grey, and CMYK for
        # something else.
        if image.format == "JPEG" and image.mode == "RGB" and encoded.endswith(_END_OF_JPEG):
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
            if pixels is not None:
                return np.asarray(pixels)[None]
        if image.mode.startswith("I;16"):
            # Pillow would cut off all above 255; of 16-bit colours it takes the high byte too.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))[None]


def _reason_of_file(file: Path, error: Exception) -> str:
    if not file.exists():
        return "there is no such file"
    if file.is_file() and file.stat().st_size == 0:
        return "the file is empty"
    return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels: make it smaller first"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or its beginning is damaged"
    strerror = getattr(error, "strerror", None)
    return str(strerror).lower() if strerror else f"it is damaged or cut off ({error})"
