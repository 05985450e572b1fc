"""What a data set is before anything is decoded, and lists of video and image files."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from mvit_jax.data import decoding
from mvit_jax.data.images import Frames
from mvit_jax.errors import UserError


@runtime_checkable  # for beartype, in the tests
class Source(Protocol):
    """One split of a data set: all that training and testing need to know of where it lies.

    Elements may be asked for in any order and from several threads at a time.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    @property
    def list_file(self) -> str:
        """What messages call the split, for example the path of its list."""
        ...

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Class of element `index`, in `range(len(class_names))`.

        Raises:
          DecodeError: the label cannot be read.
        """
        # Of one element, as a set that knows its labels only by reading its images may be large.
        ...

    def item(self, index: int) -> str:
        """What messages call element `index`, for example its path."""
        ...

    def opened(
        self, index: int, clip_frames: int
    ) -> AbstractContextManager[decoding.Video | Frames]:
        """Opens element `index` for clips of `clip_frames` frames.

        Raises:
          DecodeError: on entering, it is broken, or an image where a clip has several frames.
        """
        ...


# eq=False: dataclass equality would compare the label arrays elementwise and raise.
@dataclass(frozen=True, eq=False)
class VideoList:
    """The videos or images of one split, files in the order of their list; a `Source`.

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

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def item(self, index: int) -> str:
        return self.paths[index]

    def opened(
        self, index: int, clip_frames: int
    ) -> AbstractContextManager[decoding.Video | Frames]:
        return decoding.opened(self.paths[index], clip_frames)


def read_video_list(
    folder: str | os.PathLike[str], list_name: str, num_classes: int | None = None
) -> VideoList:
    """Reads a list of lines `path label`, the format of the Kinetics and SSv2 csv files.

    The label is the last field between white space, so a path may hold spaces; blank lines are
    skipped; relative paths start at `folder`. Class names are the lines of `folder/labels.txt`;
    without that file they are "0", "1", ...

    Args:
      folder: where the list is; `~` is the user's home.
      list_name: file name of the list, for example `train.csv`.
      num_classes: number of classes; by default what `labels.txt` holds, or without that file
        one more than the largest label of the list.

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
    lines, paths, labels = _parse(list_file, root)
    class_names = _class_names(root, num_classes, max(1, max(labels) + 1))
    _check_labels(list_file, lines, labels, len(class_names))
    _check_files(list_file, lines, paths)
    return VideoList(tuple(paths), np.asarray(labels, np.int32), class_names, str(list_file))


def read_class_names(file: Path) -> tuple[str, ...]:
    """The lines of a `labels.txt`, that of label 0 first."""
    return tuple(name.strip() for name in _read_lines(file) if name.strip())


def _read_lines(file: Path) -> list[str]:
    try:
        # utf-8-sig, as spreadsheets put a byte order mark before what would be the first path.
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _parse(list_file: Path, root: Path) -> tuple[list[int], list[str], list[int]]:
    """Gives line number, absolute path and label of each video."""
    lines, paths, labels = [], [], []
    for number, line in enumerate(_read_lines(list_file), start=1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            continue
        if len(fields) != 2:
            raise UserError(
                f"{list_file}, line {number}: {line.strip()!r} should be a path and a label "
                "with a space between them"
            )
        try:
            label = int(fields[1])
        except ValueError:
            raise UserError(
                f"{list_file}, line {number}: the label {fields[1]!r} is not a whole number"
            ) from None
        lines.append(number)
        # pathlib takes four times as long, half a second more for the 240,000 of Kinetics.
        paths.append(os.path.join(root, fields[0].strip()))  # noqa: PTH118
        labels.append(label)
    if not paths:
        raise UserError(f"{list_file} lists no videos: it should hold lines `path label`")
    return lines, paths, labels


def _class_names(root: Path, num_classes: int | None, labels_seen: int) -> tuple[str, ...]:
    file = root / "labels.txt"
    if not file.is_file():
        count = labels_seen if num_classes is None else num_classes
        return tuple(str(label) for label in range(count))
    names = read_class_names(file)
    if num_classes is not None and len(names) != num_classes:
        raise UserError(
            f"{file} names {len(names)} classes, but {num_classes} classes were asked for"
        )
    return names


def _check_labels(list_file: Path, lines: list[int], labels: list[int], classes: int) -> None:
    for line, label in zip(lines, labels, strict=True):
        if not 0 <= label < classes:
            raise UserError(
                f"{list_file}, line {line}: the label {label} should be from 0 to {classes - 1}, "
                f"as there are {classes} classes"
            )


def _check_files(list_file: Path, lines: list[int], paths: list[str]) -> None:
    # Folders are listed once instead of asking for each file: the 240,000 files of Kinetics lie
    # in 400 folders, and on a network disk every question takes about a millisecond.
    listed: dict[str, frozenset[str]] = {}
    missing = []
    for line, path in zip(lines, paths, strict=True):
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = frozenset(entry.name for entry in os.scandir(folder))
            except OSError:
                listed[folder] = frozenset()
        if name not in listed[folder]:
            missing.append((line, path))
    if missing:
        line, path = missing[0]
        raise UserError(
            f"{list_file}, line {line}: there is no file {path} "
            f"({len(missing)} of the {len(paths)} listed files are missing)"
        )
