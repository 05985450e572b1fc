"""Folders of frames of small videos, and frame lists."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(video: str, frame: int, size=(6, 8)) -> np.ndarray:
    """Returns uint8 `[height, width, 3]` noise that depends on the names alone."""
    rng = np.random.default_rng([frame, *video.encode()])
    return rng.integers(0, 256, (*size, 3), np.uint8)


def write(folder: Path, video: str, count: int, name: str = "{video}_{number:06d}.png") -> None:
    (folder / video).mkdir(parents=True)
    for frame in range(count):
        path = folder / video / name.format(video=video, number=frame + 1)
        Image.fromarray(pixels(video, frame)).save(path)


def row(video: str, frame: int, labels: str = "") -> str:
    return f'{video} 0 {frame} {video}/{video}_{frame + 1:06d}.png "{labels}"'


def text(*rows: str) -> str:
    return "\n".join(["original_vido_id video_id frame_id path labels", *rows]) + "\n"
