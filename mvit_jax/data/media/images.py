"""Still images with the pixel values of Pillow, and the interface of opened videos and images."""

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from mvit_jax.common.errors import UserError
from mvit_jax.data.media import orientation

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
"""Suffixes of image files that Pillow decodes; upper and lower case are equivalent."""

# Pillow has no decoder. FFmpeg's gives one tile of the pictures of phones.
_UNDECODED = (".heic", ".heif", ".hif")

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
    """Returns True for the suffix of an image, and for a GIF of one frame.

    Any other file is read as a video. Animated WebP, PNG and AVIF files count as images.
    """
    name = os.fspath(path).lower()
    return name.endswith(SUFFIXES + _UNDECODED) or (name.endswith(".gif") and _is_still_gif(path))


def _is_still_gif(path: str | os.PathLike[str]) -> bool:
    try:
        with Image.open(path, formats=["GIF"]) as image:
            return not getattr(image, "is_animated", True)
    except _UNREADABLE:
        return False


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


# Pillow warns of metadata, and of images of half as many pixels as it rejects, without the file's
# name. A file that it cannot decode raises an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_END_OF_JPEG = b"\xff\xd9"

_UNREADABLE = (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError)


class _UnknownRangeError(ValueError):
    """Pixels of 32 bits, as in TIFF files of measurements."""


def _rgb(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        pixels = _stored_rgb(image, encoded)
        # After the pixels: Pillow turns TIFF upright as it loads them, and then drops the tag.
        stored = orientation.of_exif(image.getexif().get(ExifTags.Base.Orientation))
        return stored.apply(pixels)[None]


def _stored_rgb(image: Image.Image, encoded: bytes) -> np.ndarray:
    # OpenCV decodes the JPEGs of cameras and data sets to the same values in less time. But it
    # fills the missing part of truncated files with grey, and converts CMYK differently.
    if image.format == "JPEG" and image.mode == "RGB" and encoded.endswith(_END_OF_JPEG):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        if pixels is not None:
            return np.asarray(pixels)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        # Pillow would clip 16-bit grey at 255, although it keeps the high byte of 16-bit RGB.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # Pillow would clip the values to 0 to 255
        raise _UnknownRangeError
    image.info.pop("transparency", None)  # is dropped anyway, by Pillow with a warning
    return np.array(image.convert("RGB"))


def _reason_of_file(file: Path, error: Exception) -> str:
    if not file.exists():
        return "there is no such file"
    if file.is_file() and file.stat().st_size == 0:
        return "the file is empty"
    if file.name.lower().endswith(_UNDECODED) and isinstance(error, UnidentifiedImageError):
        return "there is no decoder of HEIC images: convert it to JPEG or PNG"
    return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels: scale it down first"
    if isinstance(error, _UnknownRangeError):
        return "its pixels have 32 bits without a stated range: save it with 8 or 16 bits"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or its beginning is damaged"
    strerror = getattr(error, "strerror", None)
    return str(strerror).lower() if strerror else f"it is damaged or cut off ({error})"
