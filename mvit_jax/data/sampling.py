"""Frame sampling: the settings of clips, and the frame numbers of training and test clips.

Frames are numbered in presentation order. The three samplings are those of PySlowFast's data sets,
with which the published weights were trained:

- "span" (Kinetics): T frames, evenly spaced over the duration of T * tau frames at 30 frames per
  second. At another frame rate, this span has more or fewer source frames (Fan et al. 2021,
  section 4). `nearest_frames` makes it the same duration at a variable frame rate.
- "segments" (Something-Something v2): one frame from each of T equal segments of the whole video.
- "stride" (Charades): every tau-th frame, whatever the frame rate.

Clips of AVA have their own: "key_frame", every tau-th frame around a key frame.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from mvit_jax.common.errors import UserError
from mvit_jax.data import augmentation
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.media.images import Footage
from mvit_jax.data.media.video import Video

Sampling = Literal["span", "segments", "stride", "key_frame"]

FRAME_RATE = 30.0
"""Frame rate at which the length of a span is T * tau frames."""


@dataclass(frozen=True)
class ClipSettings:
    """Frame sampling, size and augmentation of clips.

    Attributes:
      frames: T, frames of a clip; 1 for images, which are image files or frames of videos.
      stride: tau, temporal stride between neighbouring frames, see the module.
      size: side of the square clip in pixels.
      short_side: short side in pixels to which test frames are scaled for a single crop. For three
        crops the short side is `size`, as in the released code.
      sampling: sampling of a clip's frames, see `train_indices`.
      interpolation: interpolation of test frames, "bilinear" as for video or "bicubic" as for
        ImageNet; see `augmentation.resize`.
      full_frame: tests boxes in the whole frame instead of the square.
      whole: scales whole test frames to the square instead of cropping; the "resize" column of
        MViTv2's tables.
      augmentation: augmentation of training clips.

    Raises:
      UserError: `short_side` or the lower bound of `augmentation.jitter` is smaller than `size`.
    """

    frames: int
    stride: int
    size: int
    short_side: int
    sampling: Sampling = "span"
    interpolation: augmentation.Interpolation = "bilinear"
    full_frame: bool = False
    whole: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.short_side < self.size:
            raise UserError(
                f"crops of {self.size} pixels cannot be cut from frames whose short side is "
                f"{self.short_side}: raise the short side or lower the size"
            )
        jitter = self.augmentation.jitter
        if jitter is not None and jitter[0] < self.size:
            raise UserError(
                f"crops of {self.size} pixels cannot be cut from frames whose short side may be "
                f"{jitter[0]}: raise the lower bound of the jitter or lower the size"
            )

    def view_indices(self, video: Footage, clips: int) -> Int64[np.ndarray, "clips frames"]:
        """Returns the frame numbers of the test protocol's clips, see `view_indices`."""
        indices = view_indices(
            video.num_frames,
            video.fps,
            frames=self.frames,
            stride=self.stride,
            sampling=self.sampling,
            clips=clips,
        )
        return self.by_time(video, indices)

    def by_time(
        self, video: Footage, indices: Int64[np.ndarray, "*shape"]
    ) -> Int64[np.ndarray, "*shape"]:
        """Replaces frame numbers at the average rate by the frames presented at these times.

        Strided clips count frames, whatever their times.
        """
        if self.sampling == "stride" or not isinstance(video, Video):
            return indices
        return nearest_frames(indices, video.fps, video.seconds)


def train_indices(
    num_frames: int,
    fps: float,
    *,
    frames: int,
    stride: int,
    rng: np.random.Generator,
    sampling: Sampling = "span",
) -> Int64[np.ndarray, " frames"]:
    """Draws the frame numbers of one training clip.

    A span starts at a uniformly random real number. For segments, each frame is uniformly random
    within its segment, both ends included. A clip of stride tau starts at a uniformly random frame.
    If the strided clip is longer than the video, its start is uniformly random among those with
    which the clip covers the whole video.

    Args:
      num_frames: frames of the video, at least 1.
      fps: frame rate of the video; used by spans only.
      frames: T, frames of the clip.
      stride: tau, distance between neighbouring frames, for a span at 30 frames per second; unused
        by segments.
      rng: random generator; T numbers are drawn for segments, otherwise one.
      sampling: kind of sampling.

    Returns:
      Non-decreasing frame numbers in `range(num_frames)`. If the video is too short, a span repeats
      the last frame, a strided clip repeats the first and the last frame, and segments share
      frames.
    """
    if sampling == "segments":
        return rng.integers(*segments(num_frames, frames), endpoint=True)
    if sampling == "stride":
        delta = num_frames - _strided_length(frames, stride)
        start = rng.integers(min(delta, 0), max(delta, 0), endpoint=True)
        return _strided_indices(int(start), stride, frames, num_frames)
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
    """Returns the frame numbers of the test protocol's clips, spread evenly over the video.

    Let K be `clips`, and delta the number of source frames minus the length of a clip, at least 0.
    Clip k, counted from 0, starts at

    - k * floor(delta / (K - 1)) for spans,
    - round(k * delta / (K - 1)) for strided clips, with halves rounded to even,
    - floor(delta / 2), the middle, if K is 1. (PySlowFast has no single strided clip, as it divides
      by K - 1.)

    Sampling by segments has one clip, of the middle frame of each segment.

    Arguments and result are as for `train_indices`, with one row per clip.

    Raises:
      UserError: `clips` is above 1 for segments.
    """
    if sampling == "segments":
        if clips != 1:
            raise UserError(
                f"{clips} clips per video are configured, but data.sampling=segments samples one "
                "clip: set eval.clips=1 or another data.sampling"
            )
        first, last = segments(num_frames, frames)
        return ((first + last) // 2)[None]
    if sampling == "stride":
        delta = max(num_frames - _strided_length(frames, stride), 0)
        starts = [delta // 2]
        if clips > 1:
            starts = [round(delta / (clips - 1) * clip) for clip in range(clips)]
        return np.stack([_strided_indices(start, stride, frames, num_frames) for start in starts])
    length = span(fps, frames, stride)
    delta = max(num_frames - length, 0.0)
    distance = delta // max(clips - 1, 1)
    starts = [delta // 2] if clips == 1 else [clip * distance for clip in range(clips)]
    return np.stack([spread(start, length, frames, num_frames) for start in starts])


def span(fps: float, frames: int, stride: int) -> float:
    """Returns the length of a span in source frames."""
    return stride * frames * fps / FRAME_RATE


def spread(
    start: float, length: float, frames: int, num_frames: int
) -> Int64[np.ndarray, " frames"]:
    """Returns the frame numbers of a clip over `length` source frames from `start` on."""
    # The clip's last frame is the last of the span. The distance between frames is therefore
    # (length - 1) / (T - 1), a little more than the stride: 63 / 15 = 4.2 for 16x4. The published
    # weights were trained and tested in this way.
    last = start + max(length - 1, 0)  # at below half a frame per second, spans have no frame
    indices = np.linspace(start, last, frames).astype(np.int64)
    return np.clip(indices, 0, num_frames - 1)


def nearest_frames(
    indices: Int64[np.ndarray, "*shape"], fps: float, seconds: Float64[np.ndarray, " frames"]
) -> Int64[np.ndarray, "*shape"]:
    """Returns the frames of a variable frame rate that are presented nearest to a constant rate's.

    Frames at a constant rate, or less than half a frame off, are their own nearest.

    Args:
      indices: frame numbers at the constant rate `fps`.
      fps: average frames per second of the video.
      seconds: presentation time of each of its frames, from 0 on, ascending.
    """
    return np.searchsorted((seconds[1:] + seconds[:-1]) / 2, indices / fps, side="right")


def segments(
    num_frames: int, frames: int
) -> tuple[Int64[np.ndarray, " frames"], Int64[np.ndarray, " frames"]]:
    """Returns the first and last frame of each equal segment; neighbours share a frame."""
    edges = np.rint((num_frames - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    return edges[:-1], edges[1:]


def _strided_length(frames: int, stride: int) -> int:
    return (frames - 1) * stride + 1


def _strided_indices(start: int, stride: int, frames: int, num_frames: int) -> np.ndarray:
    return np.clip(start + stride * np.arange(frames), 0, num_frames - 1)
