"""Shared parts of the made data sets of videos: handwriting, encoding, and resumable folders.

The handwriting is scikit-learn's: 1,797 digits of 8x8 pixels, disjoint between the splits.
"""

import concurrent.futures
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping

import av
import numpy as np
from jaxtyping import Float, Int, UInt8

from mvit_jax.common import extras
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded, write_atomically
from mvit_jax.common.progress import track

FRAME_RATE = 30  # frames per second

# Number of digits of each split, 1,797 in total.
HANDWRITING = {"train": 1297, "val": 200, "test": 300}


def handwriting(seed: int) -> dict[str, Float[np.ndarray, "digits 8 8"]]:
    """Splits the digits, ink 0 to 1, by a permutation from `seed`; the splits are disjoint."""
    return _shuffled(seed)[0]


def numerals(seed: int) -> dict[str, Int[np.ndarray, " digits"]]:
    """Returns the numerals, 0 to 9, that the digits of `handwriting(seed)` show."""
    return _shuffled(seed)[1]


@functools.cache
def _shuffled(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    # Imported here, since the import takes a second and a finished folder needs no digits.
    extras.require("sklearn")
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 8, 8) / 16
    # NumPy pads seeds with zeros: this is (seed, 0, 0). Videos have 1 or more in the middle.
    order = np.random.default_rng((seed, 0)).permutation(len(images))
    ends = np.cumsum(list(HANDWRITING.values()))[:-1]
    digits, shown = (
        dict(zip(HANDWRITING, np.split(each[order], ends), strict=True))
        for each in (images, np.asarray(targets))
    )
    return digits, shown


def encode(frames: UInt8[np.ndarray, "time height width *rgb"]) -> bytes:
    """Encodes grey or RGB frames as an mp4 file: H.264, yuv420p, 30 frames per second, intra-coded.

    Reversed frames decode to exactly the reversed video. The same frames give the same bytes with
    the same x264 in PyAV.
    """
    # Inter-predicted frames have traces of their neighbours. From one decoded frame, a random
    # forest separated left from right in 76 % of videos with x264's defaults, and in 49 % with
    # these options. Rate control also depends on earlier frames; a constant quantiser does not.
    options = {"g": "1", "qp": "30"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # More threads would make the bytes depend on the number of cores.
        stream.codec_context.thread_count = 1
        pixels = "gray" if frames.ndim == 3 else "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=pixels)))
        container.mux(stream.encode(None))
    return file.getvalue()


def open_folder(
    out: str | os.PathLike[str],
    name: str,
    version: int,
    seed: int,
    counts: Mapping[str, int],
    classes: int,
) -> pathlib.Path:
    """Returns the folder of a data set, which is new or has the same settings recorded.

    What a killed run left half-written is removed.

    Args:
      out: the folder.
      name: name of the data set.
      version: version of the data set, which increases when the same seed gives other videos.
      seed: seed of the data set.
      counts: number of videos of each split.
      classes: smallest number of videos of a split.

    Raises:
      UserError: a split has fewer videos than classes, `seed` is negative, or `out` cannot be a
        folder, has other files, or was prepared with other settings.
    """
    folder = expanded(out)
    for split, count in counts.items():
        if count < classes:
            raise UserError(
                f"{split}_videos={count} leaves classes without a video: give at least {classes}"
            )
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0")
    _record_settings(
        folder,
        {"name": name, "version": version, "seed": seed}
        | {f"{split}_videos": count for split, count in counts.items()},
    )
    for temporary in folder.rglob(".*.[0-9]*"):  # left by a killed run's `write_atomically`
        temporary.unlink()
    return folder


def _record_settings(out: pathlib.Path, settings: dict[str, str | int]) -> None:
    """Records the settings in `out`, or checks that `out` was prepared with equal settings."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(
            f"{out} cannot be used as a folder ({error}): give another folder"
        ) from None
    record = out / "prepare.json"
    if record.name not in names:
        foreign = [name for name in names if not name.startswith(f".{record.name}.")]
        if foreign:
            raise UserError(
                f"{out} holds other files ({', '.join(foreign[:3])}): give a new or empty folder"
            )
        write_atomically(record, json.dumps(settings, indent=2) + "\n")
        return
    try:
        recorded = dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        raise UserError(
            f"{record} is not a record of a prepared data set: delete {out} or give another folder"
        ) from None
    for key, value in settings.items():
        if recorded.get(key) != value:
            raise UserError(
                f"{out} was prepared with {key}={recorded.get(key)}, not {key}={value}: use the "
                f"same value, delete the folder, or give another folder"
            )


def write_videos(name: str, paths: Mapping[pathlib.Path, Callable[[], bytes]], seed: int) -> None:
    """Writes those files of `paths` that do not exist, each with the result of its function.

    Two threads write, as NumPy, OpenCV and x264 release Python's lock.

    Args:
      name: name of the data set, for the progress.
      paths: functions that make the files' contents.
      seed: seed of the handwriting.
    """
    missing = {path: make for path, make in paths.items() if not path.exists()}
    if not missing:
        return
    for folder in {path.parent for path in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    handwriting(seed)  # fills the cache before the threads need it
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(lambda path=path, make=make: write_atomically(path, make()))
            for path, make in missing.items()
        ]
        done = len(paths) - len(jobs)
        try:
            for job in track(name, concurrent.futures.as_completed(jobs), len(paths), done):
                job.result()
        except BaseException:
            # Otherwise leaving the pool would block until all queued videos are written.
            pool.shutdown(cancel_futures=True)
            raise


def write_missing(folder: pathlib.Path, contents: Mapping[str, str]) -> None:
    """Writes those text files that do not exist in `folder`, atomically."""
    for name, content in contents.items():
        if not (folder / name).exists():
            write_atomically(folder / name, content)
