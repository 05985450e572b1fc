"""Still images with the pixel values of Pillow, and the interface of opened videos and images."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from mvit_jax.common.errors import UserError
from mvit_jax.data import orientation

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Suffixes of image files; upper and lower case are equivalent."""

MAX_PIXELS = 178_956_970
"""Largest number of pixels of a frame or image: 512 MiB in RGB, and Pillow's own limit."""


class DecodeError(UserError):
    """Decode failure: the file is no video or image, is broken, or does not suit the clip.

    Attributes:
      path: path of the file, or its name in messages.
      reason: reason of the failure, without the path.
    """

    def __init__(self, path: str, reason: str):
        # The base class gets both arguments so that the error can be pickled.
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} cannot be decoded: {self.reason}"


@runtime_checkable  # for beartype, in the tests
class Footage(Protocol):
    """An opened source of frames: a video file, an image or a folder of frames."""

    @property
    def num_frames(self) -> int:
        """Number of frames, at least 1."""
        ...

    @property
    def fps(self) -> float:
        """Average frames per second."""
        ...

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Returns RGB frames by their numbers in `range(num_frames)`, in any order.

        Raises:
          DecodeError: the file is broken at these frames.
        """
        ...


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames in memory, with the interface of `Footage`."""

    pixels: UInt8[np.ndarray, "time height width 3"]
    fps: float = 30.0

    @property
    def num_frames(self) -> int:
        return len(self.pixels)

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Returns a copy of the frames with these numbers."""
        return self.pixels[np.asarray(indices)]


def distinct(
    indices: Sequence[int] | Int[np.ndarray, " frames"], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sorted distinct frame numbers, and for each given number its index among them.

    Raises:
      IndexError: a frame number is out of range.
    """
    numbers, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    if numbers[0] < 0 or numbers[-1] >= num_frames:
        raise IndexError(
            f"frames {numbers[0]} to {numbers[-1]} are out of range for {num_frames} frames"
        )
    return numbers, inverse


def is_image(path: str | os.PathLike[str]) -> bool:
    """Returns True if the path has an image's suffix; any other file is read as a video."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "1 height width 3"]:
    """Reads an image as a clip of one frame, RGB.

    Greyscale, palette and CMYK images are converted to RGB and transparency is dropped, as by
    Pillow's `convert("RGB")`. Photos are turned upright by their EXIF orientation.

    Raises:
      DecodeError: the file is missing, is not an image, is broken, or has far too many pixels.
    """
    path = os.fspath(path)
    try:
        return _rgb(Path(path).read_bytes())
    except _UNREADABLE as error:
        raise DecodeError(path, _reason_of_file(Path(path), error)) from error


def decode_image(encoded: bytes, name: str) -> UInt8[np.ndarray, "1 height width 3"]:
    """Reads an image from the bytes of its file, as `read_image`; errors contain `name`."""
    try:
        return _rgb(encoded)
    except _UNREADABLE as error:
        raise DecodeError(name, _reason(error) if encoded else "it is empty") from error


def check_still(name: str, clip_frames: int) -> None:
    """Raises `DecodeError` unless clips have one frame; `name` is the image in the message."""
    if clip_frames != 1:
        reason = f"it is an image, but the model requires clips of {clip_frames} frames"
        raise DecodeError(name, reason)


_END_OF_JPEG = b"\xff\xd9"

_UNREADABLE = (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError)


def _rgb(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        stored = orientation.of_exif(image.getexif().get(ExifTags.Base.Orientation))
        return stored.apply(_stored_rgb(image, encoded))[None]


def _stored_rgb(image: Image.Image, encoded: bytes) -> np.ndarray:
    # OpenCV decodes the JPEGs of cameras and data sets to the same values in less time. But it
    # fills the missing part of truncated files with grey, and converts CMYK differently.
    if image.format == "JPEG" and image.mode == "RGB" and encoded.endswith(_END_OF_JPEG):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        if pixels is not None:
            return np.asarray(pixels)
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey at 255, although it keeps the high byte of 16-bit RGB.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def _reason_of_file(file: Path, error: Exception) -> str:
    if not file.exists():
        return "there is no such file"
    if file.is_file() and file.stat().st_size == 0:
        return "the file is empty"
    return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels: scale it down first"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or its beginning is damaged"
    strerror = getattr(error, "strerror", None)
    return str(strerror).lower() if strerror else f"it is damaged or cut off ({error})"
