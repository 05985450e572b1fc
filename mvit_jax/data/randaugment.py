"""RandAugment (Cubuk et al. 2020) of clips: a few random operations, the same for all frames.

The strings, operations and ranges are timm's, which the papers' recipes use. Twelve of the fifteen
operations are stronger at larger magnitudes; AutoContrast, Equalize and Invert have no magnitude.
The operations of a clip are drawn with replacement, and each is applied with probability 0.5.

For videos, only the pixels inside of the random crop are computed. RandAugment and crop of a clip
are thus 1.6 to 1.7 times as fast as on whole frames: 18.8 ms instead of 31.7 in
`python -m benchmarks.augmentation` (three runs, 2026-11-30).
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.data import image_ops
from mvit_jax.data.image_ops import Box, Clip, Colour

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
"""Names of the operations: timm's, without "Increasing" and "Rel"."""

GREY = (128, 128, 128)
"""Fill colour outside of video frames."""

_APPLY_PROBABILITY = 0.5  # of an operation that was drawn


class Operation(NamedTuple):
    """One of `OPERATIONS` and its argument, in Pillow's units.

    Rotate: degrees counterclockwise. Posterize: number of bits left. Solarize: threshold.
    SolarizeAdd: summand. Color, Contrast, Brightness, Sharpness: factor. ShearX, ShearY: pixels per
    pixel. TranslateX, TranslateY: fraction of the width or height. Others: 0.
    """

    name: str
    argument: float


@dataclass(frozen=True)
class RandAugment:
    """Distribution of the operations of a clip.

    Attributes:
      magnitude: mean of the magnitudes, 0 to 10.
      layers: number of operations drawn per clip.
      std: standard deviation of the magnitudes, which are drawn from a normal distribution and
        clipped to 0..10.
    """

    magnitude: int
    layers: int
    std: float

    def draw(self, rng: np.random.Generator) -> tuple[Operation, ...]:
        """Draws the operations of one clip and returns those to apply."""
        drawn = []
        for _ in range(self.layers):
            name = OPERATIONS[rng.integers(len(OPERATIONS))]
            applied = rng.random() < _APPLY_PROBABILITY
            magnitude = min(max(rng.normal(self.magnitude, self.std), 0.0), 10.0)
            sign = rng.choice((-1, 1))
            if applied:
                drawn.append(operation(name, magnitude, int(sign)))
        return tuple(drawn)


def parse(text: str) -> RandAugment:
    """Parses timm's RandAugment string, like "rand-m7-n4-mstd0.5-inc1".

    m is the magnitude (10 by default), n the layers (2), mstd the standard deviation (0). inc1
    selects the operations that are stronger at larger magnitudes; no other set is supported.

    Raises:
      UserError: an unknown or repeated part, a value out of range, or no inc1.
    """
    name, *parts = text.split("-")
    if name != "rand":
        raise UserError(
            f"RandAugment's string {text!r} must start with 'rand', like rand-m7-n4-mstd0.5-inc1"
        )
    # Supported parts: pattern and bounds of the number.
    supported = {"m": (r"\d+", 0, 10), "n": (r"\d+", 1, 100), "mstd": (r"\d+(?:\.\d+)?", 0, 100)}
    supported["inc"] = (r"\d+", 1, 1)
    values: dict[str, float] = {"m": 10, "n": 2, "mstd": 0.0, "inc": 0}
    seen = set()
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(.*)", part)
        key = match[1] if match else ""
        if not match or key not in supported:
            raise UserError(
                f"part {part!r} of RandAugment's string {text!r} is unknown: use m, n, mstd and "
                "inc, like rand-m7-n4-mstd0.5-inc1"
            )
        pattern, low, high = supported[key]
        if key in seen or not re.fullmatch(pattern, match[2]):
            raise UserError(
                f"part {part!r} of RandAugment's string {text!r} must appear once and have a "
                "number, like rand-m7-n4-mstd0.5-inc1"
            )
        seen.add(key)
        values[key] = float(match[2])
        if key != "inc" and not low <= values[key] <= high:
            raise UserError(
                f"part {part!r} of RandAugment's string {text!r} is out of range: {key} goes from "
                f"{low} to {high}"
            )
    if values["inc"] != 1:
        raise UserError(
            f"RandAugment's string {text!r} selects operations that do not grow with the "
            "magnitude, which are not supported: end it with -inc1"
        )
    return RandAugment(int(values["m"]), int(values["n"]), values["mstd"])


def operation(name: str, magnitude: int | float, sign: int) -> Operation:
    """Returns an operation at a magnitude of 0 to 10; `sign` (1 or -1) is the direction, if any."""
    level = magnitude / 10
    match name:
        case "Rotate":
            argument = sign * (level * 30)
        case "Posterize":
            argument = 4 - int(level * 4)
        case "Solarize":
            argument = 256 - int(level * 256)
        case "SolarizeAdd":
            argument = int(level * 110)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            argument = max(0.1, 1 + sign * (level * 0.9))
        case "ShearX" | "ShearY":
            argument = sign * (level * 0.3)
        case "TranslateX" | "TranslateY":
            argument = sign * (level * 0.45)
        case _:
            argument = 0
    return Operation(name, float(argument))


def apply(
    clip: UInt8[np.ndarray, "time _ _ 3"],
    operations: tuple[Operation, ...],
    *,
    fill: Colour = GREY,
    box: Box | None = None,
) -> UInt8[np.ndarray, "time _ _ 3"]:
    """Applies operations in order to all frames.

    The values are Pillow's. If only a part of a rotated frame is computed, the coordinates differ
    from Pillow's in the thirteenth decimal. This changed none of 1.6 * 10^8 values.

    Args:
      clip: frames.
      operations: operations of the clip.
      fill: RGB colour of pixels whose source lies outside of the frame.
      box: part of the frames to return, for a later crop; None for all. Only pixels that affect
        this part are computed.

    Returns:
      The part `box` of the frames; may share memory with `clip`.
    """
    frame = Box(0, 0, *clip.shape[1:3])
    # The part that each operation must return, computed from the last operation to the first.
    regions = [box or frame]
    for op in reversed(operations):
        regions.append(_source_box(op, frame, regions[-1]))
    window = regions.pop()
    clip = window.crop(clip, frame)
    for op in operations:
        region = regions.pop()
        clip = _apply(op, clip, frame, window, region, fill)
        window = region
    return clip


def _source_box(op: Operation, frame: Box, region: Box) -> Box:
    """Returns the part of the frames that an operation reads to compute the part `region`."""
    match op.name:
        case "AutoContrast" | "Equalize" | "Contrast":
            return frame
        case "Sharpness":
            top, left = max(region.top - 1, 0), max(region.left - 1, 0)
            bottom = min(region.top + region.height + 1, frame.height)
            right = min(region.left + region.width + 1, frame.width)
            return Box(top, left, bottom - top, right - left)
        case "Rotate":
            return image_ops.rotate_source(op.argument, frame, region)
        case "ShearX" | "TranslateX":
            return image_ops.shift_source(_shifts(op, frame, region), frame, region)
        case "ShearY" | "TranslateY":
            frame, region = _transpose(frame), _transpose(region)
            return _transpose(image_ops.shift_source(_shifts(op, frame, region), frame, region))
    return region


def _apply(op: Operation, clip: Clip, frame: Box, window: Box, region: Box, fill: Colour) -> Clip:
    """Applies an operation to `clip`, the part `window` of frames; returns the part `region`."""
    name, argument = op
    match name:
        case "Rotate":
            return image_ops.rotate(clip, argument, frame, window, region, fill)
        case "ShearX" | "TranslateX":
            shifts = _shifts(op, frame, region)
            return image_ops.shift_rows(clip, shifts, frame, window, region, fill)
        case "ShearY" | "TranslateY":
            frame, window, region = _transpose(frame), _transpose(window), _transpose(region)
            shifts = _shifts(op, frame, region)
            clip = image_ops.transpose(clip)
            clip = image_ops.shift_rows(clip, shifts, frame, window, region, fill)
            return image_ops.transpose(clip)
        case "Color":
            return image_ops.color(clip, argument)
        case "Sharpness":
            return image_ops.sharpness(clip, argument, window, region)
    return image_ops.look_up(region.crop(clip, window), _table(name, argument, clip))


def _table(name: str, argument: float, clip: Clip) -> image_ops.Table:
    match name:
        case "AutoContrast":
            return image_ops.autocontrast(clip)
        case "Equalize":
            return image_ops.equalize(clip)
        case "Contrast":
            return image_ops.contrast(clip, argument)
        case "Brightness":
            return image_ops.brightness(argument)
        case "Posterize":
            return image_ops.posterize(int(argument))
        case "Solarize":
            return image_ops.solarize(int(argument))
        case "SolarizeAdd":
            return image_ops.solarize_add(int(argument))
        case "Invert":
            return image_ops.invert()
    raise ValueError(f"there is no operation {name!r}: choose one of {', '.join(OPERATIONS)}")


def _shifts(op: Operation, frame: Box, region: Box) -> np.ndarray:
    """Returns the shifts of the rows of `region` in pixels; for columns, pass transposed boxes."""
    if op.name.startswith("Shear"):
        return op.argument * (np.arange(region.top, region.top + region.height) + 0.5)
    return np.full(region.height, op.argument * frame.width)


def _transpose(box: Box) -> Box:
    """Returns the box in transposed frames."""
    return Box(box.left, box.top, box.width, box.height)
