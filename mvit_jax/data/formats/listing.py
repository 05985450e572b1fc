"""Files of class folders and frame folders: one rule for what is read and what is left out.

Files are chosen by the suffixes of their names. Hidden files and folders (`.name`), such as
`.ipynb_checkpoints`, `.Trash-1000` and the `._name` files of macOS, never count as data. Any other
file that is left out is counted, and one of them is named.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import plural
from mvit_jax.data.formats.video_list import list_names
from mvit_jax.data.media.images import SUFFIXES as IMAGE_SUFFIXES
from mvit_jax.data.media.images import DecodeError

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".mj2", ".3gp", ".3g2", ".f4v", ".mkv", ".mk3d", ".webm",
    ".avi", ".divx", ".wmv", ".asf", ".wtv", ".flv", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v",
    ".m2p", ".vob", ".mod", ".tod", ".ts", ".mts", ".m2t", ".m2ts", ".tp", ".trp", ".ogv", ".ogm",
    ".rm", ".rmvb", ".mxf", ".dv", ".nut", ".ivf", ".y4m", ".mjpeg", ".mjpg", ".h264",
    ".264", ".h265", ".265", ".hevc", ".gif", ".apng",
)  # fmt: skip
"""Case-insensitive suffixes of video files. PyAV detects the format from the content."""


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the sorted names of the folders in `folder`, except hidden ones.

    Raises:
      UserError: a name cannot be the name of a class, which is a line of UTF-8 text.
    """
    [names] = list_names([os.fspath(folder)], lambda entry: entry.is_dir())
    names = [name for name in names if not _is_hidden(name)]
    for name in names:
        if not is_line(name):
            raise UserError(
                f"the folder {str(Path(folder, name))!r} cannot name a class, as its name has a "
                "line break or is not UTF-8: rename it"
            )
    return names


def is_line(name: str) -> bool:
    """Returns True if a name is UTF-8 text without line breaks, as a line of a list must be."""
    try:
        name.encode()
    except UnicodeEncodeError:  # the name on disk has bytes of another encoding
        return False
    return "\n" not in name and "\r" not in name


def class_files(folder: str | os.PathLike[str], classes: Sequence[str]) -> list[list[str]]:
    """Returns the sorted names of the videos and images of each class, `folder/CLASS/FILE`.

    Prints on stderr how many other files and folders the classes hold, and how many videos and
    images lie beside the folders of classes.

    Raises:
      UserError: a class has neither videos nor images.
    """
    root = os.fspath(folder)
    paths = [root, *(f"{root}/{name}" for name in classes)]
    beside, *contents = list_names(paths, lambda entry: not _is_hidden(entry.name), slash=True)
    files, ignored = [], []
    for path, names in zip(paths[1:], contents, strict=True):
        media = [name for name in names if _is_media(name)]
        files.append(media)
        rest = sorted(set(names).difference(media))
        if not media:
            raise UserError(
                f"{path} holds neither videos nor images (files with suffixes like .mp4 or .jpg)"
                f"{_example(rest)}: put some there, or remove the folder"
            )
        ignored += [f"{path}/{name}" for name in rest]
    if ignored:
        _note(
            f"{root} holds {len(ignored)} files or folders that are neither videos nor images by "
            f"their names, for example {_shown(ignored[0])}, which are left out"
        )
    if loose := [name for name in beside if _is_media(name)]:
        _note(
            f"{root} holds {len(loose)} videos or images beside the folders of classes, for "
            f"example {_shown(loose[0])}, which are left out"
        )
    return files


def has_media(folder: str | os.PathLike[str]) -> bool:
    """Returns True if a folder holds a video or an image."""
    [names] = list_names([os.fspath(folder)], lambda entry: not _is_hidden(entry.name), slash=True)
    return any(map(_is_media, names))


def frame_files(folder: str) -> list[str]:
    """Returns the names of the images in a folder of frames, unsorted.

    Prints on stderr how many other files the folder holds, for the first such folder only.

    Raises:
      DecodeError: the folder holds no images.
      OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not _is_hidden(entry.name)]
    frames = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    ignored = sorted(set(names).difference(frames))
    if not frames:
        raise DecodeError(folder, f"the folder holds no images{_example(ignored)}")
    if ignored and not _noted:
        _noted.append(folder)
        _note(
            f"the folder of frames {folder} holds {len(ignored)} files that are no images by their "
            f"names, for example {_shown(ignored[0])}, which are left out (here and in others)"
        )
    return frames


_noted: list[str] = []  # the first folder of frames with other files


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_media(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)


def _example(ignored: Sequence[str]) -> str:
    if not ignored:
        return ""
    return f", but {plural(len(ignored), 'other file')}, for example {_shown(ignored[0])}"


def _shown(name: str) -> str:
    name = name.removesuffix("/")
    return name if is_line(name) else repr(name)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
