"""Videos whose frames show their number as a bar code."""

from fractions import Fraction
from typing import Any

import av
import numpy as np

BITS, BAR, HEIGHT = 8, 8, 32


def bar_code(number):
    """Returns a frame with white bars for the ones of a binary number, lowest bit at the left."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 235, BAR)
    return np.broadcast_to(row[None, :, None], (HEIGHT, BITS * BAR, 3)).copy()


def number_of(image):
    """Reads the bar code of a decoded frame."""
    middles = image[image.shape[0] // 2, BAR // 2 :: BAR].mean(axis=-1)
    return sum(1 << bit for bit, level in enumerate(middles) if level > 120)


def numbers_of(images):
    return [number_of(image) for image in images]


def write(
    path,
    frames,
    *,
    codec="libx264",
    rate: int | Fraction = 30,
    gop=12,
    pix_fmt="yuv420p",
    times=None,
    rotation=None,
    matrix=None,
    **options,
):
    """Encodes `frames` (arrays, or a count of bar codes) with B-frames; returns the path.

    `times` are in milliseconds; `matrix` is a display matrix of 9 whole numbers.
    """
    if isinstance(frames, int):
        frames = [bar_code(number) for number in range(frames)]
    # Bar codes change at every frame; by default x264 would then use no B-frames.
    forced = {"b_strategy": "0", "sc_threshold": "0"} if codec == "libx264" else {}
    container_options = {"movflags": "faststart"} if str(path).endswith(".mp4") else {}
    with av.open(str(path), "w", options=container_options) as container:
        settings = {"bf": "2", **forced, **options}
        stream: Any = container.add_stream(codec, rate=rate, options=settings)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.time_base, picture.pts = Fraction(1, 1000), times[number]
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return str(path)


def decode_all(path: str):
    """Returns all frames in the order of a plain decoder."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def packets_of(path: str):
    with av.open(path) as container:
        return [
            (packet.pos or 0, packet.size, packet.is_keyframe)
            for packet in container.demux(video=0)
            if packet.size
        ]
