"""Files of class folders and frame folders: one rule for what is read and what is left out.

Files are chosen by the suffixes of their names. Hidden files and folders (`.name`), such as
`.ipynb_checkpoints`, `.Trash-1000` and the `._name` files of macOS, never count as data. Any other
file or folder that is left out, such as `__MACOSX`, is counted, and one of them is named.
"""

import os
import sys
from collections.abc import Sequence, Set
from pathlib import Path

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import plural
from mvit_jax.data.formats.video_list import list_names
from mvit_jax.data.media.images import SUFFIXES as IMAGE_SUFFIXES
from mvit_jax.data.media.images import DecodeError

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".mj2", ".3gp", ".3g2", ".f4v", ".lrv", ".insv", ".mkv",
    ".mk3d", ".webm", ".avi", ".divx", ".wmv", ".asf", ".wtv", ".flv", ".mpg", ".mpeg", ".mpe",
    ".m1v", ".m2v", ".m2p", ".vob", ".mod", ".tod", ".ts", ".mts", ".m2t", ".m2ts", ".tp", ".trp",
    ".ogv", ".ogm", ".rm", ".rmvb", ".mxf", ".dv", ".nut", ".ivf", ".y4m", ".mjpeg", ".mjpg",
    ".h264", ".264", ".h265", ".265", ".hevc", ".gif", ".apng",
)  # fmt: skip
"""Case-insensitive suffixes of video files. PyAV detects the format from the content."""

_MACOS_FOLDER = "__MACOSX"  # hidden files of macOS, in its zip archives


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the sorted names of the folders in `folder`, except hidden ones and `__MACOSX`.

    Raises:
      UserError: a name cannot be the name of a class, which is a line of UTF-8 text.
    """
    [names] = list_names([os.fspath(folder)], lambda entry: entry.is_dir())
    names = [name for name in names if not _is_hidden(name) and name != _MACOS_FOLDER]
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

    Prints on stderr how many other files and folders the classes hold, how many videos and images
    lie beside the folders of classes, and how many files are in two classes by links.

    Raises:
      UserError: a class has neither videos nor images.
    """
    root = str(Path(folder))
    paths = [root, *(f"{root}/{name}" for name in classes)]
    links: set[str] = set()

    def chosen(entry: os.DirEntry[str]) -> bool:
        if entry.is_symlink():
            links.add(entry.path)
        return not _is_hidden(entry.name)

    beside, *contents = list_names(paths, chosen, slash=True)
    files, ignored = [], [f"{root}/{_MACOS_FOLDER}"] if f"{_MACOS_FOLDER}/" in beside else []
    for path, names in zip(paths[1:], contents, strict=True):
        media = [name for name in names if is_media(name)]
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
    if loose := [name for name in beside if is_media(name)]:
        _note(
            f"{root} holds {len(loose)} videos or images beside the folders of classes, for "
            f"example {_shown(loose[0])}, which are left out"
        )
    if links:
        _note_linked(paths[1:], files, links)
    return files


def _note_linked(folders: Sequence[str], files: Sequence[Sequence[str]], links: Set[str]) -> None:
    """Prints how many files are in two classes, through links of files or folders."""
    first: dict[str, str] = {}
    pairs = []
    for folder, names in zip(folders, files, strict=True):
        target = os.path.realpath(folder)
        for name in names:
            path = f"{folder}/{name}"
            file = os.path.realpath(path) if path in links else f"{target}/{name}"
            earlier = first.setdefault(file, path)
            if earlier.rpartition("/")[0] != folder:
                pairs.append((earlier, path))
    if pairs:
        earlier, path = pairs[0]
        _note(
            f"{len(pairs)} files are in two classes through links, for example {_shown(earlier)} "
            f"and {_shown(path)}: keep each file in one class"
        )


def note_unlisted(table: Path, listed: Sequence[str]) -> None:
    """Prints how many videos and images lie beside a table's files that it does not list.

    Args:
      table: the list, in the folder of its files.
      listed: paths of its files.
    """
    root = str(table.parent)
    inside = (path.rpartition("/")[0] for path in listed if path.startswith(f"{root}/"))
    folders = sorted({root, *inside})
    table_paths = set(listed)
    rest = [
        path
        for folder, names in zip(folders, list_names(folders, lambda _: True), strict=True)
        for path in (f"{folder}/{name}" for name in names if not _is_hidden(name))
        if is_media(path) and path not in table_paths
    ]
    if rest:
        _note(
            f"{table} does not list {len(rest)} videos or images beside it, for example "
            f"{_shown(rest[0])}, which are left out"
        )


def is_media(name: str) -> bool:
    """Returns True for the suffix of a video or an image."""
    return name.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)


def has_media(folder: str | os.PathLike[str]) -> bool:
    """Returns True if a folder holds a video or an image."""
    [names] = list_names([os.fspath(folder)], lambda entry: not _is_hidden(entry.name), slash=True)
    return any(map(is_media, names))


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


def _example(ignored: Sequence[str]) -> str:
    if not ignored:
        return ""
    return f", but {plural(len(ignored), 'other file')}, for example {_shown(ignored[0])}"


def _shown(name: str) -> str:
    name = name.removesuffix("/")
    return name if is_line(name) else repr(name)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
