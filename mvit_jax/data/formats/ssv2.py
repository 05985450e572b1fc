"""Something-Something v2 (Goyal et al. 2017): its own lists, or PySlowFast's frame lists."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.common.files import expanded
from mvit_jax.data.formats.frame_lists import FrameFolders, ListedFrames, read_frame_list

# File names of the first publication and of the later archive.
_LABELS = ("something-something-v2-labels.json", "labels.json")
_VIDEOS = (
    "something-something-v2-train.json", "something-something-v2-validation.json",
    "train.json", "validation.json",
)  # fmt: skip


def read_ssv2(
    folder: str | os.PathLike[str], list_name: str, *, prefix: str = ""
) -> FrameFolders | ListedFrames:
    """Opens a split of the data set.

    The labels file must be in the folder of the list. A list with the suffix `.json` is one of the
    data set's own, like `something-something-v2-validation.json`. A video with the id ID is read
    from the folder of images `folder/prefix/ID/` or from the file `folder/prefix/ID.webm` (or
    `.mp4`). Any other list is a frame list (`frame_lists`) with paths relative to `folder/prefix`.
    The data set's own lists, which have the labels, must then be in the folder of the frame list.

    Raises:
      UserError: a file is missing or malformed, or a video's label is missing or not in the labels
        file.
    """
    root = expanded(folder).absolute()
    list_file = root / list_name
    classes = _read_classes(list_file.parent)
    names = tuple(sorted(classes, key=classes.__getitem__))
    base = str(root / expanded(prefix))
    if list_file.suffix == ".json":
        labels = _read_labels(list_file, classes)
        folders = tuple(f"{base}/{video}" for video in labels)
        numbers = np.fromiter(labels.values(), np.int32, len(labels))
        return FrameFolders(folders, numbers, names, str(list_file))
    frames, _ = read_frame_list(list_file)
    labels = {}
    for name in _VIDEOS:
        if (list_file.parent / name).is_file():
            labels |= _read_labels(list_file.parent / name, classes)
    unknown = [video for video in frames.videos if video not in labels]
    if unknown:
        raise UserError(
            f"{len(unknown)} of the {len(frames)} videos of {list_file} have no label, like "
            f"{unknown[0]!r}: put the data set's {' and '.join(_VIDEOS[:2])} into "
            f"{list_file.parent}"
        )
    numbers = np.array([labels[video] for video in frames.videos], np.int32)
    return ListedFrames(frames, base, numbers, names)


def _read_classes(folder: Path) -> dict[str, int]:
    """Reads the label of each template; labels are contiguous from 0."""
    file = next((folder / name for name in _LABELS if (folder / name).is_file()), None)
    if file is None:
        raise MissingDataError(
            f"there is no {_LABELS[0]} in {folder}: put the data set's own file there, "
            "or name the folder that holds it, --config.data.folder=DIR"
        )
    content = _read_json(file)
    try:
        classes = {str(template): int(label) for template, label in content.items()}
    except (AttributeError, TypeError, ValueError):
        classes = {}
    if not classes or sorted(classes.values()) != list(range(len(classes))):
        raise UserError(
            f'{file} should map templates to numbers from 0 on, like {{"Holding something": "0"}}, '
            "each number once: fetch it again"
        )
    return classes


def _read_labels(file: Path, classes: dict[str, int]) -> dict[str, int]:
    """Reads the label of each video, in the order of the file."""
    labels = {}
    content = _read_json(file)
    if not isinstance(content, list) or not content:
        raise UserError(
            f'{file} should be a list of videos, like [{{"id": "1", "template": "Holding '
            '[something]"}]: fetch it again'
        )
    for index, video in enumerate(content):
        if not isinstance(video, dict) or "id" not in video:
            raise UserError(f"{file}: entry {index} of its list has no `id`: fetch it again")
        if "template" not in video:
            raise UserError(
                f"{file}: entry {index} of its list, video {video['id']}, has no template: videos "
                "of the data set's test split have no labels, so name another list"
            )
        # The labels file has the templates without the brackets around placeholders.
        template = str(video["template"]).replace("[", "").replace("]", "")
        if template not in classes:
            raise UserError(
                f"{file}: the template {template!r} of video {video['id']} is not in the labels "
                f"file {_LABELS[0]}: fetch both again, in the same version"
            )
        labels[str(video["id"])] = classes[template]
    return labels


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise MissingDataError(
            f"there is no list {file}: name one of the data set's own lists, like "
            "something-something-v2-validation.json, or a frame list"
        ) from None
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(f"{file} is not JSON ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {str(error.strerror).lower()}") from None
