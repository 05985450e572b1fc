"""Sliding windows over long videos, and predictions over time.

A clip of T frames at stride tau lasts T * tau / 30 seconds, and the test protocol takes K clips.
K clips do not cover a longer video, and their mean does not show changes over time. A longer video
is therefore read in windows, each as long as a clip, at a hop of half a clip. Most moments are then
in two windows.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt8

from mvit_jax.data import sampling
from mvit_jax.data.media.video import Video

FEWEST = 4
"""Number of clip lengths up to which a video is always short: a timeline needs more windows."""

SECONDS_OF_AN_IMAGE = 1.0
"""Length in seconds of an image model's window; the model sees the window's middle frame."""


class Windows(NamedTuple):
    """Positions of the windows in a video."""

    indices: Int64[np.ndarray, "windows frames"]  # frame numbers at the average rate
    starts: Float[np.ndarray, " windows"]  # seconds; starts and ends are increasing
    ends: Float[np.ndarray, " windows"]


def is_long(num_frames: int, fps: float, *, frames: int, stride: int, clips: int) -> bool:
    """Returns True if the video is longer than the test protocol's clips, laid end to end.

    Args:
      num_frames: of the video.
      fps: frames per second of the video.
      frames: T, frames of a clip; 1 for image models.
      stride: tau, temporal stride at 30 frames per second.
      clips: K, clips of the test protocol; less than `FEWEST` counts as `FEWEST`.
    """
    return num_frames > max(clips, FEWEST) * _length(fps, frames, stride)


def windows(num_frames: int, fps: float, *, frames: int, stride: int) -> Windows:
    """Returns windows that cover the video, each as long as a clip, at a hop of half a clip.

    The last window ends with the video. For image models, windows last a second and do not overlap,
    and the model sees each window's middle frame. Arguments as for `is_long`.
    """
    length = _length(fps, frames, stride)
    if frames == 1:
        starts = np.arange(0.0, num_frames, length)
        ends = np.append(starts[1:], num_frames)
        seen = np.minimum(starts + length / 2, num_frames - 1)
    else:
        hop, last = max(length / 2, 1.0), max(num_frames - length, 0.0)
        # Starts are whole frames, as in the test protocol.
        starts = seen = np.floor(np.append(np.arange(0.0, last, hop), last))
        ends = np.append(starts[:-1] + length, num_frames)
    # Frames are sampled as in training and test.
    indices = [
        sampling.spread(start, sampling.span(fps, frames, stride), frames, num_frames)
        for start in seen
    ]
    return Windows(np.stack(indices), starts / fps, ends / fps)


def _length(fps: float, frames: int, stride: int) -> float:
    """Returns the length of a window in source frames, at least 1."""
    if frames == 1:
        return max(SECONDS_OF_AN_IMAGE * fps, 1.0)
    return max(sampling.span(fps, frames, stride), 1.0)


class Segment(NamedTuple):
    """An interval with the same most probable class throughout."""

    start: float  # seconds
    end: float
    label: int
    probability: float  # of `label`, mean over the interval


@dataclass(frozen=True)
class Timeline:
    """Class probabilities of each window of a video."""

    starts: Float[np.ndarray, " windows"]  # seconds; windows are in order, without gaps
    ends: Float[np.ndarray, " windows"]
    probabilities: Float[np.ndarray, "windows classes"]

    def segments(self) -> list[Segment]:
        """Returns the video as consecutive segments, each of one class.

        A moment's probabilities are the mean over the windows that contain it, usually two. This
        makes a spurious segment between two scenes less likely. At rates such as 29.97 per second,
        edges of two windows can be a millisecond apart, and a segment as short. Segments of less
        than half a hop are merged, the shortest first: each becomes part of the neighbour whose
        class is more probable within the short segment.
        """
        edges = np.unique(np.concatenate([self.starts, self.ends]))
        # Windows are in order, so the windows that contain a moment are consecutive.
        first = np.searchsorted(self.ends, edges[:-1], "right")
        behind = np.searchsorted(self.starts, edges[:-1], "right")
        sums = np.concatenate([np.zeros_like(self.probabilities[:1]), self.probabilities.cumsum(0)])
        moments = (sums[behind] - sums[first]) / (behind - first)[:, None]
        labels, lengths = moments.argmax(1), np.diff(edges)
        # The integral of the probabilities from the start to each edge.
        integral = np.concatenate([sums[:1], (moments * lengths[:, None]).cumsum(0)])
        hop = np.median(np.diff(self.starts)) if len(self.starts) > 1 else 0.0
        changes = np.flatnonzero(labels[1:] != labels[:-1]) + 1
        rows = np.concatenate([[0], changes, [len(labels)]])
        rows, labels = _merge_short(edges, integral, rows, labels[rows[:-1]], hop / 2)
        return [
            Segment(
                float(edges[row]),
                float(edges[end]),
                int(label),
                float((integral[end] - integral[row])[label] / (edges[end] - edges[row])),
            )
            for (row, end), label in zip(itertools.pairwise(rows), labels, strict=True)
        ]


def _merge_short(
    edges: Float[np.ndarray, " edges"],
    integral: Float[np.ndarray, "edges classes"],
    rows: Int64[np.ndarray, " bounds"],
    labels: Int64[np.ndarray, " segments"],
    shortest: float,
) -> tuple[Int64[np.ndarray, " _bounds"], Int64[np.ndarray, " _segments"]]:
    """Merges segments shorter than `shortest` into their neighbours.

    Args:
      edges: times at which the probabilities change, in seconds.
      integral: of the probabilities, from the first edge to each edge.
      rows: indices of the edges that bound the segments, one more than segments.
      labels: the class of each segment.
      shortest: length in seconds.
    """
    while len(labels) > 1:
        lengths = np.diff(edges[rows])
        i = int(lengths.argmin())
        if lengths[i] >= shortest * (1 - 1e-6):  # edges are rounded
            break
        inside = integral[rows[i + 1]] - integral[rows[i]]
        beside = [j for j in (i - 1, i + 1) if 0 <= j < len(labels)]
        labels[i] = labels[max(beside, key=lambda j: inside[labels[j]])]
        equal = [j for j in (i, i + 1) if 0 < j < len(labels) and labels[j] == labels[j - 1]]
        rows, labels = np.delete(rows, equal), np.delete(labels, equal)
    return rows, labels


def clock(seconds: float, digits: int = 0) -> str:
    """Formats a duration as 0:07, 12:30 or 1:02:03; with one digit, as 0:07.4."""
    whole, part = divmod(round(seconds * 10**digits), 10**digits)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{text}.{part:0{digits}}" if digits else text


def interval(start: float, end: float) -> str:
    """Formats an interval as 0:07.4 - 0:09.0; two segments may begin in the same second."""
    return f"{clock(start, 1)} - {clock(end, 1)}"


def clips_of(
    video: Video,
    indices: Int64[np.ndarray, "clips time"],
    transform: Callable[[UInt8[np.ndarray, "1 _ _ 3"]], UInt8[np.ndarray, "views 1 _ _ 3"]],
) -> Iterator[UInt8[np.ndarray, "views time _height _width 3"]]:
    """Yields clips one by one, transformed.

    Each frame is decoded and transformed once. Memory holds the transformed frames of one clip.

    Args:
      video: the file.
      indices: frame numbers of the clips; the clips' starts must not decrease.
      transform: resizes a frame and cuts views from it, such as `pipeline.test_crops`.

    Raises:
      DecodeError: while iterating, if the file is broken.
    """
    decoded = video.in_order(np.unique(indices).tolist())
    buffer: dict[int, np.ndarray] = {}
    for clip in indices:
        buffer = {number: frame for number, frame in buffer.items() if number >= clip.min()}
        while clip.max() not in buffer:
            number, frame = next(decoded)
            buffer[number] = transform(frame[None])
        yield np.concatenate([buffer[number] for number in clip.tolist()], axis=1)
