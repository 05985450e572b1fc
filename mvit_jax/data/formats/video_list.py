"""Lists of video and image files, and class names."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.common.files import AnyPath, expanded
from mvit_jax.data.media import video
from mvit_jax.data.media.images import Footage


# eq=False: dataclass equality would compare the label arrays elementwise and raise.
# repr=False: the repr would print hundreds of thousands of paths.
@dataclass(frozen=True, eq=False, repr=False)
class VideoList:
    """Video or image files of one split, in the order of their list; a `data.source.Source`.

    Attributes:
      paths: absolute path of each file.
      labels: class of each file, in `range(len(class_names))`; for multi-label data, a multi-hot
        vector of each.
      class_names: name of each class.
      list_file: path of the list, for messages.
    """

    paths: tuple[str, ...]
    labels: Int32[np.ndarray, " videos"] | UInt8[np.ndarray, "videos classes"]
    class_names: tuple[str, ...]
    list_file: str

    def __len__(self) -> int:
        return len(self.paths)

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> int | UInt8[np.ndarray, " classes"]:
        return int(self.labels[index]) if self.labels.ndim == 1 else self.labels[index].copy()

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
    multi_label: bool = False,
) -> VideoList:
    """Reads a list of lines `path label`, the format of PySlowFast's csv files of Kinetics.

    The label is the last field, so paths may contain spaces. Fields may be quoted, as in csv files
    of pandas. Blank lines are skipped. A note on stderr counts the files that are listed again. The
    class names are the lines of `folder/labels.txt`; without this file they are "0", "1", ...

    Args:
      folder: folder of the list; `~` is the user's home.
      list_name: file name of the list, for example `train.csv`.
      num_classes: number of classes; by default the number of lines of `labels.txt`, or without
        this file the largest label of the list plus one.
      prefix: folder of relative paths, itself relative to `folder`.
      separator: separator of path and label, for example ","; None for white space.
      max_missing: share of missing files from which an error is raised. Below this share, the
        number of missing files is printed on stderr. These files stay in the list and fail to
        decode.
      multi_label: True for lines of a path and any number of labels, with commas or semicolons
        between them (semicolons or quotes if the separator is a comma), like `path 4,17`;
        `path ""` for none.

    Raises:
      UserError: the folder, the list or a video file does not exist, a line is not `path label`,
        a label is outside of the classes, or the list is empty.
    """
    root = expanded(folder).absolute()
    if not root.is_dir():
        raise MissingDataError(
            f"there is no data folder {root}: make the default data set with "
            f"`python -m mvit_jax.prepare moving_digits --out={root}`, "
            "or name the folder that holds your lists of videos"
        )
    list_file = root / list_name
    if not list_file.is_file():
        raise MissingDataError(
            f"there is no list {list_file}: it should hold one line `path label` per video"
        )
    lines = read_lines(list_file)
    base = f"{root / expanded(prefix)}/"
    try:
        paths, labels = _parse(lines, base, separator, multi_label)
    except _BadLineError as bad:
        reason = _explain(bad, lines, separator, multi_label)
        raise UserError(f"{list_file}, line {bad.number}{reason}") from None
    if not paths:
        raise UserError(f"{list_file} lists no videos: it should hold lines `path label`")
    class_names = _class_names(root, num_classes, 1 + max([0, *_flat(labels)]))
    _check_labels(list_file, lines, labels, len(class_names))
    _check_files(list_file, lines, paths, max_missing)
    _note_repeated(list_file, lines, paths, labels)
    array = multi_hot(labels, len(class_names)) if multi_label else np.array(labels, np.int32)
    return VideoList(tuple(paths), array, class_names, str(list_file))


def multi_hot(
    labels: Sequence[Sequence[int]], classes: int
) -> UInt8[np.ndarray, "videos {classes}"]:
    """Returns a vector for each set of labels, with 1 for each label."""
    array = np.zeros((len(labels), classes), np.uint8)
    for row, numbers in zip(array, labels, strict=True):
        row[list(numbers)] = 1
    return array


def read_class_names(file: AnyPath) -> tuple[str, ...]:
    """Reads the class names from a `labels.txt`, in the order of the labels.

    Raises:
      UserError: the file is not UTF-8 text, has no names, or a blank line before a name.
    """
    lines = "\n".join(line.strip() for line in read_lines(file)).rstrip("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{file} is empty: write the names of the classes there, one per line")
    if "" in lines:
        raise UserError(
            f"{file}, line {lines.index('') + 1} is blank, so the labels of the classes below it "
            "are unclear: remove the line, or write the name of the class there"
        )
    return tuple(lines)


def read_lines(file: AnyPath) -> list[str]:
    """Reads the lines of a text file; raises `UserError` if it is not UTF-8 or not readable."""
    try:
        # utf-8-sig, because spreadsheets write a byte order mark before the first path.
        # Not splitlines, which also splits at characters that file names may contain.
        return file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {str(error.strerror).lower()}") from None


def list_names(
    folders: Iterable[str], chosen: Callable[[os.DirEntry[str]], bool], *, slash: bool = False
) -> list[list[str]]:
    """Returns the sorted names of each folder's chosen entries; none for an unreadable folder.

    Args:
      folders: paths of the folders.
      chosen: returns True for the entries to list.
      slash: append "/" to the names of folders.
    """

    def names(folder: str) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return sorted(
                    f"{entry.name}/" if slash and entry.is_dir() else entry.name
                    for entry in entries
                    if chosen(entry)
                )
        except OSError:
            return []

    # Lists folders instead of testing each file: Kinetics has 240,000 files in 400 folders. On a
    # network disk, a request takes about a millisecond, even while other requests run: so folders
    # are listed in threads.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(names, folders))


class _BadLineError(Exception):
    def __init__(self, number: int, line: str):
        super().__init__(number, line)
        self.number, self.line = number, line


def _parse(
    lines: Sequence[str], base: str, separator: str | None, multi_label: bool
) -> tuple[list[str], list[Any]]:
    """Returns the absolute paths and the labels of the lines that are not blank.

    A label is a number, or in multi-label lists a tuple of numbers.
    """
    parse = _label_set if multi_label else int
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        try:
            path, label = _split(line, separator)
            labels.append(parse(_unquoted(label)))
        except ValueError:
            raise _BadLineError(number, line) from None
        # os.path.join would double the time of this loop.
        path = _unquoted(path.rstrip())
        paths.append(path if path.startswith("/") else base + path)
    return paths, labels


def _split(line: str, separator: str | None) -> list[str]:
    """Returns path and label, the last field, which may hold the separator within quotes."""
    if line.endswith('"'):
        opening = line.rfind('"', 0, -1)
        fields = f"{line[: max(opening, 0)]}_".rsplit(separator, 1)
        if len(fields) == 2 and fields[1].strip(" ") == "_":
            return [fields[0], line[opening:]]
    return line.rsplit(separator, 1)


def _unquoted(field: str) -> str:
    """Returns a field of a csv file without its quotes, if it has any."""
    if len(field) > 1 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"')
    return field


def _label_set(text: str) -> tuple[int, ...]:
    return tuple(sorted({*map(int, re.split("[,;]", text))})) if text else ()


_SEPARATORS = (None, ",", ";", "\t", "|")


def _explain(
    bad: _BadLineError, lines: Sequence[str], separator: str | None, multi_label: bool
) -> str:
    """Explains a bad line: it is a header, has another separator, or is wrong by itself."""
    if not multi_label and _fits([bad.line], separator, True):
        label = _unquoted(_split(bad.line, separator)[1])
        return f": {label[:50]!r} is not one label: set data.multi_label=True to read several"
    sample = [line for line in lines if line.strip()][:20]
    if sample[0].strip() == bad.line:
        for candidate in (separator, *_SEPARATORS):
            for header in (0, 1):
                if not _fits(sample[header:], candidate, multi_label):
                    continue
                problems = [" looks like a header: remove it"] * header
                if candidate != separator:
                    problems.append(_suggest_separator(candidate))
                return ", and ".join(problems) if header else f": {problems[0]}"
    between = "white space" if separator is None else repr(separator)
    fields = _split(bad.line, separator)
    if len(fields) != 2:
        return f": {bad.line[:200]!r} should be a path and a label with {between} between them"
    if multi_label:
        return f": the labels {fields[1][:50]!r} are not whole numbers, like '4,17'"
    return f": the label {fields[1][:50]!r} is not a whole number"


def _fits(lines: Sequence[str], separator: str | None, multi_label: bool) -> bool:
    try:
        return bool(_parse(lines, "", separator, multi_label)[0])
    except _BadLineError:
        return False


def _suggest_separator(separator: str | None) -> str:
    if separator is None:
        return "the separator seems to be white space: leave data.separator unset"
    return f"the separator seems to be {separator!r}: set data.separator to it"


_MAX_CLASSES = 1_000_000  # if there is no labels.txt


def _class_names(root: Path, num_classes: int | None, labels_seen: int) -> tuple[str, ...]:
    file = root / "labels.txt"
    if not file.is_file():
        if labels_seen > _MAX_CLASSES:
            raise UserError(
                f"labels go up to {labels_seen - 1}, too many for class numbers: check that the "
                f"last field of each line is the label, or name the classes in {file}"
            )
        count = labels_seen if num_classes is None else num_classes
        return tuple(str(label) for label in range(count))
    names = read_class_names(file)
    if num_classes is not None and len(names) != num_classes:
        raise UserError(
            f"{file} names {len(names)} classes, but {num_classes} classes are expected"
        )
    return names


def _flat(labels: Sequence[Any]) -> Sequence[int]:
    """Returns all labels of all elements."""
    if isinstance(labels[0], int):
        return labels
    return [number for label in labels for number in label]


def _check_labels(
    list_file: Path, lines: Sequence[str], labels: Sequence[Any], classes: int
) -> None:
    numbers = _flat(labels)
    if not numbers or (min(numbers) >= 0 and max(numbers) < classes):
        return
    pairs = ((index, number) for index, label in enumerate(labels) for number in _flat([label]))
    index, label = next(pair for pair in pairs if not 0 <= pair[1] < classes)
    raise UserError(
        f"{list_file}, line {_line_number(lines, index)}: the label {label} should be from "
        f"0 to {classes - 1}, as there are {classes} classes"
    )


def _check_files(
    list_file: Path, lines: Sequence[str], paths: Sequence[str], max_missing: float
) -> None:
    by_folder: dict[str, list[int]] = {}
    names = []
    for index, path in enumerate(paths):
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder or "/", []).append(index)
        names.append(name)
    missing: list[int] = []
    listings = list_names(by_folder, lambda _: True)
    for indices, listing in zip(by_folder.values(), listings, strict=True):
        existing = set(listing)
        missing += [index for index in indices if names[index] not in existing]
    if not missing:
        return
    first = min(missing)
    problem = (
        f"{list_file}, line {_line_number(lines, first)}: there is no file {paths[first]} "
        f"({len(missing)} of the {len(paths)} listed files are missing)"
    )
    if len(missing) >= max_missing * len(paths):
        end = paths[first][-1:]
        hint = f"; {_suggest_separator(end)}" if end in _SEPARATORS else ""
        raise UserError(problem + hint)
    print(f"note: {problem}", file=sys.stderr, flush=True)


def _note_repeated(
    list_file: Path, lines: Sequence[str], paths: Sequence[str], labels: Sequence[Any]
) -> None:
    """Prints how many lines name a file of an earlier line, if any do; other labels count first."""
    if len(set(paths)) == len(paths):
        return
    first: dict[str, int] = {}
    again = [i for i, path in enumerate(paths) if first.setdefault(path, i) != i]
    differing = [i for i in again if labels[i] != labels[first[paths[i]]]]
    example = (differing or again)[0]
    numbers = [_line_number(lines, i) for i in (first[paths[example]], example)]
    print(
        f"note: {list_file} names {len(again)} files again, {len(differing)} of them with another "
        f"label, for example {paths[example]} in the lines {numbers[0]} and {numbers[1]}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _line_number(lines: Sequence[str], index: int) -> int:
    """Returns the line number, from 1, of element `index` of the list."""
    numbers = (number for number, line in enumerate(lines, start=1) if line.strip())
    return next(number for element, number in enumerate(numbers) if element == index)
