"""Augmentation of clips on the host: RandAugment, cropping and resizing, in uint8.

All frames of a clip share the random draws. Flipping, normalisation, random erasing and mixing
follow on the device.

For videos, the papers' recipes have the same order. For images, they flip before RandAugment. The
distribution of clips is the same in both orders, as the operations of RandAugment are symmetric or
go left as often as right. Only ShearY differs: it fixes the left edge in the recipes, and either
edge here.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from mvit_jax.common.errors import UserError
from mvit_jax.data import randaugment
from mvit_jax.data.image_ops import Box, Colour
from mvit_jax.data.randaugment import GREY, RandAugment

Interpolation = Literal["bilinear", "bicubic"]

_LONGEST = 50


@dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation of training clips on the host.

    Attributes:
      crop_area: bounds of the random resized crop's area, as a share of the frame; None for no
        random resized crop.
      jitter: bounds of a random short side in pixels, instead of `crop_area`. The inverse of the
        short side is drawn uniformly; then a square is cut at a random position. If `crop_area` and
        `jitter` are None, the short side is scaled to the clip's size, and the central square is
        cut.
      short_side: short side in pixels to which frames are scaled first; None to keep their size.
      randaugment: settings of RandAugment; None for no RandAugment.
      fill: RGB colour that RandAugment uses outside of the frame; in the recipes, grey for videos
        and the mean colour for images.
      interpolation: interpolation of all resizing, see `resize`. RandAugment itself is always
        bicubic, as in the recipes.

    Raises:
      UserError: invalid bounds, or both `crop_area` and `jitter`.
    """

    crop_area: tuple[float, float] | None = (0.08, 1.0)
    jitter: tuple[int, int] | None = None
    short_side: int | None = None
    randaugment: RandAugment | None = None
    fill: Colour = GREY
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.crop_area is not None and self.jitter is not None:
            raise UserError(
                f"crop_area={self.crop_area} and jitter={self.jitter} cannot both be set: set one "
                "of them to None"
            )
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise UserError(
                f"crop_area={self.crop_area} is invalid: set shares of the frame with "
                "0 < lower <= upper <= 1"
            )
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1]:
            raise UserError(
                f"jitter={self.jitter} is invalid: set short sides in pixels with "
                "0 < lower <= upper"
            )


def augment(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    settings: Augmentation,
    size: int,
    *,
    rng: np.random.Generator,
    image: bool,
) -> UInt8[np.ndarray, "time {size} {size} 3"]:
    """Makes a training clip from decoded frames (Fan et al. 2021, appendix D.1).

    RandAugment precedes the crop for videos, and follows it for images.

    Args:
      clip: decoded frames.
      settings: augmentation of the clip.
      size: side of the square in pixels.
      rng: generator of all draws.
      image: True for images, which are cropped first.

    Raises:
      UserError: the smallest short side of `settings.jitter` is below `size`.
    """
    if settings.short_side is not None:
        clip = resize_short_side(clip, settings.short_side, settings.interpolation)
    operations = settings.randaugment.draw(rng) if settings.randaugment else ()
    if image:
        return randaugment.apply(
            _crop(clip, settings, size, rng, image), operations, fill=settings.fill
        )
    if settings.crop_area is None:
        clip = randaugment.apply(clip, operations, fill=settings.fill)
        return _crop(clip, settings, size, rng, image)
    # The crop is drawn first, so that RandAugment computes only the pixels inside of it.
    box = random_box(clip.shape[1], clip.shape[2], rng, settings.crop_area)
    clip = randaugment.apply(clip, operations, fill=settings.fill, box=box)
    return resize(clip, size, size, settings.interpolation)


def _crop(
    clip: np.ndarray, settings: Augmentation, size: int, rng: np.random.Generator, image: bool
) -> np.ndarray:
    cut = draw_cut(clip.shape[1], clip.shape[2], settings, size, rng, image=image)
    return cut.apply(clip, settings.interpolation)


@dataclass(frozen=True)
class Cut:
    """A square, or the whole, of a resized region of the frames.

    Attributes:
      region: region of the frame.
      height: height of the resized region in pixels.
      width: width of the resized region in pixels.
      window: part of the resized region that remains.
      scale: factors of y and of x of coordinates. They are those of the reference code, which
        scales both axes by the ratio of the long sides if the short side is resized.
    """

    region: Box
    height: int
    width: int
    window: Box
    scale: tuple[float, float]

    def apply(
        self, clip: UInt8[np.ndarray, "time _ _ 3"], interpolation: Interpolation = "bilinear"
    ) -> UInt8[np.ndarray, "time _ _ 3"]:
        """Cuts the frames."""
        top, left, height, width = self.region
        clip = clip[:, top : top + height, left : left + width]
        if clip.shape[1:3] != (self.height, self.width):
            clip = resize(clip, self.height, self.width, interpolation)
        top, left, height, width = self.window
        return clip[:, top : top + height, left : left + width]

    def move(self, boxes: Float64[np.ndarray, "boxes 4"]) -> Float64[np.ndarray, "boxes 4"]:
        """Returns the boxes (x1, y1, x2, y2 in pixels) after the cut, clipped to it.

        A box outside becomes one without area, on the border.
        """
        corner = np.array([self.region.left, self.region.top] * 2)
        factors = np.array(self.scale[::-1] * 2)
        moved = (boxes - corner) * factors - [self.window.left, self.window.top] * 2
        return np.clip(moved, 0, [self.window.width - 1, self.window.height - 1] * 2)


def draw_cut(
    height: int,
    width: int,
    settings: Augmentation,
    size: int,
    rng: np.random.Generator,
    *,
    image: bool = False,
) -> Cut:
    """Draws the square of frames of `height` x `width` by random resized crop or by jitter.

    The random resized crop is the "Inception crop" of the papers' training recipes (Fan et al.
    2021, appendix D.1). The interpolation reads no pixels outside of its region.
    Without both, the square is the centre of the frame, whose short side is scaled to `size`.

    Raises:
      UserError: the smallest short side of `settings.jitter` is below `size`.
    """
    if settings.crop_area is not None:
        region = random_box(height, width, rng, settings.crop_area)
        scale = size / region.height, size / region.width
        return Cut(region, size, size, Box(0, 0, size, size), scale)
    if settings.jitter is None:
        return centre_cut(height, width, size, size, image=image)
    low, high = settings.jitter
    if low < size:
        raise UserError(
            f"squares of {size} pixels cannot be cut from frames whose short side is {low}: raise "
            "jitter or lower the size"
        )
    whole = whole_cut(height, width, round(1 / rng.uniform(1 / high, 1 / low)))
    top, left = (int(rng.integers(n - size + 1)) for n in (whole.height, whole.width))
    return replace(whole, window=Box(top, left, size, size))


def centre_cut(height: int, width: int, side: int, size: int, *, image: bool = False) -> Cut:
    """Returns the centre square of `size` pixels after the short side is scaled to `side`."""
    whole = whole_cut(height, width, side)
    top, left = centre_corner(whole.height, whole.width, size, image=image)
    return replace(whole, window=Box(top, left, size, size))


def whole_cut(height: int, width: int, side: int) -> Cut:
    """Returns the whole frame with a short side of `side` pixels, see `resize_short_side`."""
    region = _middle(height, width)
    height, width = short_side_size(region.height, region.width, side)
    ratio = max(height, width) / max(region.height, region.width)
    return Cut(region, height, width, Box(0, 0, height, width), (ratio, ratio))


def resize(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    height: int,
    width: int,
    interpolation: Interpolation = "bilinear",
) -> UInt8[np.ndarray, "time {height} {width} 3"]:
    """Resizes every frame, with pixel centres at half-integers, as the reference recipes do.

    "bilinear", for video, has no antialiasing. The values differ by at most one level from those of
    PyTorch's `interpolate(mode="bilinear", align_corners=False)`. "bicubic", for images, is
    Pillow's, with antialiasing.
    """
    if interpolation == "bicubic":
        frames = (Image.fromarray(np.ascontiguousarray(frame)) for frame in clip)
        bicubic = Image.Resampling.BICUBIC
        return np.stack([np.asarray(frame.resize((width, height), bicubic)) for frame in frames])
    # A loop over frames takes a tenth of the time of one call with the frames as channels (1.4 ms
    # instead of 16 for 16 frames of 340x256), and OpenCV 5 has at most 128 channels.
    resized = np.empty((len(clip), height, width, 3), np.uint8)
    for frame, target in zip(clip, resized, strict=True):
        cv2.resize(frame, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    return resized


def resize_short_side(
    clip: UInt8[np.ndarray, "time _ _ 3"], side: int, interpolation: Interpolation = "bilinear"
) -> UInt8[np.ndarray, "time _ _ 3"]:
    """Resizes the short side to `side` pixels and the long side in proportion, rounded down.

    Of frames that are more than 50 times as long as wide, the middle part is resized, as the
    whole frame would become very large.
    """
    return whole_cut(clip.shape[1], clip.shape[2], side).apply(clip, interpolation)


def short_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns height and width after the short side is scaled to `side` pixels."""
    if height < width:
        return side, width * side // height
    return height * side // width, side


def _middle(height: int, width: int) -> Box:
    """Returns the frame without both ends, if it is longer than `_LONGEST` times its width."""
    top = max(height - _LONGEST * width, 0) // 2
    left = max(width - _LONGEST * height, 0) // 2
    return Box(top, left, height - 2 * top, width - 2 * left)


def random_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float] = (0.75, 1.3333),
) -> Box:
    """Draws a random box inside the frame.

    After ten draws that do not fit, returns the largest centred box of an allowed aspect ratio.

    Args:
      height: height of the frame in pixels.
      width: width of the frame in pixels.
      rng: generator of the draws.
      area: bounds of the box's share of the frame, drawn uniformly.
      aspect: bounds of the box's width / height, drawn log-uniformly.
    """
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_height = round(math.sqrt(pixels / ratio))
        box_width = round(math.sqrt(pixels * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_height = min(height, max(1, round(width / aspect[0])))
    box_width = min(width, max(1, round(height * aspect[1])))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return Box(top, left, box_height, box_width)


def crop_views(
    clip: UInt8[np.ndarray, "time height width 3"], size: int, crops: int, *, image: bool = False
) -> UInt8[np.ndarray, "{crops} time {size} {size} 3"]:
    """Cuts the test protocol's squares: the centre, or three along the long side.

    Args:
      clip: frames, at least `size` high and wide.
      size: side of the squares in pixels.
      crops: 1 for the centre; 3 for left, centre, right (top, centre, bottom of tall frames).
      image: True for images, see `centre_corner`.

    Raises:
      ValueError: frames smaller than the squares, or another number of crops.
    """
    height, width = clip.shape[1:3]
    if min(height, width) < size:
        raise ValueError(f"frames of {height}x{width} cannot be cropped to {size}x{size}")
    top, left = centre_corner(height, width, size, image=image)
    if crops == 1:
        corners = [(top, left)]
    elif crops != 3:
        raise ValueError(f"the test protocol has 1 or 3 crops, not {crops}")
    elif height > width:
        corners = [(0, left), (top, left), (height - size, left)]
    else:
        corners = [(top, 0), (top, left), (top, width - size)]
    return np.stack([clip[:, y : y + size, x : x + size] for y, x in corners])


def centre_corner(height: int, width: int, size: int, *, image: bool) -> tuple[int, int]:
    """Returns the top and left edge of the centre square.

    If an odd number of pixels is left over, the offset is rounded to even for images (torchvision's
    CenterCrop) and up for videos (the reference protocol).
    """
    rounded = round if image else math.ceil
    return rounded((height - size) / 2), rounded((width - size) / 2)
