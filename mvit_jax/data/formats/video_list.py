"""Lists of video and image files, and names of classes."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath
from mvit_jax.data import video
from mvit_jax.data.images import Footage


# eq=False: dataclass equality would compare the label arrays elementwise and raise. repr=False:
# hundreds of thousands of paths are no message.
@dataclass(frozen=True, eq=False, repr=False)
class VideoList:
    """The videos or images of one split, files in the order of their list; a `sources.Source`.

    Attributes:
      paths: absolute path of each file.
      labels: class of each file, in `range(len(class_names))`.
      class_names: name of each class.
      list_file: the list that was read, for messages.
    """

    paths: tuple[str, ...]
    labels: Int32[np.ndarray, " videos"]
    class_names: tuple[str, ...]
    list_file: str

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int, frames: Int[np.ndarray, " frames"] | None = None) -> int:
        return int(self.labels[index])

    def item(self, index: int) -> str:
        return self.paths[index]

    def opened(self, index: int, clip_frames: int) -> AbstractContextManager[Footage]:
        return video.opened(self.paths[index], clip_frames)


def read_video_list(
    folder: str | os.PathLike[str],
    list_name: str,
    num_classes: int | None = None,
    *,
    prefix: str = "",
    separator: str | None = None,
    max_missing: float = 0.0,
) -> VideoList:
    """Reads a list of lines `path label`, the format of the Kinetics csv files of PySlowFast.

    The label is the last field, so a path may hold spaces; blank lines are skipped. Class names
    are the lines of `folder/labels.txt`; without that file they are "0", "1", ...

    Args:
      folder: where the list is; `~` is the user's home.
      list_name: file name of the list, for example `train.csv`.
      num_classes: number of classes; by default what `labels.txt` holds, or without that file
        one more than the largest label of the list.
      prefix: folder that relative paths start at, itself relative to `folder`.
      separator: what stands between path and label, like ","; None for white space.
      max_missing: share of the files at which missing ones are an error. Fewer are told on
        stderr, and remain in the list, where they cannot be decoded.

    Raises:
      UserError: no such folder, list or video file, a line that is not `path label`, a label
        outside of the classes, or an empty list. Names the file and line.
    """
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise UserError(
            f"there is no data folder {root}: make the default data set with "
            f"`python -m mvit_jax.prepare moving_digits --out={root}`, "
            "or name the folder that holds your lists of videos"
        )
    list_file = root / list_name
    if not list_file.is_file():
        raise UserError(
            f"there is no list {list_file}: it should hold one line `path label` per video"
        )
    lines = read_lines(list_file)
    base = f"{root / Path(prefix).expanduser()}/"
    try:
        paths, labels = _parse(lines, base, separator)
    except _BadLineError as bad:
        reason = _explained(bad, lines, separator)
        raise UserError(f"{list_file}, line {bad.number}{reason}") from None
    if not paths:
        raise UserError(f"{list_file} lists no videos: it should hold lines `path label`")
    class_names = _class_names(root, num_classes, max(1, max(labels) + 1))
    _check_labels(list_file, lines, labels, len(class_names))
    _check_files(list_file, lines, paths, max_missing)
    return VideoList(tuple(paths), np.asarray(labels, np.int32), class_names, str(list_file))


def read_class_names(file: AnyPath) -> tuple[str, ...]:
    """The lines of a `labels.txt`, that of label 0 first.

    Raises:
      UserError: the file is not UTF-8 text, or holds no names.
    """
    names = tuple(name.strip() for name in read_lines(file) if name.strip())
    if not names:
        raise UserError(f"{file} is empty: write the names of the classes there, one a line")
    return names


def read_lines(file: AnyPath) -> list[str]:
    """The lines of a text file; raises `UserError` where it is not UTF-8 or cannot be read."""
    try:
        # utf-8-sig, as spreadsheets put a byte order mark before what would be the first path.
        # Not splitlines, which cuts at characters that names of files may hold.
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {str(error.strerror).lower()}") from None


def names_in(folders: Iterable[str], chosen: Callable[[os.DirEntry[str]], bool]) -> list[list[str]]:
    """Names of the chosen entries of each folder, sorted; none of a folder that cannot be read."""

    def names(folder: str) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries if chosen(entry))
        except OSError:
            return []

    # Folders are listed instead of asking for each file: the 240,000 files of Kinetics lie in 400
    # folders, and on a network disk every question takes about a millisecond, whatever the number
    # of others that are under way.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(names, folders))


class _BadLineError(Exception):
    def __init__(self, number: int, line: str):
        super().__init__(number, line)
        self.number, self.line = number, line


def _parse(lines: Sequence[str], base: str, separator: str | None) -> tuple[list[str], list[int]]:
    """Gives absolute path and label of each line that is not blank."""
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        try:
            path, label = line.rsplit(separator, 1)
            labels.append(int(label))
        except ValueError:
            raise _BadLineError(number, line) from None
        # os.path.join would take twice as long for all of it.
        path = path.rstrip()
        paths.append(path if path.startswith("/") else base + path)
    return paths, labels


_SEPARATORS = (None, ",", ";", "\t", "|")


def _explained(bad: _BadLineError, lines: Sequence[str], separator: str | None) -> str:
    """What is wrong with the line: a header, another separator, or something of its own."""
    told = [line for line in lines if line.strip()][:20]
    if told[0].strip() == bad.line:
        for other in (separator, *_SEPARATORS):
            for header in (0, 1):
                if not _fits(told[header:], other):
                    continue
                problems = [" looks like a header: take it out"] * header
                if other != separator:
                    problems.append(_other_separator(other))
                return ", and ".join(problems) if header else f": {problems[0]}"
    between = "white space" if separator is None else repr(separator)
    fields = bad.line.rsplit(separator, 1)
    if len(fields) != 2:
        return f": {bad.line[:200]!r} should be a path and a label with {between} between them"
    return f": the label {fields[1][:50]!r} is not a whole number"


def _fits(lines: Sequence[str], separator: str | None) -> bool:
    try:
        return bool(_parse(lines, "", separator)[0])
    except _BadLineError:
        return False


def _other_separator(separator: str | None) -> str:
    if separator is None:
        return "the separator seems to be white space: leave data.separator unset"
    return f"the separator seems to be {separator!r}: set data.separator to it"


_MOST_CLASSES = 1_000_000  # that are believed without a list of their names


def _class_names(root: Path, num_classes: int | None, labels_seen: int) -> tuple[str, ...]:
    file = root / "labels.txt"
    if not file.is_file():
        if labels_seen > _MOST_CLASSES:
            raise UserError(
                f"labels go up to {labels_seen - 1}, which is no number of a class: see that the "
                f"last field of each line is the label, or name the classes in {file}"
            )
        count = labels_seen if num_classes is None else num_classes
        return tuple(str(label) for label in range(count))
    names = read_class_names(file)
    if num_classes is not None and len(names) != num_classes:
        raise UserError(
            f"{file} names {len(names)} classes, but {num_classes} classes were asked for"
        )
    return names


def _check_labels(
    list_file: Path, lines: Sequence[str], labels: Sequence[int], classes: int
) -> None:
    if min(labels) >= 0 and max(labels) < classes:
        return
    place = next(place for place, label in enumerate(labels) if not 0 <= label < classes)
    raise UserError(
        f"{list_file}, line {_line_number(lines, place)}: the label {labels[place]} should be from "
        f"0 to {classes - 1}, as there are {classes} classes"
    )


def _check_files(
    list_file: Path, lines: Sequence[str], paths: Sequence[str], max_missing: float
) -> None:
    by_folder: dict[str, list[int]] = {}
    names = []
    for place, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder or "/", []).append(place)
        names.append(name)
    missing: list[int] = []
    for places, found in zip(by_folder.values(), names_in(by_folder, lambda _: True), strict=True):
        there = set(found)
        missing += [place for place in places if names[place] not in there]
    if not missing:
        return
    place = min(missing)
    said = (
        f"{list_file}, line {_line_number(lines, place)}: there is no file {paths[place]} "
        f"({len(missing)} of the {len(paths)} listed files are missing)"
    )
    if len(missing) >= max_missing * len(paths):
        end = paths[place][-1:]
        hint = f"; {_other_separator(end)}" if end in _SEPARATORS else ""
        raise UserError(said + hint)
    print(f"note: {said}", file=sys.stderr, flush=True)


def _line_number(lines: Sequence[str], place: int) -> int:
    """The number of the line that element `place` comes from."""
    told = (number for number, line in enumerate(lines, start=1) if line.strip())
    return next(number for found, number in enumerate(told) if found == place)
