"""Videos whose frames are files of images, one folder for each video."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8

from mvit_jax.data import video as decoding
from mvit_jax.data.images import DecodeError, Footage, is_image, read_image

FRAME_RATE = 30.0
"""Frames a second at which frames are written (PySlowFast's way: `ffmpeg -r 30`); files of images
do not say."""

# Endings of the video itself, where it lies in place of a folder of its frames.
_VIDEO_SUFFIXES = (".webm", ".mp4")


@dataclass(frozen=True)
class FrameFiles:
    """An opened video whose frames are files; an `images.Footage`.

    Attributes:
      name: what messages call the video.
      paths: the file of each frame.
      fps: frames a second.
    """

    name: str
    paths: tuple[str, ...]
    fps: float = FRAME_RATE

    @property
    def num_frames(self) -> int:
        return len(self.paths)

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Decodes frames as `images.read_image` does; each distinct one once.

        Raises:
          DecodeError: a frame is missing or broken, or these frames differ in size.
          IndexError: a frame number out of range.
        """
        wanted, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise IndexError(
                f"frames {wanted[0]} to {wanted[-1]} of a video of {self.num_frames} frames"
            )
        images = [self._image(self.paths[number]) for number in wanted]
        for number, image in zip(wanted, images, strict=True):
            if image.shape != images[0].shape:
                raise DecodeError(
                    self.name,
                    f"its frames differ in size: {Path(self.paths[wanted[0]]).name} has "
                    f"{_size(images[0])} pixels, {Path(self.paths[number]).name} {_size(image)}",
                )
        return np.concatenate(images)[places]

    def _image(self, path: str) -> np.ndarray:
        try:
            return read_image(path)
        except DecodeError as error:
            reason = f"of its frame {Path(path).name}, {error.reason}"
            raise DecodeError(self.name, reason) from error


# eq=False, repr=False: as of `lists.VideoList`.
@dataclass(frozen=True, eq=False, repr=False)
class FrameFolders:
    """The videos of one split, a folder of frames for each; a `sources.Source`.

    Folders are looked into when a video is opened, as there are hundreds of thousands. Frames are
    the images of a folder by their names, numbers in them by value. Where there is no such folder,
    the video itself may lie there, under the name of the folder and `.webm` or `.mp4`.

    Attributes:
      folders: path of each video's folder of frames.
      labels: class of each video, in `range(len(class_names))`.
      class_names: name of each class.
      list_file: the list that was read, for messages.
    """

    folders: tuple[str, ...]
    labels: Int32[np.ndarray, " videos"]
    class_names: tuple[str, ...]
    list_file: str

    def __len__(self) -> int:
        return len(self.folders)

    def label(self, index: int, frames: Int[np.ndarray, " frames"] | None = None) -> int:
        return int(self.labels[index])

    def item(self, index: int) -> str:
        return self.folders[index]

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[Footage]:
        folder = self.folders[index]
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if is_image(entry.name)]
        except OSError as error:
            for suffix in _VIDEO_SUFFIXES:
                if Path(folder + suffix).exists():
                    with decoding.opened(folder + suffix, clip_frames) as video:
                        yield video
                    return
            reason = (
                "there is no such folder of frames, nor a video "
                + " or ".join(Path(folder + suffix).name for suffix in _VIDEO_SUFFIXES)
                + " (data.prefix is set before the paths of lists)"
                if isinstance(error, FileNotFoundError)
                else str(error.strerror).lower()
            )
            raise DecodeError(folder, reason) from error
        if not names:
            raise DecodeError(folder, "the folder holds no images")
        names.sort(key=_in_order)
        yield FrameFiles(folder, tuple(f"{folder}/{name}" for name in names))


def _in_order(name: str) -> tuple[list[str | int], str]:
    # Text and numbers take turns, so that numbers meet numbers; the name itself tells 1 from 01.
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
