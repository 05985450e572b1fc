"""Charades (Sigurdsson et al. 2016): frame lists with any number of actions per frame."""

import os
from collections.abc import Sequence

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded
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
    """Opens a split: a frame list with multi-hot labels (`frame_lists`).

    Frames and videos may have no label. The class names are the lines of `folder/labels.txt`;
    without this file they are the data set's "c000" to "c156". Paths of frames are relative to
    `folder/prefix`.

    Raises:
      UserError: the list does not exist or has another format, or a label is no class number.
    """
    root = expanded(folder).absolute()
    frames, texts = read_frame_list(root / list_name)
    file = root / "labels.txt"
    default = tuple(f"c{number:03d}" for number in range(CLASSES))
    names = read_class_names(file) if file.is_file() else default
    labels = _multi_hot(frames, texts, len(names))
    base = str(root / expanded(prefix))
    return ListedFrames(frames, base, labels, names)


def _multi_hot(frames: FrameList, texts: Sequence[set[bytes]], classes: int) -> np.ndarray:
    """Returns the union of each video's frame labels, uint8 `[videos, classes]`."""
    labels = np.zeros((len(frames), classes), np.uint8)
    for video, distinct in enumerate(texts):
        for text in distinct:
            try:
                numbers = label_numbers(text)
            except ValueError:
                raise UserError(
                    f"{frames.file}: video {frames.videos[video]} has a frame with the labels "
                    f"{text.decode(errors='replace')[:50]!r}, which should be comma-separated "
                    'numbers, like "4,17", or "" for none'
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
