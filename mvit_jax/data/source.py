"""The interface of data sets, and `open_source`, which opens the data set of a config."""

import os
import zlib
from contextlib import AbstractContextManager, suppress
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded
from mvit_jax.data.formats.ava import CUT_START, KeyFrameClips, read_ava
from mvit_jax.data.formats.charades import read_charades
from mvit_jax.data.formats.class_folders import read_class_folders
from mvit_jax.data.formats.label_tables import read_label_table
from mvit_jax.data.formats.ssv2 import read_ssv2
from mvit_jax.data.formats.synthetic import Synthetic
from mvit_jax.data.formats.tfds import read_split
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.media.images import DecodeError, Footage

SOURCES = ("list", "folders", "shards", "ssv2", "charades", "ava", "synthetic")
"""Values of `data.source`; `data.tfds` selects a data set of TFDS instead."""

MULTI_LABEL = ("list", "folders", "shards", "charades", "ava", "synthetic")
"""The sources of `data.multi_label`."""


@runtime_checkable  # for beartype, in the tests
class Source(Protocol):
    """One split of a data set, before decoding: its labels, class names and elements.

    Elements may be read in any order and from several threads at once. A source can be pickled and
    sent to spawned processes. Forked processes lack the threads of array_record's readers and may
    hang. An index refers to the same element on every machine.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    @property
    def list_file(self) -> str:
        """Name of the split in messages, for example the path of its list."""
        ...

    def __len__(self) -> int: ...

    def label(
        self, index: int, frames: Int[np.ndarray, " frames"] | None = None
    ) -> int | UInt8[np.ndarray, " classes"]:
        """Returns the label of element `index`.

        Args:
          index: number of the element.
          frames: frame numbers of a clip, for the label of this clip; None for the label of the
            video. The labels differ only where each frame has labels (Charades): a clip has the
            classes of all frames from its first to its last.

        Returns:
          The class, in `range(len(class_names))`. In a multi-label data set, a multi-hot vector
          with 1 for each class of the element, or only zeros. All labels of a source have the same
          shape.

        Raises:
          DecodeError: the label cannot be read.
        """
        # One label at a time: reading all labels is slow where they are stored with the images.
        ...

    def item(self, index: int) -> str:
        """Returns the name of element `index` for messages, by which a user can locate it."""
        ...

    def opened(self, index: int, clip_frames: int) -> AbstractContextManager[Footage]:
        """Opens element `index` for clips of `clip_frames` frames.

        Raises:
          DecodeError: on entering, the element is missing or broken, or is an image although
            `clip_frames` is above 1.
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
    labelled: bool = False,
    boxes: str | None = None,
    class_list: str | None = None,
    min_score: float = 0.9,
    excluded: str | None = None,
    first_second: int = CUT_START,
) -> Source:
    """Opens a split of a data set; most arguments are config keys of the same name (`data.*`).

    Args:
      folder: folder of the data set; None only for synthetic videos.
      list_name: name of the split's list, subfolder or manifest in `folder`; for TFDS, a split.
      source: one of `SOURCES`.
      tfds: name of a data set prepared by TFDS; replaces `source`.
      train_list: name of the training split; for class folders, it defines the classes.
      prefix: folder that the paths of a list are relative to.
      separator: separator of path and label in a list; None for white space.
      multi_label: True if an element may have any number of classes.
      max_missing: share of missing files at which a list raises an error.
      labelled: True for clips with the labelled boxes beside those of `boxes`, as for training;
        this and the following for AVA alone.
      boxes: csv file of the split's person boxes.
      class_list: list of the evaluated classes.
      min_score: smallest score of a person box.
      excluded: list of the key frames that the metric leaves out.
      first_second: second of the csv files at which the frames begin.

    Raises:
      UserError: unknown source, a missing or malformed folder or file, or a source that does not
        match `multi_label`.
    """
    if source not in SOURCES:
        raise UserError(f"data.source must be one of {', '.join(SOURCES)}, not {source!r}")
    check_multi_label(source, tfds, multi_label)
    if source == "synthetic" and tfds is None:
        return Synthetic(multi_label=multi_label)
    if folder is None:
        raise UserError(
            "data.folder is not set: pass --config.data.folder=DIR, or --data=DIR to the evaluation"
        )
    if not list_name:
        raise UserError("the name of the list is empty: set one, like train.csv")
    folder = expanded(folder)
    if tfds is not None:
        return read_split(tfds, str(folder), list_name)
    if source == "folders":
        read = read_label_table if multi_label else read_class_folders
        return read(folder, list_name, train_list)
    if source == "shards":
        from mvit_jax.data.formats.shards import read_shards

        return read_shards(folder, list_name, multi_label=multi_label)
    if source == "ssv2":
        return read_ssv2(folder, list_name, prefix=prefix)
    if source == "charades":
        return read_charades(folder, list_name, prefix=prefix)
    if source == "ava":
        assert class_list  # `config.check`
        return read_ava(
            folder, list_name, boxes=boxes, class_list=class_list, train=labelled,
            min_score=min_score, excluded=excluded, first_second=first_second, prefix=prefix,
            max_missing=max_missing,
        )  # fmt: skip
    if folder.is_dir() and not (folder / "labels.txt").exists():
        # Without labels.txt, each list would define its own number of classes.
        raise UserError(
            f"there is no labels.txt in {folder}: write the names of the classes there, one per "
            "line, label 0 first"
        )
    return read_video_list(
        folder, list_name, prefix=prefix, separator=separator, max_missing=max_missing,
        multi_label=multi_label,
    )  # fmt: skip


def check_multi_label(source: str, tfds: str | None, multi_label: bool) -> None:
    """Raises `UserError` if a data set does not match `multi_label`; arguments of `open_source`."""
    kind = source if tfds is None else f"data.tfds={tfds}"
    if multi_label and kind not in MULTI_LABEL:
        raise UserError(
            f"data.multi_label is on, but each video of the source {kind} has one label: turn it "
            "off, or set another data.source"
        )
    if kind in ("charades", "ava") and not multi_label:
        elements = {"charades": "a video of Charades", "ava": "a box"}[kind]
        raise UserError(
            f"{elements} has any number of labels: set data.multi_label=True, or set another "
            "data.source"
        )


def all_labels(videos: Source) -> Int32[np.ndarray, " videos"]:
    """Returns the label of each element of single-label data; -1 for one that cannot be read."""
    labels = np.full(len(videos), -1, np.int32)
    for index in range(len(videos)):
        with suppress(DecodeError):
            labels[index] = videos.label(index)
    return labels


def elements(videos: Source) -> str:
    """Returns the name of the elements of a data set in messages."""
    return "key frames" if isinstance(videos, KeyFrameClips) else "videos"


def video_of(videos: Source, index: int) -> int:
    """Returns the number of the video of an element; key frames share a video."""
    return int(videos.key_frames.video[index]) if isinstance(videos, KeyFrameClips) else index


def fingerprint(videos: Source) -> dict[str, int]:
    """Returns counts and a checksum, equal on hosts that have the same split.

    The checksum does not depend on the folder of the data set.

    Returns:
      "videos" and "classes", their numbers; "names in order", the CRC-32 of all their names; for
      detection also "boxes and labels", the CRC-32 of both.
    """
    items = [videos.item(i).removesuffix(f" of {videos.list_file}") for i in range(len(videos))]
    folder = len(os.path.commonprefix(items))  # noqa: RUF071, names may be ids
    names = [*videos.class_names, *(item[folder:] for item in items)]
    result = {
        "videos": len(videos),
        "classes": len(videos.class_names),
        # Names of files may have bytes that are not UTF-8.
        "names in order": zlib.crc32("\n".join(names).encode(errors="surrogateescape")),
    }
    if isinstance(videos, KeyFrameClips):
        boxes = videos.key_frames.box.tobytes() + videos.key_frames.labels.tobytes()
        result["boxes and labels"] = zlib.crc32(boxes)
    return result


def class_notes(videos: Source) -> list[str]:
    """Returns sentences on classes of the same name, and on classes without videos."""
    names = videos.class_names
    again = [name for i, name in enumerate(names) if name in names[:i]]
    notes = []
    if again:
        notes.append(
            f"{len(again)} classes of {videos.list_file} have the name of another class, for "
            f"example {again[0]!r}"
        )
    labels = getattr(videos, "labels", None)  # not of images with their labels in one file
    if labels is None:
        return notes
    used = labels.any(axis=0) if labels.ndim > 1 else np.isin(np.arange(len(names)), labels)
    if not used.all():
        unused = [name for name, any_ in zip(names, used, strict=True) if not any_]
        notes.append(
            f"{len(unused)} of the {len(names)} classes have no videos in {videos.list_file}, for "
            f"example {unused[0]!r}"
        )
    return notes
