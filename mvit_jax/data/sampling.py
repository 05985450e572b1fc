"""Which frames of a video make a clip.

Frame numbers refer to the video's own frames in order of presentation. There are three samplings,
those by which the published weights were trained (PySlowFast's data sets):

- "span" (Kinetics): evenly over T * tau frames at 30 frames a second, which are more or fewer
  source frames when the video has another rate (Fan et al. 2021, section 4).
- "segments" (Something-Something v2): one frame of each of T equal parts of the whole video.
- "stride" (Charades): each tau-th frame, whatever the rate.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int64

from mvit_jax.common.errors import UserError

Sampling = Literal["span", "segments", "stride"]

FRAME_RATE = 30.0
"""Frames a second at which the lengths of spans are counted."""


def train_indices(
    num_frames: int,
    fps: float,
    *,
    frames: int,
    stride: int,
    rng: np.random.Generator,
    sampling: Sampling = "span",
) -> Int64[np.ndarray, " frames"]:
    """Draws one training clip.

    A span starts at a uniformly random real number. Of segments, each frame is uniformly random
    within its own, both ends included. A clip of stride tau starts at a uniformly random frame;
    where it is longer than the video, anywhere that has all of the video in it.

    Args:
      num_frames: frames of the video, at least 1.
      fps: frames a second of the video; only of spans.
      frames: T, frames of the clip.
      stride: tau, distance of neighbouring frames, of a span at 30 frames a second; not of
        segments.
      rng: gives one draw, of segments T.
      sampling: which frames.

    Returns:
      Non-decreasing frame numbers in `range(num_frames)`. What a span lacks in a shorter video is
      filled up with the last frame, what a clip of stride tau lacks on both sides with the first
      and the last; segments of less than a frame share frames.
    """
    if sampling == "segments":
        return rng.integers(*segments(num_frames, frames), endpoint=True)
    if sampling == "stride":
        room = num_frames - _reach(frames, stride)
        start = rng.integers(min(room, 0), max(room, 0), endpoint=True)
        return _strided(int(start), stride, frames, num_frames)
    length = span(fps, frames, stride)
    return spread(rng.uniform(0.0, max(num_frames - length, 0.0)), length, frames, num_frames)


def view_indices(
    num_frames: int,
    fps: float,
    *,
    frames: int,
    stride: int,
    clips: int,
    sampling: Sampling = "span",
) -> Int64[np.ndarray, "clips frames"]:
    """Gives the clips of the test protocol: starts spread evenly over the video.

    Clip k of K starts, where delta is the number of source frames that a clip leaves over,

    - as a span at k * floor(delta / (K - 1)),
    - with a stride at round(k * delta / (K - 1)), halves to the even number,
    - and a single one of either kind in the middle, at floor(delta / 2). (With a stride PySlowFast
      has no single clip: it divides by K - 1.)

    Segments give one clip, of the middle frame of each.

    Args and returns as for `train_indices`, one row per clip.

    Raises:
      UserError: several clips of segments.
    """
    if sampling == "segments":
        if clips != 1:
            raise UserError(
                f"{clips} clips of a video were asked for, but frames sampled by segments make one "
                "clip of the whole video: set eval.clips=1, or another data.sampling"
            )
        first, last = segments(num_frames, frames)
        return ((first + last) // 2)[None]
    if sampling == "stride":
        room = max(num_frames - _reach(frames, stride), 0)
        starts = [room // 2]
        if clips > 1:
            starts = [round(room / (clips - 1) * clip) for clip in range(clips)]
        return np.stack([_strided(start, stride, frames, num_frames) for start in starts])
    length = span(fps, frames, stride)
    delta = max(num_frames - length, 0.0)
    apart = delta // max(clips - 1, 1)
    starts = [delta // 2] if clips == 1 else [clip * apart for clip in range(clips)]
    return np.stack([spread(start, length, frames, num_frames) for start in starts])


def span(fps: float, frames: int, stride: int) -> float:
    """Source frames that a clip takes up."""
    return stride * frames * fps / FRAME_RATE


def spread(
    start: float, length: float, frames: int, num_frames: int
) -> Int64[np.ndarray, " frames"]:
    """Frame numbers of the clip that starts at `start` and takes up `length` source frames."""
    # The span counts frames and the last frame is at its end, so the distance between frames is
    # (span - 1) / (T - 1), a little more than the stride: 63 / 15 = 4.2 for 16x4. Published
    # weights were trained and tested with it.
    indices = np.linspace(start, start + length - 1, frames).astype(np.int64)
    return np.clip(indices, 0, num_frames - 1)


def segments(
    num_frames: int, frames: int
) -> tuple[Int64[np.ndarray, " frames"], Int64[np.ndarray, " frames"]]:
    """First and last frame of each of `frames` equal parts; neighbours share a frame."""
    edges = np.rint((num_frames - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    return edges[:-1], edges[1:]


def _reach(frames: int, stride: int) -> int:
    return (frames - 1) * stride + 1


def _strided(start: int, stride: int, frames: int, num_frames: int) -> np.ndarray:
    return np.clip(start + stride * np.arange(frames), 0, num_frames - 1)
