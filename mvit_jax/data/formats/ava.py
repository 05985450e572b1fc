"""Clips around AVA's key frames, with the boxes of persons (Gu et al. 2018).

The folder of the data set holds the csv files of `ava_tables`, and for each video either a folder
of its frames at 30 per second, `frames/VIDEO/`, or the file itself, `videos/VIDEO.mp4` (any suffix
of a video). A file is read at 30 frames per second: frame i is the picture shown at i / 30 s.

AVA's videos are the minutes 15 to 30 of films. The files may be whole films or these minutes. A
process that loads clips holds the packet times of all files in memory, 5 MB for 15 minutes.
"""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64, UInt8

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.data.formats import ava_tables
from mvit_jax.data.formats.ava_tables import ClassList, KeyFrames
from mvit_jax.data.formats.frame_lists import FRAME_RATE, FrameFiles, natural_order
from mvit_jax.data.formats.listing import VIDEO_SUFFIXES, frame_files
from mvit_jax.data.media.images import DecodeError, Footage
from mvit_jax.data.media.packets import Packets
from mvit_jax.data.media.video import Video

CUT_START = 900
"""Second of a film at which AVA's videos begin."""

_CUT_FRAMES = 901 * 30  # of AVA's videos
_LONGEST_CUT = 1350.0  # seconds; a longer file is a whole film, which lasts 30 minutes or more

# Container formats round times to milliseconds, so that a picture may be late by half of one.
_ROUNDING = 1e-3


class KeyFrameBoxes(NamedTuple):
    """Boxes of a key frame, x1, y1, x2, y2 as fractions of the frame, and their labels (0, 1)."""

    box: Float64[np.ndarray, "boxes 4"]
    labels: UInt8[np.ndarray, "boxes classes"]


# eq=False, repr=False: as in `VideoList`.
@dataclass(frozen=True, eq=False, repr=False)
class KeyFrameClips:
    """Key frames of a split that have boxes; a `data.source.Source`.

    Attributes:
      list_file: csv file of the labels.
      files: path of each video of `key_frames`, a folder of frames or a video file.
      key_frames: the boxes of the clips: labelled and detected ones for training, detected ones for
        testing.
      classes: the evaluated classes.
      excluded: pairs of video and second that the metric leaves out.
      first_second: second of the csv files at which the frames begin.
      max_boxes: number of boxes to which clips are padded, at least that of any key frame.
    """

    list_file: str
    files: tuple[str, ...]
    key_frames: KeyFrames
    classes: ClassList
    excluded: frozenset[tuple[str, int]]
    first_second: int
    max_boxes: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class; those that are not evaluated have only a number."""
        return self.classes.all_names()

    @property
    def labels(self) -> UInt8[np.ndarray, "boxes classes"]:
        return self.key_frames.labels

    @functools.cached_property
    def truth(self) -> KeyFrames:
        """The labelled boxes."""
        return ava_tables.read_key_frames(
            [self.list_file], classes=self.classes.count, seconds=valid_seconds(self.first_second)
        )

    def __len__(self) -> int:
        return len(self.key_frames)

    def video(self, index: int) -> str:
        """Returns the name of the video of key frame `index`."""
        return self.key_frames.videos[self.key_frames.video[index]]

    def item(self, index: int) -> str:
        file = self.files[self.key_frames.video[index]]
        return f"{file} at second {self.key_frames.second[index]}"

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> UInt8[np.ndarray, " classes"]:
        """Returns a vector with 1 for each class of any box of the key frame."""
        return self.boxes(index).labels.max(0)

    def boxes(self, index: int) -> KeyFrameBoxes:
        """Returns the boxes of key frame `index`."""
        rows = self.key_frames.rows(index)
        return KeyFrameBoxes(self.key_frames.box[rows], np.minimum(self.key_frames.labels[rows], 1))

    def subset(self, indices: Int64[np.ndarray, " frames"]) -> "KeyFrameClips":
        """Returns the clips of some key frames, with as many boxes a clip."""
        frames = self.key_frames
        rows = [frames.rows(index) for index in indices.tolist()]
        boxes = np.concatenate([np.arange(each.start, each.stop) for each in rows])
        starts = np.cumsum([0, *(each.stop - each.start for each in rows)])
        part = KeyFrames(
            frames.videos, frames.video[indices], frames.second[indices], starts,
            frames.box[boxes], frames.labels[boxes], frames.score[boxes],
        )  # fmt: skip
        return replace(self, key_frames=part, max_boxes=self.max_boxes)

    def frame_size(self, video: int) -> tuple[int, int] | None:
        """Returns height and width of the frames of a video, None if it cannot be decoded."""
        index = int(np.searchsorted(self.key_frames.video, video))
        if index == len(self) or self.key_frames.video[index] != video:
            return None
        try:
            with self.opened(index, 2) as footage:
                height, width = footage.frames([0]).shape[1:3]
        except DecodeError:
            return None
        return height, width

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[Footage]:
        with self._opened(index) as footage:
            length = cut_of(footage, self.first_second)[1]
            if self._centre(index) >= length:
                end = self.first_second + length / FRAME_RATE
                raise DecodeError(
                    self.item(index),
                    f"the key frame is beyond the end of the video, second {end:.1f} "
                    f"(data.first_second={self.first_second} is the second of the first frame)",
                )
            yield footage

    @contextlib.contextmanager
    def _opened(self, index: int) -> Iterator[Footage]:
        path = self.files[self.key_frames.video[index]]
        if not Path(path).is_dir():
            # A film is read whole once, not for each of its 900 key frames.
            with Video(path, packet_list=_packet_list(path)) as video:
                yield video
            return
        yield FrameFiles(path, _frame_paths(path))

    def clip_indices(
        self, index: int, footage: Footage, frames: int, stride: int
    ) -> Int64[np.ndarray, " frames"]:
        """Returns the frame numbers of the clip around key frame `index`, see `clip_indices`."""
        return clip_indices(footage, self._centre(index), frames, stride, self.first_second)

    def _centre(self, index: int) -> int:
        """Returns the number of a key frame at 30 frames per second."""
        return (int(self.key_frames.second[index]) - self.first_second) * round(FRAME_RATE)


def clip_indices(
    footage: Footage, centre: int, frames: int, stride: int, first_second: int = 0
) -> Int64[np.ndarray, " frames"]:
    """Returns the frame numbers of a clip around frame `centre` at 30 frames per second.

    Frame T / 2 of the clip, from 0, is the key frame. A clip that exceeds the video repeats the
    first or the last frame.

    Args:
      footage: the video, or its frames.
      centre: number of the key frame at 30 frames per second, from `first_second` on.
      frames: T, frames of the clip.
      stride: tau, distance between neighbouring frames at 30 frames per second.
      first_second: 900 for AVA's videos, which begin there if the file is a whole film.
    """
    start, length = cut_of(footage, first_second)
    numbers = centre - frames * stride // 2 + stride * np.arange(frames)
    numbers = np.clip(numbers, 0, length - 1)
    if not isinstance(footage, Video):
        return numbers
    shown = start + numbers / FRAME_RATE + _ROUNDING
    return np.maximum(np.searchsorted(footage.seconds, shown, side="right") - 1, 0)


def cut_of(footage: Footage, first_second: int) -> tuple[float, int]:
    """Returns the second of a file at which the frames begin, and their number at 30 per second."""
    if not isinstance(footage, Video):
        return 0.0, footage.num_frames
    end = footage.num_frames / footage.fps
    if first_second == CUT_START and end > _LONGEST_CUT:
        return float(CUT_START), _CUT_FRAMES
    return 0.0, max(round(end * FRAME_RATE), 1)


def valid_seconds(first_second: int) -> range:
    """Returns the valid seconds of key frames: AVA's for 900, else all from `first_second` on."""
    return ava_tables.SECONDS if first_second == CUT_START else range(first_second, 10**6)


def read_ava(
    folder: Path,
    list_name: str,
    *,
    boxes: str | None,
    class_list: str,
    train: bool,
    min_score: float = 0.9,
    excluded: str | None = None,
    first_second: int = CUT_START,
    prefix: str = "",
    max_missing: float = 0.0,
) -> KeyFrameClips:
    """Opens a split of AVA, or of another data set in its format.

    Args:
      folder: folder that the names of files are relative to.
      list_name: csv file of the labels.
      boxes: csv file of detected persons; None for the labelled boxes alone.
      class_list: list of the evaluated classes.
      train: True for the labelled and the detected boxes, False for the detected boxes alone.
      min_score: smallest score of a detected person.
      excluded: csv file of the key frames that the metric leaves out.
      first_second: second of the csv files at which the frames begin.
      prefix: folder of the videos or of their frames, instead of `frames` and `videos`.
      max_missing: share of missing videos above which there is an error. Below, a note on stderr
        counts them, and their key frames cannot be decoded.

    Raises:
      UserError: a csv file is missing or has broken lines, or too many videos are missing.
    """
    labels = folder / list_name
    if not labels.is_file():
        raise MissingDataError(
            f"there is no list {labels}: it should hold a line "
            "`video,second,x1,y1,x2,y2,action,person` for each label"
        )
    classes = ava_tables.read_class_list(folder / class_list)
    key_frames = ava_tables.read_key_frames(
        [labels] if train or boxes is None else [],
        [folder / boxes] if boxes is not None else [],
        classes=classes.count,
        min_score=min_score,
        seconds=valid_seconds(first_second),
    )
    key_frames = _with_boxes(key_frames)
    lists = labels if boxes is None else f"{labels} and {folder / boxes}"
    return KeyFrameClips(
        list_file=str(labels),
        files=_files(folder, prefix, key_frames, str(lists), max_missing),
        key_frames=key_frames,
        classes=classes,
        excluded=ava_tables.read_excluded(folder / excluded) if excluded else frozenset(),
        first_second=first_second,
        max_boxes=int(np.diff(key_frames.starts).max()),
    )


def _with_boxes(key_frames: KeyFrames) -> KeyFrames:
    """Returns the key frames that have boxes."""
    counts = np.diff(key_frames.starts)
    rows = np.flatnonzero(counts)
    return KeyFrames(
        key_frames.videos, key_frames.video[rows], key_frames.second[rows],
        np.append(key_frames.starts[rows], len(key_frames.box)),
        key_frames.box, key_frames.labels, key_frames.score,
    )  # fmt: skip


def _files(
    folder: Path, prefix: str, key_frames: KeyFrames, lists: str, max_missing: float
) -> tuple[str, ...]:
    """Returns the folder of frames or the file of each video.

    Raises:
      UserError: too many videos have neither; the message counts them.
    """
    parents = [folder / prefix] if prefix else [folder / "frames", folder / "videos"]
    stored: dict[str, str] = {}
    for parent in reversed(parents):  # frames come first
        stored |= _stored(parent)
    videos = [key_frames.videos[video] for video in np.unique(key_frames.video).tolist()]
    absent = [name for name in videos if name not in stored]
    if absent:
        reason = (
            f"{len(absent)} of the {len(videos)} videos of {lists} are neither folders of frames "
            f"nor video files in {' or '.join(map(str, parents))}, for example {absent[0]}"
        )
        if len(absent) > max_missing * len(videos):
            raise UserError(f"{reason}: add them, or remove their lines")
        print(f"note: {reason}", file=sys.stderr, flush=True)
    return tuple(stored.get(name, str(parents[-1] / name)) for name in key_frames.videos)


def _stored(parent: Path) -> Mapping[str, str]:
    """Returns the path of each video in a folder, by its name."""
    try:
        entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
    except OSError:
        return {}
    files = {
        Path(entry.name).stem: entry.path
        for entry in entries
        if entry.name.lower().endswith(VIDEO_SUFFIXES) and not entry.name.startswith(".")
    }
    return files | {entry.name: entry.path for entry in entries if entry.is_dir()}


@functools.lru_cache(maxsize=1000)
def _packet_list(path: str) -> Packets:
    with Video(path) as video:
        return video.packet_list


@dataclass(frozen=True)
class _Numbered(Sequence[str]):
    """Paths of frames that count up: `stem`, the number with leading zeros, `suffix`."""

    stem: str
    first: int
    digits: int
    suffix: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return f"{self.stem}{self.first + index:0{self.digits}d}{self.suffix}"


@functools.lru_cache(maxsize=1000)
def _frame_paths(folder: str) -> Sequence[str]:
    """Lists the frames of a video, 27,000 for AVA, once per process.

    Paths that count up are stored in a few bytes.

    Raises:
      DecodeError: the folder cannot be listed or has no frames.
    """
    try:
        names = sorted(frame_files(folder), key=natural_order)
    except OSError as error:
        raise DecodeError(folder, str(error.strerror).lower()) from error
    paths = tuple(f"{folder}/{name}" for name in names)
    if match := re.fullmatch(r"(.*?)(\d+)(\D*)", paths[0]):
        stem, first, suffix = match.groups()
        numbered = _Numbered(stem, int(first), len(first), suffix, len(paths))
        if all(a == b for a, b in zip(paths, numbered, strict=True)):
            return numbered
    return paths
