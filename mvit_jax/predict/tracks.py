"""Links of person boxes over time: boxes that overlap in neighbouring key frames are a track."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

from mvit_jax.training.evaluation.frame_map import overlaps

MIN_IOU = 0.3
"""Smallest overlap of a person's boxes a second apart."""

Boxes = Float[np.ndarray, "_ 4"]  # x1, y1, x2, y2


def link(
    seconds: Sequence[float], boxes: Sequence[Boxes], min_iou: float = MIN_IOU
) -> list[Int64[np.ndarray, " _"]]:
    """Numbers the tracks of boxes, from 0 in the order of their first boxes.

    Boxes of key frames at most a second apart are linked, the pair with the largest overlap first.
    A box has at most one link to either side. A person who is missed in a key frame has a new track
    afterwards.

    Args:
      seconds: time of each key frame, ascending.
      boxes: the boxes of each key frame.
      min_iou: smallest intersection over union of a link.

    Returns:
      The track of each box, one array per key frame.
    """
    tracks: list[np.ndarray] = []
    count = 0
    for i, current in enumerate(boxes):
        numbers = np.full(len(current), -1)
        if i and seconds[i] - seconds[i - 1] <= 1:
            for before, after in _pairs(overlaps(boxes[i - 1], current), min_iou):
                numbers[after] = tracks[i - 1][before]
        new = np.flatnonzero(numbers < 0)
        numbers[new] = count + np.arange(len(new))
        count += len(new)
        tracks.append(numbers)
    return tracks


def _pairs(iou: Float[np.ndarray, "before after"], smallest: float) -> list[tuple[int, int]]:
    """Returns index pairs in the order of falling overlap, each index at most once."""
    left, pairs = iou.copy(), []
    while left.size and left.max() >= smallest:
        before, after = np.unravel_index(left.argmax(), left.shape)
        pairs.append((int(before), int(after)))
        left[before], left[:, after] = -1, -1
    return pairs


def colours(tracks: Sequence[Int64[np.ndarray, " _"]], count: int) -> dict[int, int]:
    """Returns a colour for each track, from 0 to `count` - 1.

    Tracks of one key frame have different colours while there are enough. A new track has the
    colour that was last in use the longest time ago.
    """
    chosen: dict[int, int] = {}
    order = list(range(count))  # the last used ones at the end
    for frame in tracks:
        present = [int(track) for track in frame]
        for track in sorted(present, key=lambda track: track not in chosen):
            if track not in chosen:
                chosen[track] = order[0]
            order.remove(chosen[track])
            order.append(chosen[track])
    return chosen
