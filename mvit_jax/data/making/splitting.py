"""Train, validation and test lists for a folder of the user's own class folders."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded, write_atomically
from mvit_jax.data.formats.listing import class_files, folders_in, has_media, is_line

LISTS = ("train.csv", "val.csv", "test.csv")


def write_lists(
    folder: str | os.PathLike[str], *, val: float, test: float, seed: int = 0
) -> dict[str, int]:
    """Writes train.csv, val.csv, test.csv (lines "path label") and labels.txt into a folder.

    `folder` must have a folder of videos or images for each class, whose files are chosen by
    `data.formats.listing`. The split is stratified: each
    list has about the same share of every class. The same files and seed give the same lists.
    Sources are not detected: if several files come from one source (one person, one film), write
    the lists by hand so that these files are in one list only.

    Args:
      val: share of each class for validation.
      test: share of each class for the test.

    Returns:
      Number of files of each list.

    Raises:
      UserError: the shares leave no training data, there are no classes, a class has no or too few
        files, a name cannot stand in a list, or existing lists differ.
    """
    root = expanded(folder)
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise UserError(
            f"val={val:g} and test={test:g} must be at least 0 and leave a share for "
            "training, like 0.1 and 0.1"
        )
    classes = _classes(root)
    lines: dict[str, list[str]] = {name: [] for name in LISTS}
    for label, (name, files) in enumerate(classes.items()):
        order = np.random.default_rng((seed, label)).permutation(len(files))
        counts = [max(round(share * len(files)), 1) if share else 0 for share in (val, test)]
        if sum(counts) >= len(files):
            raise UserError(
                f"the class {root / name} has {len(files)} files, too few for training, validation "
                "and test: add some, or lower --val or --test"
            )
        parts = np.split(order, np.cumsum(counts))
        for part, chosen in zip(("val.csv", "test.csv", "train.csv"), parts, strict=True):
            lines[part] += [f"{name}/{files[i]} {label}\n" for i in sorted(chosen)]
    contents = {name: "".join(rows) for name, rows in lines.items() if rows}
    contents["labels.txt"] = "".join(f"{name}\n" for name in classes)
    for name in (*LISTS, "labels.txt"):
        path = root / name
        if path.exists() and path.read_text() != contents.get(name):
            raise UserError(
                f"{path} exists and differs from the new list: delete it, or keep your own lists "
                "and labels.txt"
            )
    for name, text in contents.items():
        write_atomically(root / name, text)
    return {name: len(rows) for name, rows in lines.items()}


def _classes(root: Path) -> dict[str, list[str]]:
    """Returns the file names of each class; raises `UserError` if a list cannot hold them."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: name the one that holds your classes' folders")
    names = folders_in(root)
    filled = [name for name in names if has_media(root / name)]
    splits = [name for name in names if name.lower() in _SPLITS and name not in filled]
    if any(folders_in(root / name) for name in splits):
        raise UserError(
            f"{root} is split already, into {', '.join(splits)}: train with "
            f"--config.data.source=folders --config.data.folder={root}, which needs no lists"
            f"{_renamed(splits)}"
        )
    if len(filled) < 2:
        raise UserError(
            f"{root} holds {len(filled)} folders with videos or images: there should be one for "
            "each class, at least two"
        )
    classes = dict(zip(names, class_files(root, names), strict=True))
    wrong = [
        f"{name}/{file}"
        for name, files in classes.items()
        for file in files
        if name != name.strip() or not is_line(file)
    ]
    if wrong:
        raise UserError(
            f"{str(root / wrong[0])!r} cannot stand in a list, as its name has a line break, is "
            "not UTF-8, or its class begins or ends with a space "
            f"({len(wrong)} such files): rename it"
        )
    return classes


# Names of the folders of data sets that are split already.
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def _renamed(splits: Sequence[str]) -> str:
    """Returns flags for the folders that have other names than the default lists."""
    keys = {"tr": "train_list", "va": "val_list", "te": "test_list"}
    flags = [
        f"--config.data.{keys[name[:2].lower()]}={name}"
        for name in splits
        if name not in ("train", "val", "test")
    ]
    return f"; add {' '.join(flags)}" if flags else ""
