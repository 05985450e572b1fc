"""What a data set is before anything is decoded, and which of its readers opens it."""

import os
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.charades import read_charades
from mvit_jax.data.formats.class_folders import read_class_folders
from mvit_jax.data.formats.ssv2 import read_ssv2
from mvit_jax.data.formats.synthetic import Synthetic
from mvit_jax.data.formats.tfds import read_split
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.images import Footage

SOURCES = ("list", "folders", "shards", "ssv2", "charades", "synthetic")
"""What `open_source` reads besides TFDS's sets."""


@runtime_checkable  # for beartype, in the tests
class Source(Protocol):
    """One split of a data set: all that training and testing need to know of where it lies.

    Elements may be asked for in any order, from several threads at a time, and from other
    processes, which a source can be sent to; new ones, as a fork leaves behind the threads of
    array_record's readers, and may hang. The same index means the same element on every machine.
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

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> int | UInt8[np.ndarray, " classes"]:
        """What element `index` shows.

        Args:
          index: the element.
          frames: the frame numbers of a clip, where its own labels are asked for rather than those
            of the whole video. They differ only where frames have labels (Charades): a clip's are
            those of any frame from its first to its last.

        Returns:
          The class, in `range(len(class_names))`; where an element may have any number of classes,
          and none, 1 for each that it has and 0 for the rest. All labels of a source are of one
          kind.

        Raises:
          DecodeError: the label cannot be read.
        """
        # Of one element, as a set that knows its labels only by reading its images may be large.
        ...

    def item(self, index: int) -> str:
        """What messages call element `index`: something that a user can find, like its path."""
        ...

    def opened(self, index: int, clip_frames: int) -> AbstractContextManager[Footage]:
        """Opens element `index` for clips of `clip_frames` frames.

        Raises:
          DecodeError: on entering, it is missing or broken, or an image where a clip has several
            frames.
        """
        ...


def open_source(
    folder: str | os.PathLike[str] | None,
    list_name: str,
    *,
    source: str = "list",
    tfds: str | None = None,
    train_list: str = "train.csv",
    prefix: str = "",
    separator: str | None = None,
    multi_label: bool = False,
    max_missing: float = 0.0,
) -> Source:
    """Opens a split of a data set by the config's keys of these names (`data.*`).

    Args:
      folder: where the data set lies; None does for synthetic videos alone.
      list_name: the list, folder or split in it, of train, val or test.
      source: one of `SOURCES`.
      tfds: a set that TFDS has prepared, instead of a source.
      train_list: the list of training, whose folders number the classes.
      prefix: set before each path of a list.
      separator: of path and label in a list; None for white space.
      multi_label: whether an element may have any number of classes.
      max_missing: share of a list's files at which missing ones are an error.

    Raises:
      UserError: no such source, a folder or a file that is missing or is not what it should be,
        or a source that has one label for each video where there may be several, and vice versa.
    """
    if source not in SOURCES:
        raise UserError(
            f"data.source is {source!r}, which is none of {', '.join(SOURCES)}: name one of them"
        )
    kind = source if tfds is None else f"data.tfds={tfds}"
    if source == "synthetic" and tfds is None:
        return Synthetic(multi_label=multi_label)
    if multi_label and kind != "charades":
        raise UserError(
            f"data.multi_label is on, but of the source {kind} each video has one label: turn it "
            "off, or name another data.source"
        )
    if kind == "charades" and not multi_label:
        raise UserError(
            "a video of Charades has any number of labels: set data.multi_label=True, or name "
            "another data.source"
        )
    if folder is None:
        raise UserError(
            "the config names no data folder: give --config.data.folder=DIR, or to evaluate "
            "--data=DIR"
        )
    if not list_name:
        raise UserError("the name of the list is empty: name one, like train.csv")
    folder = Path(folder).expanduser()
    if tfds is not None:
        return read_split(tfds, str(folder), list_name)
    if source == "folders":
        return read_class_folders(folder, list_name, train_list)
    if source == "shards":
        from mvit_jax.data.formats.shards import read_shards

        return read_shards(folder, list_name)
    if source == "ssv2":
        return read_ssv2(folder, list_name, prefix=prefix)
    if source == "charades":
        return read_charades(folder, list_name, prefix=prefix)
    if folder.is_dir() and not (folder / "labels.txt").exists():
        # Counted from one list, the number of classes could differ from another's.
        raise UserError(
            f"there is no labels.txt in {folder}: write the names of the classes there, one a "
            "line, label 0 first"
        )
    return read_video_list(
        folder, list_name, prefix=prefix, separator=separator, max_missing=max_missing
    )


def fingerprint(videos: Source) -> dict[str, int]:
    """What tells whether two hosts have the same split, wherever each has its folder.

    Returns:
      The numbers of "videos" and of "classes", and a checksum of all their "names in order".
    """
    items = [videos.item(i).removesuffix(f" of {videos.list_file}") for i in range(len(videos))]
    folder = len(os.path.commonprefix(items))  # noqa: RUF071, of ids too
    names = [*videos.class_names, *(item[folder:] for item in items)]
    return {
        "videos": len(videos),
        "classes": len(videos.class_names),
        "names in order": zlib.crc32("\n".join(names).encode()),
    }
