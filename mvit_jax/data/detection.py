"""Clips with boxes, for action detection: the pixels and the boxes of a key frame move together.

All boxes are x1, y1, x2, y2. Those of the data set are fractions of the frame, those of a clip are
pixels of the clip. The clips of a data set have the same number of boxes: zeros fill the missing
ones, and a mask marks the real ones.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from mvit_jax.data.augmentation import Cut, Interpolation, centre_cut, draw_cut, whole_cut
from mvit_jax.data.formats.ava import KeyFrameClips
from mvit_jax.data.media.images import Footage
from mvit_jax.data.media.parts import transform_frames
from mvit_jax.data.sampling import ClipSettings


def to_pixels(
    boxes: Float64[np.ndarray, "boxes 4"], height: int, width: int
) -> Float64[np.ndarray, "boxes 4"]:
    """Returns boxes in pixels of a frame, clipped to its last row and column."""
    last = np.array([width - 1, height - 1] * 2)
    return np.clip(boxes * [width, height, width, height], 0, last)


def load_train_clips(
    clips: KeyFrameClips,
    index: int,
    settings: ClipSettings,
    rng: np.random.Generator,
    repeats: int = 1,
) -> dict[str, np.ndarray]:
    """Decodes the clip of key frame `index` and cuts it `repeats` times at random.

    Returns:
      "clip", uint8 `[repeats, T, size, size, 3]`; "boxes", float32 `[repeats, boxes, 4]`;
      "box_mask", bool `[repeats, boxes]`, True for real boxes; "label", uint8 `[repeats, boxes,
      classes]`.

    Raises:
      DecodeError: the video cannot be decoded.
    """
    augmentation = settings.augmentation

    def draw(height: int, width: int) -> list[Cut]:
        return [draw_cut(height, width, augmentation, settings.size, rng) for _ in range(repeats)]

    with clips.opened(index, settings.frames) as footage:
        indices = clips.clip_indices(index, footage, settings.frames, settings.stride)
        return _load(clips, index, footage, indices, draw, augmentation.interpolation)


def load_test_clip(
    clips: KeyFrameClips,
    index: int,
    settings: ClipSettings,
    shuffle: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """Returns the centre square, or with `settings.full_frame` all, of the clip of a key frame.

    Args:
      clips: data set.
      index: number of the key frame.
      settings: frames and size of the clip.
      shuffle: generator that permutes the frames; None to keep their order.

    Returns:
      "clip", uint8 `[1, T, height, width, 3]`; "boxes", float32 `[boxes, 4]`; "box_mask", bool
      `[boxes]`; "label", uint8 `[boxes, classes]`.

    Raises:
      DecodeError: the video cannot be decoded.
    """
    with clips.opened(index, settings.frames) as footage:
        indices = clips.clip_indices(index, footage, settings.frames, settings.stride)
        if shuffle is not None:
            indices = shuffle.permutation(indices)
        loaded = _load(
            clips, index, footage, indices,
            lambda height, width: [choose_test_cut(height, width, settings)],
            settings.interpolation,
        )  # fmt: skip
    return {name: x if name == "clip" else x[0] for name, x in loaded.items()}


def choose_test_cut(height: int, width: int, settings: ClipSettings) -> Cut:
    """Returns the part of a frame that is tested, with a short side of `settings.short_side`."""
    if settings.full_frame:
        return whole_cut(height, width, settings.short_side)
    return centre_cut(height, width, settings.short_side, settings.size)


def make_blank_clip(
    clips: KeyFrameClips, frames: int, height: int, width: int
) -> dict[str, np.ndarray]:
    """Returns a black test clip without boxes, for a video that cannot be decoded."""
    boxes, classes = clips.max_boxes, clips.classes.count
    return {
        "clip": np.zeros((1, frames, height, width, 3), np.uint8),
        "boxes": np.zeros((boxes, 4), np.float32),
        "box_mask": np.zeros(boxes, bool),
        "label": np.zeros((boxes, classes), np.uint8),
    }


def _load(
    clips: KeyFrameClips,
    index: int,
    footage: Footage,
    indices: Int64[np.ndarray, " frames"],
    draw: Callable[[int, int], list[Cut]],
    interpolation: Interpolation,
) -> dict[str, np.ndarray]:
    """Decodes frames and makes the cuts that `draw` returns for their height and width."""
    cuts: list[Cut] = []
    size = 0, 0

    def cut(frames: UInt8[np.ndarray, "time _ _ 3"]) -> np.ndarray:
        nonlocal cuts, size
        size = frames.shape[1:3]
        cuts = cuts or draw(*size)  # once, though frames may come in parts
        return np.stack([each.apply(frames, interpolation) for each in cuts])

    pixels = transform_frames(footage, indices, cut)
    listed = clips.boxes(index)
    count, room = len(listed.box), clips.max_boxes - len(listed.box)
    boxes = np.stack([each.move(to_pixels(listed.box, *size)) for each in cuts])
    return {
        "clip": pixels,
        "boxes": np.pad(boxes.astype(np.float32), ((0, 0), (0, room), (0, 0))),
        "box_mask": np.stack([np.arange(clips.max_boxes) < count] * len(cuts)),
        "label": np.stack([np.pad(listed.labels, ((0, room), (0, 0)))] * len(cuts)),
    }
