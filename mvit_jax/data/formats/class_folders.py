"""Class folders, FOLDER/LIST/CLASS/FILE: unpacked ImageNet, or the user's own videos."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.common.files import expanded
from mvit_jax.data.formats.listing import class_files, folders_in
from mvit_jax.data.formats.video_list import VideoList, read_class_names


def read_class_folders(
    folder: str | os.PathLike[str], list_name: str, train_list: str
) -> VideoList:
    """Reads the files in `folder/LIST/CLASS/`, sorted by class, then by name.

    The classes are the lines of `folder/labels.txt`. Without this file they are the folders of the
    training list, sorted by name as in torchvision's `ImageFolder`. So the labels are the same in a
    validation folder that lacks some classes. Files are chosen by `listing`.

    Args:
      list_name: the folder LIST; a suffix `.csv` is dropped, so `train.csv` names `train`.
      train_list: the LIST of training. If its folder does not exist, as in a data set that has only
        a validation split, the classes are the folders of `list_name`.

    Raises:
      UserError: the folder does not exist, has no class folders, or has a folder that is no class
        or holds neither videos nor images.
    """
    root = expanded(folder).absolute()
    split, train = (root / name.removesuffix(".csv") for name in (list_name, train_list))
    if not split.is_dir():
        raise MissingDataError(
            f"there is no folder {split}: it should hold a folder of videos or images for each "
            "class; data.train_list, data.val_list and data.test_list name such folders"
        )
    folders = folders_in(split)
    if not folders:
        raise UserError(
            f"{split} holds no folders: make one for each class, and put its videos or images there"
        )
    class_names, origin = _class_names(root, split, train, folders)
    number = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in folders if name not in number]
    if unknown:
        raise UserError(
            f"{split} has a folder {unknown[0]!r}, but {origin} has no such class "
            f"({len(unknown)} such folders): rename or remove it"
        )
    folders.sort(key=number.__getitem__)
    files = class_files(split, folders)
    paths = [
        f"{split}/{folder}/{name}"
        for folder, names in zip(folders, files, strict=True)
        for name in names
    ]
    labels = np.repeat([number[folder] for folder in folders], [len(names) for names in files])
    return VideoList(tuple(paths), labels.astype(np.int32), class_names, str(split))


def _class_names(
    root: Path, split: Path, train: Path, folders: Sequence[str]
) -> tuple[tuple[str, ...], Path]:
    """Returns the class names and the file or folder that defines them."""
    file = root / "labels.txt"
    if file.is_file():
        names = read_class_names(file)
        if len(set(names)) < len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise UserError(f"{file} names the class {twice!r} twice: remove one of the lines")
        return names, file
    if train == split or not train.is_dir():
        return tuple(folders), split
    return tuple(folders_in(train)), train
