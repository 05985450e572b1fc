"""Charades (Sigurdsson et al. 2016): lists of frames, each with any number of actions."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.frame_lists import (
    FrameList,
    ListedFrames,
    label_numbers,
    read_frame_list,
)
from mvit_jax.data.formats.video_list import read_class_names

CLASSES = 157


def read_charades(
    folder: str | os.PathLike[str], list_name: str, *, prefix: str = ""
) -> ListedFrames:
    """Opens a split: a list of frames with their labels (`frame_lists`).

    A frame, and a video, may have no label at all. Names of the classes are the lines of
    `folder/labels.txt`; without that file they are "c000" to "c156", as the data set has them.
    Paths of frames start at `folder/prefix`.

    Raises:
      UserError: no such list, one of another form, or a label that is no number of a class.
    """
    root = Path(folder).expanduser().absolute()
    frames, texts = read_frame_list(root / list_name)
    file = root / "labels.txt"
    own = tuple(f"c{number:03d}" for number in range(CLASSES))
    names = read_class_names(file) if file.is_file() else own
    labels = _of_videos(frames, texts, len(names))
    base = str(root / Path(prefix).expanduser())
    return ListedFrames(frames, base, labels, names)


def _of_videos(frames: FrameList, texts: Sequence[set[bytes]], classes: int) -> np.ndarray:
    """The labels that any frame of a video has, uint8 `[videos, classes]`."""
    labels = np.zeros((len(frames), classes), np.uint8)
    for video, distinct in enumerate(texts):
        for text in distinct:
            try:
                numbers = label_numbers(text)
            except ValueError:
                raise UserError(
                    f"{frames.file}: video {frames.videos[video]} has a frame with the labels "
                    f"{text.decode(errors='replace')[:50]!r}, which should be numbers with commas "
                    'between them, like "4,17", or "" for none'
                ) from None
            for number in numbers:
                if not 0 <= number < classes:
                    raise UserError(
                        f"{frames.file}: video {frames.videos[video]} has a frame with the label "
                        f"{number}, which should be from 0 to {classes - 1}, as there are "
                        f"{classes} classes"
                    )
                labels[video, number] = 1
    return labels
