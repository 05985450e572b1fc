"""Videos stored as folders of image files, and PySlowFast's frame lists.

A frame list has the header `original_vido_id video_id frame_id path labels` and one line per frame.
The labels are comma-separated numbers in quotes, or `""`.
"""

import contextlib
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.data.formats.listing import frame_files
from mvit_jax.data.formats.video_list import VideoList
from mvit_jax.data.media import video as decoding
from mvit_jax.data.media.images import DecodeError, Footage, distinct, read_image

FRAME_RATE = 30.0
"""Assumed frames per second of image files, which do not record it (PySlowFast: `ffmpeg -r 30`)."""

# Suffixes of a video file that replaces the folder of its frames.
_VIDEO_SUFFIXES = (".webm", ".mp4")


@dataclass(frozen=True)
class FrameFiles:
    """An opened video whose frames are image files; an `images.Footage`.

    Attributes:
      name: name of the video in messages.
      paths: file of each frame.
      fps: frames per second.
    """

    name: str
    paths: Sequence[str]
    fps: float = FRAME_RATE

    @property
    def num_frames(self) -> int:
        return len(self.paths)

    def frames(
        self, indices: Sequence[int] | Int[np.ndarray, " frames"]
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Decodes frames with `images.read_image`, each distinct frame once.

        Raises:
          DecodeError: a frame is missing or broken, or the frames differ in size.
          IndexError: an index is out of range.
        """
        numbers, positions = distinct(indices, self.num_frames)
        paths = [self.paths[int(number)] for number in numbers]
        images = [self._image(path) for path in paths]
        for path, image in zip(paths, images, strict=True):
            if image.shape != images[0].shape:
                raise DecodeError(
                    self.name,
                    f"its frames differ in size: {Path(paths[0]).name} has {_size(images[0])} "
                    f"pixels, {Path(path).name} {_size(image)}",
                )
        return np.concatenate(images)[positions]

    def _image(self, path: str) -> np.ndarray:
        try:
            return read_image(path)
        except DecodeError as error:
            reason = f"frame {Path(path).name}: {error.reason}"
            raise DecodeError(self.name, reason) from error


class FrameFolders(VideoList):
    """Videos of one split, where `paths` are folders of frames; a `data.source.Source`.

    The files of a folder are listed only when the video is opened, since there are hundreds of
    thousands of folders. The frames are the images of a folder in natural order: numbers in names
    are compared by value.
    If the folder does not exist, the video file `FOLDER.webm` or `FOLDER.mp4` is read instead.
    """

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[Footage]:
        folder = self.paths[index]
        try:
            names = frame_files(folder)
        except OSError as error:
            for suffix in _VIDEO_SUFFIXES:
                if Path(folder + suffix).exists():
                    with decoding.opened(folder + suffix, clip_frames) as video:
                        yield video
                    return
            reason = (
                "there is neither this folder of frames nor a video "
                + " or ".join(Path(folder + suffix).name for suffix in _VIDEO_SUFFIXES)
                + " (data.prefix is prepended to the paths in lists)"
                if isinstance(error, FileNotFoundError)
                else str(error.strerror).lower()
            )
            raise DecodeError(folder, reason) from error
        names.sort(key=natural_order)
        yield FrameFiles(folder, tuple(f"{folder}/{name}" for name in names))


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Returns a sort key that compares numbers in names by value."""
    # Text and numbers alternate, so numbers are compared with numbers. The name itself decides
    # between equal numbers like 1 and 01.
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"


_HEADER = b"original_vido_id video_id frame_id path labels"


# eq=False, repr=False: as in `VideoList`.
@dataclass(frozen=True, eq=False, repr=False)
class FrameList:
    """Byte offsets of each video's lines in a frame list.

    A list has millions of lines, so the lines of a video are read on demand.

    Attributes:
      file: path of the list.
      videos: name of each video, in the order of the list.
      starts: byte offset of each video's first line, and of the file's end.
    """

    file: str
    videos: tuple[str, ...]
    starts: Int64[np.ndarray, " offsets"]

    def __len__(self) -> int:
        return len(self.videos)

    def rows(self, index: int) -> "Rows":
        """Reads the lines of video `index`.

        Raises:
          DecodeError: the list cannot be read, or has changed since it was first read.
        """
        start, end = self.starts[index : index + 2].tolist()
        try:
            with Path(self.file).open("rb") as file:
                file.seek(start)
                content = file.read(end - start)
        except OSError as error:
            reason = f"its list {self.file} cannot be read: {str(error.strerror).lower()}"
            raise DecodeError(self.videos[index], reason) from error
        fields = [line.split() for line in content.splitlines() if line.strip()]
        name = os.fsencode(self.videos[index])
        sound = len(content) == end - start and all(
            len(row) == 5 and row[0] == name for row in fields
        )
        if not sound:
            reason = f"its list {self.file} has changed since it was first read"
            raise DecodeError(self.videos[index], reason)
        return Rows(tuple(os.fsdecode(row[3]) for row in fields), tuple(row[4] for row in fields))


class Rows(NamedTuple):
    """Paths of a video's frames, as listed, and the unparsed labels of each frame."""

    paths: tuple[str, ...]
    labels: tuple[bytes, ...]


def read_frame_list(list_file: Path) -> tuple[FrameList, list[set[bytes]]]:
    """Indexes a frame list; returns the index and each video's distinct, unparsed labels.

    Raises:
      UserError: the file does not exist, lacks the header, lists no frames, has a line without the
        header's five fields, or lists the frames of a video in two places.
    """
    if not list_file.is_file():
        raise MissingDataError(
            f"there is no list {list_file}: it should hold a line for each frame, after the header "
            f"`{_HEADER.decode()}`"
        )
    with list_file.open("rb") as file:
        header = file.readline()
        if header.removeprefix(b"\xef\xbb\xbf").split() != _HEADER.split():
            raise UserError(
                f"{list_file}, line 1 should be the header `{_HEADER.decode()}` of a "
                f"frame list, but is {header.decode(errors='replace').strip()[:80]!r}"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                starts, texts = _index(content, len(header))
            except _WrongLineError as wrong:
                number = content[: wrong.offset].count(b"\n") + 1
                raise UserError(f"{list_file}, line {number}: {wrong.reason}") from None
            offsets = np.array([*starts.values(), len(content)], np.int64)
    if not starts:
        raise UserError(f"{list_file} lists no frames: it should hold a line for each frame")
    return FrameList(str(list_file), tuple(map(os.fsdecode, starts)), offsets), texts


class _WrongLineError(Exception):
    def __init__(self, offset: int, reason: str):
        super().__init__(offset, reason)
        self.offset, self.reason = offset, reason


# Consecutive lines of one video, and blank lines. Matching them and checking all fields takes no
# longer than a Python loop without checks over the millions of lines.
_LINES_OF_A_VIDEO = re.compile(rb"\s*(\S+)[ \t][^\n]*\n?(?:[ \t]*\1[ \t][^\n]*\n?|[ \t\r]*\n)*")


def _index(content: mmap.mmap, begin: int) -> tuple[dict[bytes, int], list[set[bytes]]]:
    """Returns the offset and the distinct unparsed labels of each video, from `begin` on."""
    starts: dict[bytes, int] = {}
    texts: list[set[bytes]] = []
    for match in _LINES_OF_A_VIDEO.finditer(content, begin):
        name, fields = match[1], match[0].split()
        if match.start() != begin or set(fields[::5]) != {name} or len(fields) % 5:
            break
        if name in starts:
            raise _WrongLineError(
                match.start(1),
                f"the frames of {os.fsdecode(name)} are not contiguous: sort the list",
            )
        starts[name] = begin
        texts.append(set(fields[4::5]))
        begin = match.end()
    if content[begin:].strip():
        raise _wrong_line(content, begin)
    return starts, texts


def _wrong_line(content: mmap.mmap, begin: int) -> _WrongLineError:
    """Returns the error for the first line from `begin` on that does not have five fields."""
    lines = content[begin:].splitlines(keepends=True)
    index = next((i for i, line in enumerate(lines) if len(line.split()) not in (0, 5)), 0)
    excerpt = lines[index][:80].decode(errors="replace").strip()
    offset = begin + sum(map(len, lines[:index]))
    return _WrongLineError(offset, f"{excerpt!r} does not have the five fields of the header")


def label_numbers(text: bytes) -> list[int]:
    """Parses the labels of a frame; raises `ValueError` if `text` is malformed."""
    inside = text.strip(b'"')
    return [int(number) for number in inside.split(b",")] if inside else []


# eq=False, repr=False: as in `VideoList`.
@dataclass(frozen=True, eq=False, repr=False)
class ListedFrames:
    """Videos of a frame list; a `data.source.Source`.

    Attributes:
      frame_list: the indexed list.
      base: folder of the list's relative paths.
      labels: class of each video, or a multi-hot vector for multi-label data.
      class_names: name of each class.
    """

    frame_list: FrameList
    base: str
    labels: Int32[np.ndarray, " videos"] | UInt8[np.ndarray, "videos classes"]
    class_names: tuple[str, ...]

    @property
    def list_file(self) -> str:
        return self.frame_list.file

    def __len__(self) -> int:
        return len(self.frame_list)

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> int | UInt8[np.ndarray, " classes"]:
        """Returns the class, or for multi-label data a multi-hot vector.

        The vector has 1 for each label of the frames from the clip's first to its last. If `frames`
        is None, it covers the whole video.
        """
        if self.labels.ndim == 1:
            return int(self.labels[index])
        if frames is None:
            return self.labels[index].copy()
        label = np.zeros(len(self.class_names), np.uint8)
        texts = self.frame_list.rows(index).labels[int(frames.min()) : int(frames.max()) + 1]
        for text in set(texts):
            label[label_numbers(text)] = 1
        return label

    def item(self, index: int) -> str:
        return f"{self.base}/{self.frame_list.videos[index]}"

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[FrameFiles]:
        paths = self.frame_list.rows(index).paths
        joined = tuple(path if path.startswith("/") else f"{self.base}/{path}" for path in paths)
        yield FrameFiles(self.item(index), joined)
