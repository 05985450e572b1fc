"""RandAugment, cropping and resizing of clips on the host, in uint8, one draw for all frames.

Flipping, normalising, erasing and mixing happen on the device, after this. For videos that is the
recipes' order. Images are flipped before RandAugment there, which gives the same distribution: its
operations are symmetric, or go left as often as right; but for ShearY, which holds the left edge
there and either edge here.
"""

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mvit_jax.common.errors import UserError
from mvit_jax.data import randaugment
from mvit_jax.data.image_ops import Box, Colour
from mvit_jax.data.randaugment import GREY, RandAugment

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to decoded frames of training clips.

    Attributes:
      crop_area: bounds of the random resized crop's share of the frame; None for no such crop.
      jitter: instead, bounds of the short side in pixels, whose inverse is drawn uniformly; then a
        square is cut out at a random place. Where both are None: short side to the square's, then
        its centre.
      short_side: to which frames are scaled before all else, pixels; None to leave them.
      randaugment: how RandAugment draws; None for none.
      fill: red, green and blue of what RandAugment brings in from outside of frames: grey for
        videos, the mean colour for images, in the recipes.
      interpolation: of all scaling, see `resize`. RandAugment's own is bicubic, as in the recipes.

    Raises:
      UserError: bounds that are none, or two ways to crop.
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
                f"crops of a random area {self.crop_area} and of a random short side {self.jitter} "
                "cannot both be cut: set one of crop_area and jitter to None"
            )
        if self.crop_area is not None and not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise UserError(
                f"a crop's share of the frame goes from above 0 to 1, not from "
                f"{self.crop_area[0]} to {self.crop_area[1]}: mend crop_area"
            )
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1]:
            raise UserError(
                f"a short side cannot be drawn from {self.jitter[0]} to {self.jitter[1]} pixels: "
                "mend jitter"
            )


def augment(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    settings: Augmentation,
    size: int,
    *,
    rng: np.random.Generator,
    image: bool,
) -> UInt8[np.ndarray, "time {size} {size} 3"]:
    """Makes a training clip out of decoded frames (the recipes' section: Fan et al. 2021, D.1).

    Videos go through RandAugment as whole frames and are then cropped; images the other way round.
    `rng` gives all draws.

    Raises:
      UserError: squares that do not fit into frames with the smallest short side.
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
    # The crop is drawn first: what it leaves out need not be computed.
    box = random_box(clip.shape[1], clip.shape[2], rng, settings.crop_area)
    clip = randaugment.apply(clip, operations, fill=settings.fill, box=box)
    return resize(clip, size, size, settings.interpolation)


def _crop(
    clip: np.ndarray, settings: Augmentation, size: int, rng: np.random.Generator, image: bool
) -> np.ndarray:
    """Cuts a square, in the way that the settings have."""
    if settings.crop_area is not None:
        return random_resized_crop(
            clip, size, rng=rng, area=settings.crop_area, interpolation=settings.interpolation
        )
    if settings.jitter is None:
        clip = resize_short_side(clip, size, settings.interpolation)
        return crop_views(clip, size, 1, image=image)[0]
    low, high = settings.jitter
    if low < size:
        raise UserError(
            f"squares of {size} pixels cannot be cut from frames whose short side is {low}: raise "
            "jitter or lower the size"
        )
    side = round(1 / rng.uniform(1 / high, 1 / low))
    clip = resize_short_side(clip, side, settings.interpolation)
    top, left = (int(rng.integers(length - size + 1)) for length in clip.shape[1:3])
    return clip[:, top : top + size, left : left + size]


def resize(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    height: int,
    width: int,
    interpolation: Interpolation = "bilinear",
) -> UInt8[np.ndarray, "time {height} {width} 3"]:
    """Resizes every frame, pixel centres at half-integers, as the reference recipes do.

    "bilinear" is without antialias, for video: values are as in PyTorch's
    `interpolate(mode="bilinear", align_corners=False)`, to within one level of rounding. "bicubic"
    is with antialias, for images: Pillow's.
    """
    if interpolation == "bicubic":
        frames = (Image.fromarray(np.ascontiguousarray(frame)) for frame in clip)
        bicubic = Image.Resampling.BICUBIC
        return np.stack([np.asarray(frame.resize((width, height), bicubic)) for frame in frames])
    # A loop over frames takes a tenth of the time of one call on frames merged into channels
    # (1.4 against 16 ms for 16 frames of 340x256), and OpenCV 5 ends at 128 channels.
    resized = np.empty((len(clip), height, width, 3), np.uint8)
    for frame, target in zip(clip, resized, strict=True):
        cv2.resize(frame, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    return resized


def resize_short_side(
    clip: UInt8[np.ndarray, "time _ _ 3"], side: int, interpolation: Interpolation = "bilinear"
) -> UInt8[np.ndarray, "time _ _ 3"]:
    """Resizes so that the short side has `side` pixels; the long one is rounded down."""
    height, width = clip.shape[1:3]
    if min(height, width) == side:
        return clip
    if height < width:
        return resize(clip, side, width * side // height, interpolation)
    return resize(clip, height * side // width, side, interpolation)


def random_resized_crop(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    size: int,
    *,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    interpolation: Interpolation = "bilinear",
) -> UInt8[np.ndarray, "time {size} {size} 3"]:
    """Cuts the same `random_box` out of all frames and resizes it to a square.

    The "Inception crop" of the papers' training recipes (Fan et al. 2021, appendix D.1). `resize`
    sees nothing outside of the rectangle.
    """
    top, left, height, width = random_box(clip.shape[1], clip.shape[2], rng, area)
    return resize(clip[:, top : top + height, left : left + width], size, size, interpolation)


def random_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float] = (0.75, 1.3333),
) -> Box:
    """Draws a box; the largest centred one if ten draws do not fit.

    Args:
      area: bounds of its share of the frame, drawn uniformly.
      aspect: bounds of its width divided by its height, drawn log-uniformly.
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
    """Cuts the test protocol's squares: the centre, or three along the longer side.

    Args:
      crops: 1 for the centre; 3 for left, centre, right (top, centre, bottom of tall frames).
      image: whether the centre is that of images. Where an odd number of pixels is left over, the
        reference protocol of video rounds up, and torchvision's CenterCrop to the even one.

    Raises:
      ValueError: frames smaller than the squares, or another number of crops.
    """
    height, width = clip.shape[1:3]
    if min(height, width) < size:
        raise ValueError(f"frames of {height}x{width} cannot be cropped to {size}x{size}")
    rounded = round if image else math.ceil
    top, left = rounded((height - size) / 2), rounded((width - size) / 2)
    if crops == 1:
        corners = [(top, left)]
    elif crops != 3:
        raise ValueError(f"the test protocol has 1 or 3 crops, not {crops}")
    elif height > width:
        corners = [(0, left), (top, left), (height - size, left)]
    else:
        corners = [(top, 0), (top, left), (top, width - size)]
    return np.stack([clip[:, y : y + size, x : x + size] for y, x in corners])
