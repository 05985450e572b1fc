"""Heat maps over frames, written atomically as PNG, GIF and mp4."""

import io
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import matplotlib
import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image

from mvit_jax.common.files import write_atomically

Frames = UInt8[np.ndarray, "time height width 3"]

_COLOURS = matplotlib.colormaps["inferno"]


def to_uint8(
    clip: Float[np.ndarray, "time height width 3"], mean: Sequence[float], std: Sequence[float]
) -> Frames:
    """Undoes a clip's normalisation: `value * std + mean`, as uint8."""
    values = 255 * (np.asarray(clip) * np.asarray(std, np.float32) + np.asarray(mean, np.float32))
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def overlay(frames: Frames, heat: Float[np.ndarray, "time height width"]) -> Frames:
    """Blends a heat map with frames: low values are dim and grey, high values bright and coloured.

    The map is divided by its maximum over the clip, so that the frames of a clip are comparable.

    Args:
      frames: of a clip.
      heat: values of at least 0.
    """
    share = np.clip(heat / max(float(heat.max()), 1e-12), 0, 1)[..., None]
    colour = 255 * _COLOURS(share[..., 0])[..., :3]
    grey = frames.mean(-1, keepdims=True)
    # Every pixel keeps a part of the frame's brightness, so the content remains visible.
    mixed = 0.55 * grey * (0.4 + 0.6 * share) + (0.2 + 0.55 * share) * colour
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)


def contact_sheet(
    frames: Frames, columns: int, gap: int = 2
) -> UInt8[np.ndarray, "_height _width 3"]:
    """Tiles frames in rows of `columns`, with white gaps of `gap` pixels."""
    columns = min(columns, len(frames))
    padding = [(0, -len(frames) % columns), (0, gap), (0, gap), (0, 0)]
    tiles = np.pad(frames, padding, constant_values=255)
    sheet = rearrange(tiles, "(r c) height width rgb -> (r height) (c width) rgb", c=columns)
    return sheet[: len(sheet) - gap, : sheet.shape[1] - gap]


def enlarge(frames: Frames, min_side: int) -> UInt8[np.ndarray, "time _height _width 3"]:
    """Repeats the pixels of small frames until the shorter side has at least `min_side` pixels."""
    factor = -(-min_side // min(frames.shape[1:3]))
    return frames.repeat(factor, 1).repeat(factor, 2) if factor > 1 else frames


def png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Returns the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes a PNG file atomically; raises `UserError` on failure."""
    write_atomically(path, png(image))


def gif(frames: Frames, fps: float) -> bytes:
    """Returns the content of a looping GIF file."""
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], loop=0,
        duration=max(round(1000 / fps), 20),
    )  # fmt: skip
    return buffer.getvalue()


def save_gif(path: str | os.PathLike[str], frames: Frames, fps: float) -> None:
    write_atomically(path, gif(frames, fps))


def mp4(frames: Iterable[UInt8[np.ndarray, "height width 3"]], fps: float) -> bytes:
    """Returns the content of an H.264 mp4, which every browser plays.

    H.264 requires even sides: an odd side is padded by repeating its last pixel.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=max(Fraction(fps).limit_denominator(1001), 1))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for i, frame in enumerate(frames):
            odd = [(0, n % 2) for n in frame.shape[:2]]
            frame = np.pad(frame, [*odd, (0, 0)], mode="edge")
            if i == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def save_mp4(
    path: str | os.PathLike[str],
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    fps: float,
) -> None:
    """Writes the content of `mp4`; frames may come from a generator."""
    write_atomically(path, mp4(frames, fps))
