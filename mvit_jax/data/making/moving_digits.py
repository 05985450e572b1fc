"""Moving digits: handwritten digits in H.264 files, with labels that depend on motion alone.

The eight classes form four pairs, each class of a pair being the other played backwards: left and
right, up and down, clockwise and counter_clockwise, growing and shrinking. Each video has a phase
that changes at constant velocity. The phase drives the position (with wrap-around at the edges of
the frame), the angle, or the logarithm of the size (which jumps back at the end of its range). The
phase of the first frame is uniformly random, and the classes of a pair differ only in the sign of
the velocity. So single frames have the same distribution in both classes of a pair, and shuffled
frames reveal at best the pair. A horizontal flip turns left into right and clockwise into
counter_clockwise, so flips do not preserve the labels.
"""

import dataclasses
import functools
import os

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from mvit_jax.data.making.made_videos import (
    HANDWRITING,
    encode,
    handwriting,
    open_folder,
    write_missing,
    write_videos,
)

# Recorded in `prepare.json`; increases whenever the same seed gives other videos.
VERSION = 1

SIZE = 64  # px, both sides of a frame
# More than the 32 frames of a clip of 8 frames with stride 4, so that a video's views differ.
LENGTHS = (40, 56)  # frames, both ends included
SIDES = (16.0, 44.0)  # px, range of growing and shrinking digits

# The parameter driven by the phase, and the sign of the velocity. The y axis points down, so
# positive angles turn clockwise.
CLASSES = {
    "left": ("x", -1),
    "right": ("x", 1),
    "up": ("y", -1),
    "down": ("y", 1),
    "clockwise": ("angle", 1),
    "counter_clockwise": ("angle", -1),
    "growing": ("side", 1),
    "shrinking": ("side", -1),
}

# Cycles per frame: fast enough to show in 32 frames, slow enough to follow at a stride of 4. Digits
# move 2.4 to 6 px or 10 to 24 degrees in 4 frames. Sizes change by a factor of 1.65 to 2.2 in 32
# frames, with at most one jump.
SPEEDS = {
    "x": (0.6 / SIZE, 1.5 / SIZE),
    "y": (0.6 / SIZE, 1.5 / SIZE),
    "angle": (2.5 / 360, 6 / 360),
    "side": (1 / 64, 1 / 41),
}

_CELL = 8  # px of the enlarged digit for each px of the handwriting
_MARGIN = 2  # px of padding around the handwriting, for the interpolation at its edges


@dataclasses.dataclass(frozen=True)
class Scene:
    """The random parameters of one video, from which `render` makes the frames.

    `driven` names the parameter among `x`, `y`, `angle` and `side` that the phase drives. The other
    three are constant: `x`, `y` in px right of and below the frame's centre, `angle` in
    degrees clockwise, `side` in px for the 8 px of handwriting.
    """

    driven: str
    start: float  # phase of the first frame, cycles
    velocity: float  # cycles per frame, negative for one class of each pair
    digit: Float[np.ndarray, "8 8"]  # ink, 0 to 1
    x: float
    y: float
    angle: float
    side: float
    brightness: float  # grey level of full ink, 0 to 255
    background: Float32[np.ndarray, "height width"]  # grey levels
    noise: Float32[np.ndarray, "time height width"]  # grey levels, added to the frames


def draw(label: int, digits: Float[np.ndarray, "digits 8 8"], rng: np.random.Generator) -> Scene:
    """Draws a scene of class `label` (0 to 7, as in `CLASSES`) with one of `digits`.

    For equal `rng`, the classes of a pair differ only in the velocity's sign.
    """
    driven, sign = list(CLASSES.values())[label]
    length = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    level, spread = rng.uniform(25, 70), rng.uniform(5, 20)
    texture = rng.normal(level, spread, size=(8, 8)).astype(np.float32)
    noise = rng.standard_normal((length, SIZE, SIZE), dtype=np.float32)
    return Scene(
        driven=driven,
        start=rng.uniform(),
        velocity=sign * rng.uniform(*SPEEDS[driven]),
        digit=digits[rng.integers(len(digits))],
        x=rng.uniform(-8, 8),
        y=rng.uniform(-8, 8),
        angle=rng.uniform(-20, 20),
        side=rng.uniform(24, 36),
        brightness=level + rng.uniform(110, 180),
        background=cv2.resize(texture, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
        noise=noise * np.float32(rng.uniform(2, 6)),
    )


def render(scene: Scene) -> UInt8[np.ndarray, "time height width"]:
    """Renders the frames of a scene in grey levels 0 to 255, one per frame of its noise."""
    time = np.arange(len(scene.noise))
    phase = (scene.start + scene.velocity * time) % 1
    poses = {name: np.full(len(time), getattr(scene, name)) for name in SPEEDS}
    poses[scene.driven] = {
        "x": SIZE * phase,
        "y": SIZE * phase,
        "angle": 360 * phase,
        "side": SIDES[0] * (SIDES[1] / SIDES[0]) ** phase,
    }[scene.driven]
    paper = np.pad(scene.digit.astype(np.float32), _MARGIN)
    large = cv2.resize(paper, None, fx=_CELL, fy=_CELL, interpolation=cv2.INTER_CUBIC)
    ink = np.stack([_place(large, *pose) for pose in zip(*poses.values(), strict=True)])
    ink = np.clip(ink, 0, 1)
    frames = scene.background + ink * (scene.brightness - scene.background) + scene.noise
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _place(
    large: Float32[np.ndarray, "rows columns"], x: float, y: float, angle: float, side: float
) -> Float32[np.ndarray, "height width"]:
    """Rotates, scales and moves an enlarged digit in a frame with wrap-around edges."""
    middle = (len(large) - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), -angle, side / (8 * _CELL))
    column, row = np.floor(x), np.floor(y)
    matrix[:, 2] += (SIZE - 1) / 2 - middle + np.array([x - column, y - row])
    # The centred digit lies inside the frame, so rolling wraps it exactly.
    centred = cv2.warpAffine(large, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    return np.roll(centred, (int(row), int(column)), axis=(0, 1))


def video(seed: int, split: str, index: int) -> bytes:
    """Makes the mp4 file of a video, whose label is `index` modulo 8.

    The file depends on the arguments alone.
    """
    rng = np.random.default_rng((seed, 1 + list(HANDWRITING).index(split), index))
    return encode(render(draw(index % len(CLASSES), handwriting(seed)[split], rng)))


def prepare(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    train_videos: int = 2000,
    val_videos: int = 200,
    test_videos: int = 400,
) -> None:
    """Writes the data set into the folder `out`, or resumes an interrupted run.

    The folder has `videos/SPLIT/00000.mp4` and so on; `train.csv`, `val.csv` and `test.csv` with a
    line "path label" per video, the path relative to `out`; `labels.txt` with the name of class n
    in line n, counted from 0; and `prepare.json` with the settings. The lists are written last.
    Every file is written atomically. A video depends only on the seed, its split and its index.

    Raises:
      UserError: a split has fewer videos than classes, `seed` is negative, or `out` cannot be a
        folder, has other files, or was prepared with other settings.
    """
    counts = {"train": train_videos, "val": val_videos, "test": test_videos}
    folder = open_folder(out, "moving_digits", VERSION, seed, counts, len(CLASSES))
    paths = {
        (split, index): f"videos/{split}/{index:05d}.mp4"
        for split, count in counts.items()
        for index in range(count)
    }
    write_videos(
        "moving_digits",
        {folder / path: functools.partial(video, seed, *key) for key, path in paths.items()},
        seed,
    )
    lists = {
        f"{split}.csv": "".join(
            f"{path} {index % len(CLASSES)}\n" for (of, index), path in paths.items() if of == split
        )
        for split in counts
    }
    write_missing(folder, lists | {"labels.txt": "".join(f"{name}\n" for name in CLASSES)})
