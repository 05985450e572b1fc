"""RandAugment (Cubuk et al. 2020) of clips: a few random operations, the same for all frames.

The strings, operations and ranges are timm's, which the papers' recipes use: fifteen operations
that do more the larger the magnitude, drawn with replacement and then applied half the time.

Of videos only the part that the random crop leaves over is computed, which makes RandAugment and
the crop of a clip 1.6 to 1.7 times as fast as whole frames do: 18.8 ms instead of 31.7 in
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
"""By timm's names, without "Increasing" and "Rel"."""

GREY = (128, 128, 128)
"""What fills the outside of frames of videos."""

_CHANCE = 0.5  # that an operation that was drawn is applied


class Operation(NamedTuple):
    """One of `OPERATIONS` and its argument, as Pillow takes it.

    Rotate: degrees counterclockwise. Posterize: bits that are kept. Solarize: threshold.
    SolarizeAdd: what is added. Color, Contrast, Brightness, Sharpness: factor. ShearX, ShearY:
    pixels per pixel. TranslateX, TranslateY: part of the width or height. Others: 0.
    """

    name: str
    argument: float


@dataclass(frozen=True)
class RandAugment:
    """How operations are drawn.

    Attributes:
      magnitude: mean of the magnitudes, 0 to 10.
      layers: operations that are drawn for a clip.
      std: standard deviation of the magnitudes, which are normal and then clipped to 0..10.
    """

    magnitude: int
    layers: int
    std: float

    def draw(self, rng: np.random.Generator) -> tuple[Operation, ...]:
        """Draws the operations of one clip, those alone that are to be applied."""
        drawn = []
        for _ in range(self.layers):
            name = OPERATIONS[rng.integers(len(OPERATIONS))]
            applied = rng.random() < _CHANCE
            magnitude = min(max(rng.normal(self.magnitude, self.std), 0.0), 10.0)
            sign = rng.choice((-1, 1))
            if applied:
                drawn.append(operation(name, magnitude, int(sign)))
        return tuple(drawn)


def parse(text: str) -> RandAugment:
    """Reads a string of timm's, like "rand-m7-n4-mstd0.5-inc1".

    m is the magnitude (10 if left out), n the layers (2), mstd the standard deviation (0); inc1 is
    the set of operations that do more the larger the magnitude, and the only one that exists here.

    Raises:
      UserError: another part, a part twice, a value out of range, or no inc1.
    """
    name, *parts = text.split("-")
    if name != "rand":
        raise UserError(
            f"RandAugment's string {text!r} must start with 'rand', like rand-m7-n4-mstd0.5-inc1"
        )
    # What a part may hold: pattern, and bounds.
    known = {"m": (r"\d+", 0, 10), "n": (r"\d+", 1, 100), "mstd": (r"\d+(?:\.\d+)?", 0, 100)}
    known["inc"] = (r"\d+", 1, 1)
    values: dict[str, float] = {"m": 10, "n": 2, "mstd": 0.0, "inc": 0}
    seen = set()
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(.*)", part)
        key = match[1] if match else ""
        if not match or key not in known:
            raise UserError(
                f"part {part!r} of RandAugment's string {text!r} is not known: m, n, mstd and inc "
                "are, like rand-m7-n4-mstd0.5-inc1"
            )
        pattern, low, high = known[key]
        if key in seen or not re.fullmatch(pattern, match[2]):
            raise UserError(
                f"part {part!r} of RandAugment's string {text!r} must stand there once and have a "
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
            f"RandAugment's string {text!r} asks for operations that do not grow with the "
            "magnitude, which do not exist here: end it with -inc1"
        )
    return RandAugment(int(values["m"]), int(values["n"]), values["mstd"])


def operation(name: str, magnitude: int | float, sign: int) -> Operation:
    """Gives an operation at a magnitude of 0 to 10; some go both ways, by the sign 1 or -1."""
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
    """Applies operations one after the other to all frames.

    The values are Pillow's. Where a rotated frame is cut, coordinates are rounded otherwise in
    their thirteenth decimal, which changed none of 1.6 * 10^8 values.

    Args:
      fill: colour of what comes in from outside.
      box: the part of the frames to give, for what is cropped later; None for all. Only what
        becomes of it, or decides on its colours, is computed.

    Returns:
      The frames in `box`; may share memory with `clip`.
    """
    frame = Box(0, 0, *clip.shape[1:3])
    # What each operation has to give, known from the last one back to the first.
    wanted = [box or frame]
    for one in reversed(operations):
        wanted.append(_source(one, frame, wanted[-1]))
    held = wanted.pop()
    clip = held.cut(clip, frame)
    for one in operations:
        target = wanted.pop()
        clip = _apply(one, clip, frame, held, target, fill)
        held = target
    return clip


def _source(one: Operation, frame: Box, wanted: Box) -> Box:
    """The part of the frames that an operation needs to give the part `wanted`."""
    match one.name:
        case "AutoContrast" | "Equalize" | "Contrast":
            return frame
        case "Sharpness":
            top, left = max(wanted.top - 1, 0), max(wanted.left - 1, 0)
            bottom = min(wanted.top + wanted.height + 1, frame.height)
            right = min(wanted.left + wanted.width + 1, frame.width)
            return Box(top, left, bottom - top, right - left)
        case "Rotate":
            return image_ops.rotate_source(one.argument, frame, wanted)
        case "ShearX" | "TranslateX":
            return image_ops.shift_source(_shifts(one, frame, wanted), frame, wanted)
        case "ShearY" | "TranslateY":
            turned, lying = _turn(frame), _turn(wanted)
            return _turn(image_ops.shift_source(_shifts(one, turned, lying), turned, lying))
    return wanted


def _apply(one: Operation, clip: Clip, frame: Box, held: Box, wanted: Box, fill: Colour) -> Clip:
    """Gives the part `wanted` of the frames of whose last state `clip` has the part `held`."""
    name, argument = one
    match name:
        case "Rotate":
            return image_ops.rotate(clip, argument, frame, held, wanted, fill)
        case "ShearX" | "TranslateX":
            shifts = _shifts(one, frame, wanted)
            return image_ops.shift_rows(clip, shifts, frame, held, wanted, fill)
        case "ShearY" | "TranslateY":
            frame, held, wanted = _turn(frame), _turn(held), _turn(wanted)
            shifts = _shifts(one, frame, wanted)
            clip = image_ops.transposed(clip)
            clip = image_ops.shift_rows(clip, shifts, frame, held, wanted, fill)
            return image_ops.transposed(clip)
        case "Color":
            return image_ops.color(clip, argument)
        case "Sharpness":
            return image_ops.sharpness(clip, argument, held, wanted)
    return image_ops.look_up(wanted.cut(clip, held), _table(name, argument, clip))


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
    raise ValueError(f"there is no operation {name!r}: they are {', '.join(OPERATIONS)}")


def _shifts(one: Operation, frame: Box, wanted: Box) -> np.ndarray:
    """By how many pixels the rows of `wanted` are moved; columns lie as rows of turned boxes."""
    if one.name.startswith("Shear"):
        return one.argument * (np.arange(wanted.top, wanted.top + wanted.height) + 0.5)
    return np.full(wanted.height, one.argument * frame.width)


def _turn(box: Box) -> Box:
    """The box in transposed frames."""
    return Box(box.left, box.top, box.width, box.height)
