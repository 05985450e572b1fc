"""Moving digits: real handwriting, real H.264 files, and labels that only motion gives.

Eight classes in four pairs, each pair the other played backwards: left and right, up and down,
clockwise and counter_clockwise, growing and shrinking. A motion is a phase that turns at a
constant velocity: a position on the torus of the frame, an angle, or the logarithm of a size that
jumps back at its end. The phase of the first frame is uniform and the classes of a pair differ in
the velocity's sign alone, so every single frame has the same distribution in both, and a clip
whose frames are shuffled tells at best the pair. Mirroring a clip left to right turns left into
right and clockwise into counter_clockwise: flips do not keep the labels.

The handwriting is scikit-learn's: 1,797 digits of 8x8 pixels, of which each split has its own.
"""

import concurrent.futures
import dataclasses
import functools
import io
import json
import os
import pathlib

import av
import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import write_whole
from mvit_jax.common.progress import shown

# Part of what `prepare.json` records: goes up whenever the same seed gives other videos.
VERSION = 1

SIZE = 64  # px, both sides of a frame
FRAME_RATE = 30  # frames per second
# A clip of 8 frames with stride 4 spans 32 frames, so that several views of a video differ.
LENGTHS = (40, 56)  # frames, both ends included
SIDES = (16.0, 44.0)  # px, between which growing and shrinking digits jump

# What the phase drives, and the sign of its velocity. Rows grow downwards, so a positive angle
# turns clockwise as seen.
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

# Cycles per frame, fast enough for a span of 32 frames and slow enough for a stride of 4: over
# 4 frames 2.4 to 6 px or 10 to 24 degrees; sizes change 1.65 to 2.2 fold in 32 frames, with at
# most one jump.
SPEEDS = {
    "x": (0.6 / SIZE, 1.5 / SIZE),
    "y": (0.6 / SIZE, 1.5 / SIZE),
    "angle": (2.5 / 360, 6 / 360),
    "side": (1 / 64, 1 / 41),
}

# Digits that each split has for itself, out of 1,797.
HANDWRITING = {"train": 1297, "val": 200, "test": 300}

_CELL = 8  # px of the enlarged digit per px of the handwriting
_MARGIN = 2  # px of empty paper around the handwriting, into which its edges fade


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that is drawn at random of one video; `render` makes its frames.

    `x`, `y` (px right of and below the frame's centre), `angle` (degrees clockwise) and `side`
    (px that the 8 px of handwriting take) hold where they stand still; `driven` names the one of
    them that follows the phase instead.
    """

    driven: str
    start: float  # phase of the first frame, cycles
    velocity: float  # cycles per frame, negative for every second class of a pair
    digit: Float[np.ndarray, "8 8"]  # ink, 0 to 1
    x: float
    y: float
    angle: float
    side: float
    brightness: float  # grey level of full ink, 0 to 255
    background: Float32[np.ndarray, "height width"]  # grey levels
    noise: Float32[np.ndarray, "time height width"]  # grey levels, added to the frames


@functools.cache
def handwriting(seed: int) -> dict[str, Float[np.ndarray, "digits 8 8"]]:
    """The digits of each split, ink 0 to 1, by a permutation that `seed` gives; none twice."""
    # Takes a second, which a folder that is finished already should not cost.
    from sklearn.datasets import load_digits

    images = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8) / 16
    # Entropy is padded with zeros, so (seed, 0) is apart from all (seed, split from 1, index).
    order = np.random.default_rng((seed, 0)).permutation(len(images))
    parts = np.split(images[order], np.cumsum(list(HANDWRITING.values()))[:-1])
    return dict(zip(HANDWRITING, parts, strict=True))


def draw(label: int, digits: Float[np.ndarray, "digits 8 8"], rng: np.random.Generator) -> Scene:
    """Draws a scene of class `label` (0 to 7, as in `CLASSES`) with one of `digits`.

    Classes of a pair take the same numbers from `rng`, and differ in the velocity's sign alone.
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
    """The frames of a scene, grey levels 0 to 255, one for each frame of its noise."""
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
    """An enlarged digit turned, scaled and moved in a frame whose opposite edges are joined."""
    middle = (len(large) - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), -angle, side / (8 * _CELL))
    column, row = np.floor(x), np.floor(y)
    matrix[:, 2] += (SIZE - 1) / 2 - middle + np.array([x - column, y - row])
    # In the frame's middle the whole digit is inside, so that rolling wraps it exactly.
    centred = cv2.warpAffine(large, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    return np.roll(centred, (int(row), int(column)), axis=(0, 1))


def encode(frames: UInt8[np.ndarray, "time height width"]) -> bytes:
    """An mp4 file of grey frames: H.264, yuv420p, 30 frames per second, each frame intra-coded.

    Backwards frames decode to exactly the backwards video. The same frames give the same bytes
    wherever PyAV brings the same x264.
    """
    # Frames predicted from their neighbours keep traces of them: of files with x264's defaults,
    # one decoded frame told left from right to a forest of trees in 76 % of videos; of these
    # files in 49 %. Rate control, too, looks at the frames before; a constant quantiser does not.
    options = {"g": "1", "qp": "30"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=options)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        # More threads would make the bytes depend on the number of cores.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))
    return file.getvalue()


def video(seed: int, split: str, index: int) -> bytes:
    """The mp4 file of one video, a function of its arguments; its label is `index` modulo 8."""
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
    """Writes the data set into the folder `out`, or what an interrupted run has left to write.

    `videos/SPLIT/00000.mp4` and so on; `train.csv`, `val.csv` and `test.csv` with a line
    "path label" for each video, the path relative to `out`; `labels.txt` with the name of class n
    in line n, counted from 0; `prepare.json`, what the folder was made with. The lists are
    written last, every file under its final name is whole, and each video depends on nothing but
    the seed, its split and its number.

    Raises:
        UserError: a split of fewer videos than classes, a negative seed, an `out` that cannot be
            a folder, holds other files, or was prepared with other values.
    """
    out = pathlib.Path(out).expanduser()
    counts = {"train": train_videos, "val": val_videos, "test": test_videos}
    for split, count in counts.items():
        if count < len(CLASSES):
            raise UserError(
                f"{split}_videos={count} leaves classes without a video: give at least "
                f"{len(CLASSES)}"
            )
    if seed < 0:
        raise UserError(f"seed={seed} is negative: give a whole number from 0 on")
    _claim(
        out,
        {"name": "moving_digits", "version": VERSION, "seed": seed}
        | {f"{split}_videos": count for split, count in counts.items()},
    )
    for left in out.rglob(".*.[0-9]*"):  # by a run that was killed: see `write_whole`
        left.unlink()
    paths = {
        (split, index): f"videos/{split}/{index:05d}.mp4"
        for split, count in counts.items()
        for index in range(count)
    }
    missing = [key for key, path in paths.items() if not (out / path).exists()]
    if missing:
        for split in counts:
            (out / "videos" / split).mkdir(parents=True, exist_ok=True)
        _write_videos({key: out / paths[key] for key in missing}, seed, len(paths))
    lists = {
        f"{split}.csv": "".join(
            f"{path} {index % len(CLASSES)}\n" for (of, index), path in paths.items() if of == split
        )
        for split in counts
    }
    lists["labels.txt"] = "".join(f"{name}\n" for name in CLASSES)
    for name, content in lists.items():
        if not (out / name).exists():
            write_whole(out / name, content)


def _claim(out: pathlib.Path, wanted: dict[str, str | int]) -> None:
    """Makes `out` this data set's folder, or checks that it is the one that is `wanted`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(
            f"{out} cannot be used as a folder ({error}): give another folder"
        ) from None
    record = out / "prepare.json"
    if record.name not in found:
        others = [name for name in found if not name.startswith(f".{record.name}.")]
        if others:
            raise UserError(
                f"{out} holds other files ({', '.join(others[:3])}): give a new or empty folder"
            )
        write_whole(record, json.dumps(wanted, indent=2) + "\n")
        return
    try:
        made_with = dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        raise UserError(
            f"{record} is not a record of a prepared data set: delete {out} or give another folder"
        ) from None
    for key, value in wanted.items():
        if made_with.get(key) != value:
            raise UserError(
                f"{out} was prepared with {key}={made_with.get(key)}, not {key}={value}: ask for "
                f"the former, delete the folder, or give another folder"
            )


def _write_videos(missing: dict[tuple[str, int], pathlib.Path], seed: int, total: int) -> None:
    """Writes videos in two threads, for numpy, OpenCV and x264 work outside Python's lock."""
    handwriting(seed)  # once, before threads ask for it together
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(lambda key=key, path=path: write_whole(path, video(seed, *key)))
            for key, path in missing.items()
        ]
        done = total - len(jobs)
        try:
            for job in shown("moving_digits", concurrent.futures.as_completed(jobs), total, done):
                job.result()
        except BaseException:
            # Else leaving the pool would wait for every video that is still queued.
            pool.shutdown(cancel_futures=True)
            raise
