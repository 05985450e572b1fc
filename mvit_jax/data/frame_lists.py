"""PySlowFast's lists of frames, which name each frame of each video, and its labels.

A line for each frame, after a header: `original_vido_id video_id frame_id path labels`, where
labels are numbers with commas between them, in quotes, or `""`.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8

from mvit_jax.data.frame_folders import FrameFiles
from mvit_jax.data.images import DecodeError
from mvit_jax.errors import UserError

_HEADER = b"original_vido_id video_id frame_id path labels"


# eq=False, repr=False: as of `lists.VideoList`.
@dataclass(frozen=True, eq=False, repr=False)
class FrameList:
    """Where each video's lines are in a list of frames.

    A list has a line for each of millions of frames, so the lines of a video are read when it is
    asked for.

    Attributes:
      file: the list.
      videos: name of each video, in the order of the list.
      starts: place in the file, in bytes, of each video's first line, and the file's end.
    """

    file: str
    videos: tuple[str, ...]
    starts: Int64[np.ndarray, " places"]

    def __len__(self) -> int:
        return len(self.videos)

    def rows(self, index: int) -> "Rows":
        """The frames of video `index`.

        Raises:
          DecodeError: the file cannot be read, or has changed since it was first read.
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
            reason = (
                f"{self.file} has lines of other fields than `{_HEADER.decode()}` among its own, "
                "or has changed since it was first read"
            )
            raise DecodeError(self.videos[index], reason)
        return Rows(tuple(os.fsdecode(row[3]) for row in fields), tuple(row[4] for row in fields))


class Rows(NamedTuple):
    """The frames of a video: their paths, as they are listed, and the texts of their labels."""

    paths: tuple[str, ...]
    labels: tuple[bytes, ...]


def read_frame_list(list_file: Path) -> tuple[FrameList, list[set[bytes]]]:
    """Reads where each video's lines are, and the distinct texts of the labels of its frames.

    Raises:
      UserError: no such file, one without the header, without videos, or with the frames of a
        video in two places.
    """
    if not list_file.is_file():
        raise UserError(
            f"there is no list {list_file}: it should hold a line for each frame, after the header "
            f"`{_HEADER.decode()}`"
        )
    with list_file.open("rb") as file:
        header = file.readline()
        if header.removeprefix(b"\xef\xbb\xbf").split() != _HEADER.split():
            raise UserError(
                f"{list_file}, line 1 should be the header `{_HEADER.decode()}` of a list of "
                f"frames, but is {header.decode(errors='replace').strip()[:80]!r}"
            )
        starts, texts, end = _index(file, len(header), list_file)
    if not starts:
        raise UserError(f"{list_file} lists no frames: it should hold a line for each")
    videos = tuple(map(os.fsdecode, starts))
    places = np.array([*starts.values(), end], np.int64)
    return FrameList(str(list_file), videos, places), texts


def _index(
    lines: Iterable[bytes], end: int, list_file: Path
) -> tuple[dict[bytes, int], list[set[bytes]], int]:
    """Gives the place of each video's first line, the texts of its labels, and the end's place.

    Lines begin at place `end`. There are millions of them, so of most no more is looked at than
    whether the video is still the same, and the labels.
    """
    starts: dict[bytes, int] = {}
    texts: list[set[bytes]] = []
    name, begin = b"", ()  # no line starts with one of no texts
    for number, line in enumerate(lines, start=2):
        if not line.startswith(begin):
            fields = line.split(maxsplit=1)
            if not fields:
                end += len(line)
                continue
            if fields[0] != name:
                name = fields[0]
                if name in starts:
                    raise UserError(
                        f"{list_file}, line {number}: the frames of {os.fsdecode(name)} are in two "
                        "places: sort the list, so that they stand together"
                    )
                starts[name] = end
                texts.append(set())
                begin = line[: line.index(name) + len(name) + 1]
        texts[-1].add(line.rsplit(None, 1)[-1])
        end += len(line)
    return starts, texts, end


def label_numbers(text: bytes) -> list[int]:
    """The numbers of a text of labels; raises `ValueError` where it is none."""
    inside = text.strip(b'"')
    return [int(number) for number in inside.split(b",")] if inside else []


# eq=False, repr=False: as of `lists.VideoList`.
@dataclass(frozen=True, eq=False, repr=False)
class ListedFrames:
    """The videos of a list of frames; a `sources.Source`.

    Attributes:
      frame_list: the list.
      base: folder that the list's paths start at.
      labels: class of each video, or 0 and 1 of each class where it may have several.
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
        """Where a video may have several labels: those of any frame from the clip's first to its
        last, or without `frames` those of the whole video."""
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
