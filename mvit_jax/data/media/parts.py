"""Transformation of decoded frames, large ones in parts, to save memory."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt8

from mvit_jax.data.media.images import Footage
from mvit_jax.data.media.video import Video

# Bytes of decoded frames to transform at once: 16 frames of 720p fit, 16 frames of 4K do not.
_BYTES_IN_PARTS = 48 << 20


def transform_frames(
    video: Footage,
    indices: Int64[np.ndarray, " frames"],
    transform: Callable[[UInt8[np.ndarray, "time _ _ 3"]], UInt8[np.ndarray, "views time ..."]],
) -> UInt8[np.ndarray, "views frames ..."]:
    """Decodes frames and transforms them, large frames in parts, to save memory.

    Each distinct frame is decoded and transformed once, as clips of a short video share frames.
    """
    distinct, inverse = np.unique(indices, return_inverse=True)
    if not isinstance(video, Video):
        return transform(video.frames(distinct))[:, inverse]
    transformed, part = [], []
    for number, frame in video.in_order(distinct.tolist()):
        part.append(frame)
        if number == distinct[-1] or sum(frame.nbytes for frame in part) >= _BYTES_IN_PARTS:
            transformed.append(transform(np.stack(part) if len(part) > 1 else frame[None]))
            part = []
    return np.concatenate(transformed, axis=1)[:, inverse]
