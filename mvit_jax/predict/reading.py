"""Clips of a video, decoded in one pass and in little memory."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt8

from mvit_jax.data import pipeline
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.video import Video


def clips(
    video: Video, indices: Int64[np.ndarray, "clips time"], settings: ClipSettings, crops: int
) -> Iterator[UInt8[np.ndarray, "crops time size size 3"]]:
    """The clips of these frames one after the other, scaled and cropped as by `pipeline.views`.

    Every frame is decoded once. What is held is the frames of one clip, at the model's size.

    Args:
      video: an open file.
      indices: frame numbers; no clip starts before the one before it.
      settings: what a clip is.
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
