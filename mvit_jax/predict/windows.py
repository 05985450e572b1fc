"""Windows over a long video, and what a model says of it over time.

A model sees one clip of T frames at stride tau, T * tau / 30 seconds. The K clips of the test
protocol, laid end to end, cover K of those; of a longer video they leave out moments, and their
mean says of no moment what it shows. Such a video is read in windows, each half a clip after the
one before, so that every moment but the first and last half clip is seen twice.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt8

from mvit_jax.data import pipeline, sampling
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.video import Video

FEWEST = 4
"""Clip lengths up to which a video is short, whatever the protocol: few windows tell little."""

SECONDS_OF_AN_IMAGE = 1.0
"""What one frame stands for where a model takes images: the second that it is the middle of."""


class Windows(NamedTuple):
    """Where clips lie in a video."""

    indices: Int64[np.ndarray, "windows frames"]  # frame numbers
    starts: Float[np.ndarray, " windows"]  # seconds; they rise, and so do the ends
    ends: Float[np.ndarray, " windows"]


def is_long(num_frames: int, fps: float, *, frames: int, stride: int, clips: int) -> bool:
    """Whether the test protocol's clips, end to end, are shorter than the video.

    Args:
      num_frames: of the video.
      fps: frames a second of the video.
      frames: T, frames of a clip; 1 for models of images.
      stride: tau, distance of neighbouring frames at 30 frames a second.
      clips: K, clips of the test protocol; four at least are counted.
    """
    return num_frames > max(clips, FEWEST) * _length(fps, frames, stride)


def windows(num_frames: int, fps: float, *, frames: int, stride: int) -> Windows:
    """Clips from a video's first frame to its last, each half a clip after the one before.

    The last one ends with the video. For models of images the windows are whole seconds, of which
    the frame in the middle is seen. Arguments as for `is_long`.
    """
    length = _length(fps, frames, stride)
    if frames == 1:
        starts = np.arange(0.0, num_frames, length)
        ends = np.append(starts[1:], num_frames)
        seen = np.minimum(starts + length / 2, num_frames - 1)
    else:
        hop, last = max(length / 2, 1.0), max(num_frames - length, 0.0)
        # Whole frames, as the starts of the test protocol are.
        starts = seen = np.floor(np.append(np.arange(0.0, last, hop), last))
        ends = np.append(starts[:-1] + length, num_frames)
    # The very function that places the clips of training and test.
    indices = [
        sampling.spread(start, sampling.span(fps, frames, stride), frames, num_frames)
        for start in seen
    ]
    return Windows(np.stack(indices), starts / fps, ends / fps)


def _length(fps: float, frames: int, stride: int) -> float:
    """Source frames of a window; at least one, however few a second has."""
    if frames == 1:
        return max(SECONDS_OF_AN_IMAGE * fps, 1.0)
    return max(sampling.span(fps, frames, stride), 1.0)


class Segment(NamedTuple):
    """A stretch over which the most probable class stays the same."""

    start: float  # seconds
    end: float
    label: int
    probability: float  # of that class, mean over the stretch


@dataclass(frozen=True)
class Timeline:
    """What a model says of each window of a video."""

    starts: Float[np.ndarray, " windows"]  # seconds; windows are in order and leave no gap
    ends: Float[np.ndarray, " windows"]
    probabilities: Float[np.ndarray, "windows classes"]

    def segments(self) -> list[Segment]:
        """The video in stretches of one class.

        A moment has the mean of the windows that see it, two as a rule, so that a window which
        falls between two scenes does not make a stretch of its own so easily.
        """
        edges = np.unique(np.concatenate([self.starts, self.ends]))
        # Windows are in order, so those that see a moment are neighbours.
        first = np.searchsorted(self.ends, edges[:-1], "right")
        behind = np.searchsorted(self.starts, edges[:-1], "right")
        sums = np.concatenate([np.zeros_like(self.probabilities[:1]), self.probabilities.cumsum(0)])
        moments = (sums[behind] - sums[first]) / (behind - first)[:, None]
        labels, lengths = moments.argmax(1), np.diff(edges)
        rows = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
        return [
            Segment(
                float(edges[row]),
                float(edges[end]),
                int(labels[row]),
                float(np.average(moments[row:end, labels[row]], weights=lengths[row:end])),
            )
            for row, end in itertools.pairwise(rows)
        ]


def clock(seconds: float) -> str:
    """Minutes and seconds as people write them: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clips_of(
    video: Video, indices: Int64[np.ndarray, "clips time"], settings: ClipSettings, crops: int
) -> Iterator[UInt8[np.ndarray, "crops time size size 3"]]:
    """The clips of these frames one after the other, scaled and cropped as by `pipeline.views`.

    Every frame is decoded once. What is held is the frames of one clip, at the model's size.

    Args:
      indices: frame numbers; no clip starts before the one before it.
      crops: squares cut from each clip, 1 or 3.

    Raises:
      DecodeError: while iterating, the file is broken.
    """
    decoded = video.in_order(np.unique(indices).tolist())
    held: dict[int, np.ndarray] = {}
    for clip in indices:
        held = {number: frame for number, frame in held.items() if number >= clip.min()}
        while clip.max() not in held:
            number, frame = next(decoded)
            held[number] = pipeline.crops_of(frame[None], settings, crops)
        yield np.concatenate([held[number] for number in clip.tolist()], axis=1)
