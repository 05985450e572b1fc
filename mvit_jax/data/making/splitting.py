"""Train, validation and test lists for a folder of the user's own class folders."""

import os
from pathlib import Path

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import write_atomically
from mvit_jax.data.formats.class_folders import VIDEO_SUFFIXES
from mvit_jax.data.images import SUFFIXES as IMAGE_SUFFIXES

LISTS = ("train.csv", "val.csv", "test.csv")


def write_lists(
    folder: str | os.PathLike[str], *, val: float, test: float, seed: int = 0
) -> dict[str, int]:
    """Writes train.csv, val.csv, test.csv (lines "path label") and labels.txt into a folder.

    `folder` must have a folder of videos or images for each class. The split is stratified: each
    list has about the same share of every class. The same files and seed give the same lists.
    Sources are not detected: if several files come from one source (one person, one film), write
    the lists by hand so that these files are in one list only.

    Args:
      val: share of each class for validation.
      test: share of each class for the test.

    Returns:
      Number of files of each list.

    Raises:
      UserError: the shares leave no training data, there are no classes, a class has too few files,
        or existing lists differ.
    """
    root = Path(folder).expanduser()
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
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: name the one that holds your classes' folders")
    contents = {child.name: _files(child) for child in sorted(root.iterdir()) if child.is_dir()}
    classes = {name: files for name, files in contents.items() if files}
    if len(classes) < 2:
        raise UserError(
            f"{root} holds {len(classes)} folders with videos or images: there should be one for "
            "each class, at least two"
        )
    return classes


def _files(folder: Path) -> list[str]:
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        and not file.name.startswith(".")
    )
