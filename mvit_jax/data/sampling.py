"""Which frames of a video make a clip.

Frame numbers refer to the video's own frames in order of presentation. Clip lengths are stated
at 30 frames a second, as in the papers: T frames at stride tau span T * tau / 30 seconds, which
are more or fewer source frames when the video has another rate (Fan et al. 2021, section 4;
Kinetics recipe of PySlowFast).
"""

import numpy as np
from jaxtyping import Int64

FRAME_RATE = 30.0
"""Frames a second at which clip lengths are counted."""


def train_indices(
    num_frames: int, fps: float, *, frames: int, stride: int, rng: np.random.Generator
) -> Int64[np.ndarray, " frames"]:
    """Draws one training clip: a uniformly random real start, then frames at even distances.

    Args:
      num_frames: frames of the video, at least 1.
      fps: frames a second of the video.
      frames: T, frames of the clip.
      stride: tau, distance of neighbouring frames at 30 frames a second.
      rng: gives one uniform draw.

    Returns:
      Non-decreasing frame numbers in `range(num_frames)`; the last frame is repeated where the
      video is shorter than the clip.
    """
    length = span(fps, frames, stride)
    return spread(rng.uniform(0.0, max(num_frames - length, 0.0)), length, frames, num_frames)


def view_indices(
    num_frames: int, fps: float, *, frames: int, stride: int, clips: int
) -> Int64[np.ndarray, "clips frames"]:
    """Gives the clips of the test protocol: starts spread evenly over the video.

    Clip k of K starts at k * floor(delta / (K - 1)), a single clip at floor(delta / 2), where
    delta is the number of source frames that a clip leaves over.

    Args and returns as for `train_indices`, one row per clip.
    """
    length = span(fps, frames, stride)
    delta = max(num_frames - length, 0.0)
    if clips == 1:
        starts = [delta // 2]
    else:
        starts = [clip * (delta // (clips - 1)) for clip in range(clips)]
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
