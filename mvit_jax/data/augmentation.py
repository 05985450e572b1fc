"""Cropping and resizing of clips on the host, in uint8 and with one draw for all frames.

Flipping, normalising, erasing and mixing happen on the device.
"""

import math

import cv2
import numpy as np
from jaxtyping import UInt8


def resize(
    clip: UInt8[np.ndarray, "time _ _ 3"], height: int, width: int
) -> UInt8[np.ndarray, "time {height} {width} 3"]:
    """Resizes every frame bilinearly, without antialias, pixel centres at half-integers.

    Values are as in PyTorch's `interpolate(mode="bilinear", align_corners=False)`, which the
    reference recipes use, to within one level of rounding.
    """
    # A loop over frames takes a tenth of the time of one call on frames merged into channels
    # (1.4 against 16 ms for 16 frames of 340x256), and OpenCV 5 ends at 128 channels.
    resized = np.empty((len(clip), height, width, 3), np.uint8)
    for frame, target in zip(clip, resized, strict=True):
        cv2.resize(frame, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
    return resized


def resize_short_side(
    clip: UInt8[np.ndarray, "time _ _ 3"], side: int
) -> UInt8[np.ndarray, "time _ _ 3"]:
    """Resizes so that the short side has `side` pixels; the long one is rounded down."""
    height, width = clip.shape[1:3]
    if min(height, width) == side:
        return clip
    if height < width:
        return resize(clip, side, width * side // height)
    return resize(clip, height * side // width, side)


def random_resized_crop(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    size: int,
    *,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (0.75, 1.3333),
) -> UInt8[np.ndarray, "time {size} {size} 3"]:
    """Cuts the same random rectangle out of all frames and resizes it to a square.

    The "Inception crop" of the papers' training recipes (Fan et al. 2021, appendix D.1).

    Args:
      clip: frames of any size.
      size: side of the square in pixels.
      rng: gives the draws.
      area: bounds of the rectangle's share of the frame, drawn uniformly.
      aspect: bounds of its width divided by its height, drawn log-uniformly.
    """
    top, left, height, width = _random_box(clip.shape[1], clip.shape[2], rng, area, aspect)
    return resize(clip[:, top : top + height, left : left + width], size, size)


def _random_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width); the largest centred box if ten draws do not fit."""
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_height = round(math.sqrt(pixels / ratio))
        box_width = round(math.sqrt(pixels * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / aspect[0])))
    box_width = min(width, max(1, round(height * aspect[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def crop_views(
    clip: UInt8[np.ndarray, "time height width 3"], size: int, crops: int
) -> UInt8[np.ndarray, "{crops} time {size} {size} 3"]:
    """Cuts the test protocol's squares: the centre, or three along the longer side.

    Args:
      clip: frames whose sides are both at least `size`.
      size: side of the squares in pixels.
      crops: 1 for the centre; 3 for left, centre, right (top, centre, bottom of tall frames).

    Raises:
      ValueError: frames smaller than the squares, or another number of crops.
    """
    height, width = clip.shape[1:3]
    if min(height, width) < size:
        raise ValueError(f"frames of {height}x{width} cannot be cropped to {size}x{size}")
    # Centres are rounded up, as in the reference protocol; left or top ones are at 0.
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if crops == 1:
        corners = [(top, left)]
    elif crops != 3:
        raise ValueError(f"the test protocol has 1 or 3 crops, not {crops}")
    elif height > width:
        corners = [(0, left), (top, left), (height - size, left)]
    else:
        corners = [(top, 0), (top, left), (top, width - size)]
    return np.stack([clip[:, y : y + size, x : x + size] for y, x in corners])
