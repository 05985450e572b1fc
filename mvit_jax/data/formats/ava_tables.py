"""AVA (Gu et al. 2018): csv files of labels and person boxes, excluded key frames, and classes.

A key frame is a second of a video. The files have no header, and coordinates are fractions of the
frame:

* labels: `video,second,x1,y1,x2,y2,action,person`, one line per label of a box. The person's number
  may be absent. A line `video,second` is a key frame without boxes.
* person boxes: `video,second,x1,y1,x2,y2,action,score`. An empty action, or -1, is no label.
* excluded key frames: `video,second`.

Lines of one box are those whose coordinates are written alike, as in PySlowFast: 0.1 and 0.100 are
two boxes. Leading zeros of seconds, white space around fields, quoted fields, blank lines, Windows
line ends and a byte order mark are accepted.
"""

import csv
import functools
import math
import os
import re
import sys
from array import array
from bisect import bisect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Int, Int32, Int64, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded, write_atomically
from mvit_jax.common.text import plural

SECONDS = range(902, 1799)
"""Seconds of AVA's key frames in the film; its videos are minutes 15 to 30."""

CLASSES = 80
"""Number of AVA's classes, of which 60 are evaluated."""

_SHOWN = 20  # lines that an error describes
_MAX_CLASSES = 10_000  # of a class list; each box has a byte for each


# eq=False, repr=False: equality and repr of arrays with hundreds of thousands of rows.
@dataclass(frozen=True, eq=False, repr=False)
class KeyFrames:
    """Key frames with their boxes, sorted by video, then by second.

    Attributes:
      videos: names of the videos, in the order of the frame list.
      video: position of each key frame's video in `videos`.
      second: second of each key frame.
      starts: position of each key frame's first box, and the number of boxes.
      box: x1, y1, x2, y2 of each box, as fractions of the frame. The boxes of a key frame are in
        the order of their first lines, those of the label files before others.
      labels: 1 for each class of a box, or its number of lines in label files if it is repeated;
        column 0 is the class with id 1.
      score: score of the person detector, 1 for boxes of label files.
    """

    videos: tuple[str, ...]
    video: Int32[np.ndarray, " frames"]
    second: Int32[np.ndarray, " frames"]
    starts: Int64[np.ndarray, " offsets"]
    box: Float64[np.ndarray, "boxes 4"]
    labels: UInt8[np.ndarray, "boxes classes"]
    score: Float64[np.ndarray, " boxes"]

    def __len__(self) -> int:
        return len(self.video)

    def rows(self, index: int) -> slice:
        """Returns the rows of `box`, `labels` and `score` that belong to key frame `index`."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))


@dataclass(frozen=True)
class ClassList:
    """The evaluated classes.

    Attributes:
      names: name of each id, ascending.
      groups: ids of each group of classes. AVA's are poses, manipulation of objects and interaction
        of persons.
    """

    names: dict[int, str]
    groups: dict[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """Number of classes, the largest id. AVA lists 60 of its 80."""
        return max(self.names)

    def all_names(self) -> tuple[str, ...]:
        """Returns the name of each class from id 1 on, "action N" for one that is not listed."""
        return tuple(self.names.get(i, f"action {i}") for i in range(1, self.count + 1))


def read_key_frames(
    label_files: Sequence[str | os.PathLike[str]],
    box_files: Sequence[str | os.PathLike[str]] = (),
    *,
    classes: int = CLASSES,
    min_score: float = 0.9,
    videos: Sequence[str] | None = None,
    seconds: range = SECONDS,
) -> KeyFrames:
    """Reads label files, then files of person boxes, whose labels are added to equal boxes.

    1.7 million lines take 10 seconds of one core (`python -m benchmarks.detection`, 2026-12-01).

    A note on stderr counts the boxes without area.

    Args:
      label_files: csv files of the truth.
      box_files: csv files of detected persons. A label file may not be among them.
      classes: number of classes; their ids are from 1.
      min_score: smallest score of a detected person. Lines below it are checked and left out.
      videos: names of the videos, as of a frame list (`frame_lists.read_frame_list`). None for the
        videos of the files, in the order of their first lines.
      seconds: range of the key frames' seconds.

    Raises:
      UserError: a file does not exist or has no boxes, a video of `videos` has no line, or lines
        are broken or contradict each other. The first 20 are listed, with their reasons.
    """
    problems = _Problems()
    table = _Table(classes, seconds, videos, problems)
    for file in label_files:
        table.read_labels(expanded(file))
    table.note_repeated_labels()
    for file in box_files:
        table.read_boxes(expanded(file), min_score)
    problems.raise_any()
    table.note_flat_boxes()
    key_frames = table.key_frames()
    lowest = min_score if box_files else 0.0
    _check_videos(key_frames, videos is not None, [*label_files, *box_files], lowest)
    return key_frames


def read_excluded(file: str | os.PathLike[str]) -> frozenset[tuple[str, int]]:
    """Reads the (video, second) pairs that AVA excludes from the metric.

    Raises:
      UserError: the file does not exist, or a line is not `video,second`.
    """
    problems, excluded = _Problems(), set()
    for number, fields in _rows(expanded(file), problems):
        try:
            if len(fields) != 2:
                raise _BadRowError(f"{plural(len(fields), 'column')} instead of `video,second`")
            excluded.add((fields[0], _whole(fields[1], "second")))
        except _BadRowError as bad:
            problems.add(expanded(file), number, bad.reason)
    problems.raise_any()
    return frozenset(excluded)


# A comment, the start of an item, a bracket, a field with its value, or a wrong character.
_TOKEN = re.compile(
    r"""\#[^\n]*|\w+\s*:?\s*(?P<open>\{)|(?P<close>\})
    |(?P<key>\w+)\s*:\s*(?P<value>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s{}"';,]+)[;,]?
    |(?P<wrong>\S+)""",
    re.VERBOSE,
)


def read_class_list(file: str | os.PathLike[str]) -> ClassList:
    """Reads a list of the evaluated classes in protobuf's text format (`.pbtxt`).

    An item is `item { name: "stand" id: 12 label_type: PERSON_MOVEMENT }`, in any layout. Items may
    have another name, and `label_id` stands for `id`. `label_type` is the group; without it, ids 1
    to 14 are poses, 15 to 63 concern objects, and others persons. Other fields are ignored.

    Raises:
      UserError: the file does not exist, is in another format or has no items, or an item has no
        name, no id or the id of another item.
    """
    path = expanded(file)
    text, problems = "".join(_lines(path)), _Problems()
    names: dict[int, str] = {}
    groups: dict[str, tuple[int, ...]] = {}
    item: dict[str, str] | None = None
    for token in _TOKEN.finditer(text):
        line = text.count("\n", 0, token.start()) + 1
        key, value = token["key"], token["value"]
        try:
            if token[0][0] == "#":
                continue
            if token["wrong"] or (item is None) != bool(token["open"]):
                raise _BadRowError(f"{token[0][:50]!r} is not part of `item {{ name: id: }}`")
            if token["open"]:
                item = {}
            elif key and item is not None:
                item["id" if key == "label_id" else key] = value
            elif token["close"] and item is not None:
                complete, item = item, None
                number = _add_class(names, complete)
                group = _group(number, complete.get("label_type", ""))
                groups[group] = (*groups.get(group, ()), number)
        except _BadRowError as bad:
            problems.add(path, line, bad.reason)
    problems.raise_any()
    if item is not None:
        raise UserError(f"{path} ends within an item: it lacks a closing bracket")
    if not names:
        raise UserError(f"{path} has no classes: it should hold `item {{ name: ... id: ... }}`")
    return ClassList(dict(sorted(names.items())), {k: tuple(sorted(v)) for k, v in groups.items()})


_GROUPS = {
    "PERSON_MOVEMENT": "pose",
    "OBJECT_MANIPULATION": "object",
    "PERSON_INTERACTION": "person",
}


def _group(number: int, label_type: str) -> str:
    """Returns the group of a class; without a type, that of AVA's class with this id."""
    if label_type:
        return _GROUPS.get(label_type, label_type.lower())
    return "pose" if number < 15 else "object" if number < 64 else "person"


def _add_class(names: dict[int, str], item: dict[str, str]) -> int:
    if "name" not in item or "id" not in item:
        missing = "name" if "name" not in item else "id"
        raise _BadRowError(f"the item that ends here has no {missing}")
    number = _whole(item["id"], "id")
    if not 1 <= number <= _MAX_CLASSES:
        raise _BadRowError(f"the id {number} is not from 1 to {_MAX_CLASSES:,}")
    if number in names:
        raise _BadRowError(f"the id {number} is that of {names[number]!r} already")
    name = item["name"]
    if name[0] not in "\"'":
        raise _BadRowError(f"the name {name[:50]} is not in quotes")
    names[number] = re.sub(r"\\(.)", r"\1", name[1:-1])
    return number


def write_detections(
    path: str | os.PathLike[str],
    videos: Sequence[str],
    seconds: Int[np.ndarray, " boxes"],
    box: Float[np.ndarray, "boxes 4"],
    scores: Float[np.ndarray, "boxes actions"],
    actions: Sequence[int],
) -> None:
    """Writes detections atomically in the format of the ActivityNet challenge.

    A line is `video,second,x1,y1,x2,y2,action,score`, with 3 decimals of the coordinates and 4 of
    the score. The lines of a box follow each other, in the order of `actions`.

    Args:
      path: the csv file.
      videos: name of each box's video.
      seconds: second of each box's key frame.
      box: x1, y1, x2, y2, as fractions of the frame.
      scores: score of each box for each of `actions`.
      actions: ids of the classes.

    Raises:
      UserError: the file cannot be written.
    """
    middles = [f",{action}," for action in actions]
    chunks = []
    for video, second, corners, values in zip(
        videos, seconds.tolist(), box.tolist(), scores.tolist(), strict=True
    ):
        if "," in video or '"' in video:
            video = '"' + video.replace('"', '""') + '"'
        start = f"{video},{second:04d}," + ",".join(f"{corner:.3f}" for corner in corners)
        lines = [
            f"{start}{middle}{value:.4f}\n" for middle, value in zip(middles, values, strict=True)
        ]
        chunks.append("".join(lines).encode())
    write_atomically(path, b"".join(chunks))


class _BadRowError(Exception):
    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Problems:
    """Broken lines of all files; the first ones are described in one error."""

    def __init__(self):
        self._count = 0
        self._shown: list[tuple[Path, int, str]] = []

    def add(self, file: Path, line: int, reason: str) -> None:
        self._count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append((file, line, reason))

    def raise_any(self) -> None:
        if not self._count:
            return
        parts, previous = [], None
        for file, line, reason in self._shown:
            parts.append(f"{'' if file == previous else f'{file}, '}line {line}: {reason}")
            previous = file
        if self._count > len(self._shown):
            parts.append(f"and {self._count - len(self._shown):,} more")
        raise UserError("; ".join(parts))


class _Table:
    """Boxes of all files so far, in the order of their first lines."""

    def __init__(
        self, classes: int, seconds: range, videos: Sequence[str] | None, problems: _Problems
    ):
        self._classes, self._seconds, self._problems = classes, seconds, problems
        self._listed = videos is not None
        self._videos = {name: number for number, name in enumerate(videos or ())}
        # Few texts recur in many lines.
        self._second = functools.cache(self._parse_second)
        self._column = functools.cache(self._parse_action)
        self._boxes: dict[tuple[int, str, str, str, str], int] = {}
        self._frame, self._corners, self._score = array("q"), array("d"), array("d")
        self._empty_frames: set[int] = set()  # mentioned without boxes
        # A pair is box * classes + column. Those of label files come first, and have lines.
        self._pairs, self._lines = array("q"), array("q")
        self._files: list[tuple[int, Path]] = []  # first pair of each label file
        self._flat = 0
        self._first_flat = ""

    def read_labels(self, file: Path) -> None:
        self._files.append((len(self._pairs), file))

        def add(fields: list[str], number: int) -> None:
            if len(fields) == 2:
                self._empty_frames.add(self._frame_code(fields))
                return
            if len(fields) not in (7, 8):
                raise _BadRowError(
                    f"{plural(len(fields), 'column')} instead of the 8 of labels, "
                    "`video,second,x1,y1,x2,y2,action,person`"
                )
            if len(fields) == 8 and not fields[7].isdecimal():
                raise _BadRowError(f"the person {fields[7][:50]!r} is not a whole number")
            column = self._column(fields[6])
            box = self._box(fields, self._corners_of(fields), 1.0, file, number)
            self._pairs.append(box * self._classes + column)
            self._lines.append(number)

        self._read(file, add)

    def read_boxes(self, file: Path, min_score: float) -> None:
        def add(fields: list[str], number: int) -> None:
            if len(fields) != 8:
                raise _BadRowError(
                    f"{plural(len(fields), 'column')} instead of the 8 of person boxes, "
                    "`video,second,x1,y1,x2,y2,action,score`"
                )
            action, score = fields[6], _number(fields[7], "score")
            if not 0 <= score <= 1:
                raise _BadRowError(
                    f"the score {fields[7]} is not from 0 to 1 (the last column of a label file is "
                    "a person's number: pass such a file as labels)"
                )
            column = None if action in ("", "-1") else self._column(action)
            corners = self._corners_of(fields)
            if score < min_score:
                self._frame_code(fields)  # checks video and second
                return
            box = self._box(fields, corners, score, file, number)
            if column is not None:
                self._pairs.append(box * self._classes + column)

        self._read(file, add)

    def _read(self, file: Path, add: Callable[[list[str], int], None]) -> None:
        for number, fields in _rows(file, self._problems):
            try:
                add(fields, number)
            except _BadRowError as bad:
                header = number == 1 and len(fields) > 1 and fields[1][:1].isalpha()
                reason = "a header, which AVA's files do not have: remove the line"
                self._problems.add(file, number, reason if header else bad.reason)

    def _box(
        self,
        fields: list[str],
        corners: tuple[float, float, float, float],
        score: float,
        file: Path,
        line: int,
    ) -> int:
        """Returns the number of a box, which is a new one if it has not been listed before."""
        frame = self._frame_code(fields)
        key = (frame, fields[2], fields[3], fields[4], fields[5])
        box = self._boxes.setdefault(key, len(self._boxes))
        if box == len(self._score):
            self._frame.append(frame)
            self._corners.extend(corners)
            self._score.append(score)
            if corners[0] == corners[2] or corners[1] == corners[3]:
                self._flat += 1
                self._first_flat = self._first_flat or f"{file}, line {line}"
        elif score > self._score[box]:
            self._score[box] = score
        return box

    def _frame_code(self, fields: list[str]) -> int:
        """Returns a number that orders key frames by video, then by second."""
        second, name = self._second(fields[1]), fields[0]
        video = self._videos.get(name)
        if video is None:
            if not name:
                raise _BadRowError("the name of the video is empty")
            if self._listed:
                raise _BadRowError(f"the video {name[:50]!r} is not in the frame list")
            video = self._videos[name] = len(self._videos)
        return video * self._seconds.stop + second

    def _parse_second(self, text: str) -> int:
        second = _whole(text, "second")
        if second not in self._seconds:
            first, last = self._seconds[0], self._seconds[-1]
            hint = " (for other data set data.first_second)" if self._seconds == SECONDS else ""
            raise _BadRowError(f"the second {second} is not from {first} to {last}{hint}")
        return second

    def _parse_action(self, text: str) -> int:
        action = _whole(text, "action")
        if not 1 <= action <= self._classes:
            raise _BadRowError(f"the action {action} is not from 1 to {self._classes}")
        return action - 1

    @staticmethod
    def _corners_of(fields: list[str]) -> tuple[float, float, float, float]:
        try:
            x1, y1, x2, y2 = map(float, fields[2:6])
            if 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1:
                return x1, y1, x2, y2
        except ValueError:
            pass
        names = ("x1", "y1", "x2", "y2")
        for text, name in zip(fields[2:6], names, strict=True):
            if not 0 <= _number(text, name) <= 1:
                raise _BadRowError(
                    f"{name} is {text}, not from 0 to 1 (divide pixels by the size of the frame)"
                )
        axis = "x" if float(fields[2]) > float(fields[4]) else "y"
        raise _BadRowError(f"{axis}1 is greater than {axis}2")

    def note_repeated_labels(self) -> None:
        """Prints how many lines of label files repeat a label of a box."""
        pairs = np.array(self._pairs, np.int64)
        first, inverse = np.unique(pairs, return_index=True, return_inverse=True)[1:]
        again = np.flatnonzero(first[inverse] != np.arange(len(pairs)))
        if len(again):
            file, line = self._origin(int(again[0]))
            _print_note(
                f"lines that repeat a label of a box: {len(again):,}, the first in {file}, line "
                f"{line}; the mAP counts them as further boxes, as the original does"
            )

    def _origin(self, pair: int) -> tuple[Path, int]:
        position = bisect(self._files, pair, key=lambda start: start[0]) - 1
        return self._files[position][1], self._lines[pair]

    def note_flat_boxes(self) -> None:
        if self._flat:
            _print_note(
                f"boxes without width or height: {self._flat:,}, the first in {self._first_flat}"
            )

    def key_frames(self) -> KeyFrames:
        codes = np.array(self._frame, np.int64)
        by_frame = np.argsort(codes, kind="stable")
        frames = np.union1d(codes, np.array([*self._empty_frames], np.int64))
        position = np.empty_like(by_frame)
        position[by_frame] = np.arange(len(codes))
        box, column = np.divmod(np.array(self._pairs, np.int64), self._classes)
        labels, listed = np.zeros((len(codes), self._classes), np.uint8), len(self._lines)
        pairs, counts = np.unique(np.array(self._pairs[:listed], np.int64), return_counts=True)
        true_box, true_column = np.divmod(pairs, self._classes)
        labels[position[true_box], true_column] = np.minimum(counts, 255)
        detected = position[box[listed:]], column[listed:]
        labels[detected] = np.maximum(labels[detected], 1)
        video, second = np.divmod(frames, self._seconds.stop)
        return KeyFrames(
            tuple(self._videos),
            video.astype(np.int32),
            second.astype(np.int32),
            np.append(np.searchsorted(codes[by_frame], frames), len(codes)),
            np.array(self._corners, np.float64).reshape(-1, 4)[by_frame],
            labels,
            np.array(self._score, np.float64)[by_frame],
        )


def _print_note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _check_videos(
    key_frames: KeyFrames, listed: bool, files: Collection[str | os.PathLike[str]], score: float
) -> None:
    """Raises `UserError` if there are no boxes, or if a listed video has no key frame."""
    names = " and ".join(map(str, files))
    with_score = f" of score {score:g} or more" if score else ""
    if not len(key_frames.box):
        raise UserError(f"there are no boxes{with_score} in {names}: check the files")
    absent = np.setdiff1d(np.arange(len(key_frames.videos)), key_frames.video)
    if listed and len(absent):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(
            f"there is no box{with_score} of the video {key_frames.videos[absent[0]]}{more} of the "
            f"frame list in {names}: add boxes, or remove the video from the list"
        )


def _rows(file: Path, problems: _Problems) -> Iterator[tuple[int, list[str]]]:
    """Yields number and fields of the lines that are not blank."""
    for number, line in enumerate(_lines(file), start=1):
        if '"' in line:
            try:
                fields = next(csv.reader([line], strict=True))
            except csv.Error as error:
                problems.add(file, number, str(error))
                continue
        else:
            fields = line.rstrip("\n").split(",")
        if " " in line or "\t" in line:
            fields = [field.strip() for field in fields]
        if fields != [""]:
            yield number, fields


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as text:
            yield from text
    except FileNotFoundError:
        raise UserError(f"there is no file {file}: check its name") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {str(error.strerror).lower()}") from None


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise _BadRowError(f"the {name} {text[:50]!r} is not a whole number")
    return int(text)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _BadRowError(f"{name} is {text[:50]!r}, which is not a number")
    return value
