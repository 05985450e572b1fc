"""Videos or images in a folder, with a table of any number of class names for each."""

import csv
import os
from pathlib import Path

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.common.files import expanded
from mvit_jax.data.formats.listing import is_media, note_unlisted
from mvit_jax.data.formats.video_list import VideoList, multi_hot, read_class_names, read_lines

TABLE = "labels.csv"


def read_label_table(folder: str | os.PathLike[str], list_name: str, train_list: str) -> VideoList:
    """Reads `folder/LIST/labels.csv`, with lines `file,name;name` of files in `folder/LIST`.

    A file without classes has the line `file,`; several lines of one file add up. The classes are
    the lines of `folder/labels.txt`; without this file they are the names in the training list's
    table, sorted. Videos and images beside the files that have no line are counted on stderr.

    Args:
      folder: folder of the data set; `~` is the user's home.
      list_name: the folder LIST; a suffix `.csv` is dropped, so `train.csv` names `train`.
      train_list: the LIST of training.

    Raises:
      UserError: there is no table, a line has another format, or a file or class does not exist.
    """
    root = expanded(folder).absolute()
    table, train = (root / name.removesuffix(".csv") / TABLE for name in (list_name, train_list))
    rows = _rows(table)
    names_file = root / "labels.txt"
    if names_file.is_file():
        origin, names = names_file, read_class_names(names_file)
    else:
        origin = train if train.is_file() else table
        names = tuple(sorted({name for _, _, classes in _rows(origin) for name in classes}))
        if not names:
            raise UserError(f"{origin} names no class: it should hold lines `file,class;class`")
    number = {name: label for label, name in enumerate(names)}
    for line, file, classes in rows:
        unknown = [name for name in classes if name not in number]
        if unknown:
            raise UserError(
                f"{table}, line {line}: {origin} has no class {unknown[0]!r}: correct the name"
            )
        if not (table.parent / file).is_file():
            raise UserError(f"{table}, line {line}: there is no file {table.parent / file}")
    merged: dict[str, set[int]] = {}
    for _, file, classes in rows:
        merged.setdefault(str(table.parent / file), set()).update(number[name] for name in classes)
    note_unlisted(table, tuple(merged))
    labels = multi_hot([sorted(label) for label in merged.values()], len(names))
    return VideoList(tuple(merged), labels, names, str(table))


def _rows(table: Path) -> list[tuple[int, str, list[str]]]:
    """Returns line number, file and class names of the lines that are not blank."""
    if not table.is_file():
        raise MissingDataError(
            f"there is no table {table}: with data.multi_label it should hold a line "
            "`file,class;class` for each file beside it"
        )
    rows = []
    for line, fields in enumerate(csv.reader(read_lines(table)), start=1):
        if not "".join(fields).strip():
            continue
        if len(fields) != 2:
            raise UserError(
                f"{table}, line {line}: {','.join(fields)[:200]!r} should be a file and its "
                "classes, like `a.mp4,run;jump`"
            )
        file, classes = fields
        rows.append((line, file.strip(), [c.strip() for c in classes.split(";") if c.strip()]))
    if not rows:
        raise UserError(f"{table} lists no files: it should hold lines `file,class;class`")
    if [_names_file(table, file) for _, file, _ in rows[:2]] == [False, True]:
        raise UserError(f"{table}, line {rows[0][0]} looks like a header: remove it")
    return rows


def _names_file(table: Path, file: str) -> bool:
    """Returns True if a field is the name of a file, as a header's is not."""
    return is_media(file) or (table.parent / file).is_file()
