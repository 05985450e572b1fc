"""Folders of classes, FOLDER/LIST/CLASS/FILE: ImageNet unpacked, or videos of one's own."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.video_list import VideoList, names_in, read_class_names
from mvit_jax.data.images import SUFFIXES as IMAGE_SUFFIXES

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"
)  # fmt: skip
"""Endings, in capitals or not, of the files in class folders that are taken for videos."""


def read_class_folders(
    folder: str | os.PathLike[str], list_name: str, train_list: str
) -> VideoList:
    """Reads the files in `folder/LIST/CLASS/`, classes in order, then files by name.

    Classes are the lines of `folder/labels.txt`, else the folders of the training list by name, as
    torchvision's `ImageFolder` numbers them; so a validation folder that lacks some still has the
    labels of training. Files of neither videos nor images are left out and their number is told on
    stderr, hidden files and folders are left out.

    Args:
      list_name: the folder LIST; an ending `.csv` is dropped, so that `train.csv` names `train`.
      train_list: the LIST of training. Where it has no folder, for example next to a validation
        set alone, classes are the folders of `list_name`.

    Raises:
      UserError: no such folder, no class folders in it, one that holds neither videos nor images,
        or one that is no class.
    """
    root = Path(folder).expanduser().absolute()
    split, train = (root / name.removesuffix(".csv") for name in (list_name, train_list))
    if not split.is_dir():
        raise UserError(
            f"there is no folder {split}: it should hold a folder of videos or images for each "
            "class; data.train_list, data.val_list and data.test_list name such folders"
        )
    found = _folders_in(split)
    if not found:
        raise UserError(
            f"{split} holds no folders: make one for each class, and put its videos or images there"
        )
    class_names, named_by = _class_names(root, split, train, found)
    number = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in found if name not in number]
    if unknown:
        raise UserError(
            f"{split} has a folder {unknown[0]!r}, which is no class of {named_by} "
            f"({len(unknown)} such folders): rename or remove it"
        )
    found.sort(key=number.__getitem__)
    paths, labels, ignored = _files(split, found, number)
    if ignored:
        print(
            f"note: {split} holds {len(ignored)} files or folders that are neither videos nor "
            f"images by their names, for example {ignored[0]}, which are left out",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return VideoList(tuple(paths), np.asarray(labels, np.int32), class_names, str(split))


def _class_names(
    root: Path, split: Path, train: Path, found: Sequence[str]
) -> tuple[tuple[str, ...], Path]:
    """Gives the names, and what they were taken from."""
    file = root / "labels.txt"
    if file.is_file():
        names = read_class_names(file)
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise UserError(f"{file} names the class {twice!r} twice: take one of the lines out")
        return names, file
    if train == split or not train.is_dir():
        return tuple(found), split
    return tuple(_folders_in(train)), train


def _folders_in(folder: Path) -> list[str]:
    (names,) = names_in([str(folder)], lambda entry: entry.is_dir())
    return [name for name in names if not name.startswith(".")]


def _files(
    split: Path, folders: Sequence[str], number: dict[str, int]
) -> tuple[list[str], list[int], list[str]]:
    """Gives paths, labels, and the paths of what is left out."""
    paths, labels, ignored = [], [], []
    places = (f"{split}/{name}" for name in folders)
    listed = names_in(places, lambda entry: not entry.name.startswith("."))
    for folder, names in zip(folders, listed, strict=True):
        wanted = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)]
        if not wanted:
            raise UserError(
                f"{split / folder} holds neither videos nor images (files that end like .mp4 or "
                ".jpg): put some there, or remove the folder"
            )
        paths += [f"{split}/{folder}/{name}" for name in wanted]
        labels += [number[folder]] * len(wanted)
        if len(wanted) < len(names):
            known = set(wanted)
            ignored += [f"{split}/{folder}/{name}" for name in names if name not in known]
    return paths, labels, ignored
