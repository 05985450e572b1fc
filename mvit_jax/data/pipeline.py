"""Batches of clips for training and testing.

The data of a run is a pure function of (seed, step): clip j of step s has the global index
s * batch + j, which decides the video and every draw of its augmentation. So neither the number
of hosts nor of threads changes what a step sees, and a run resumes by starting at another step;
there is no iterator state to store.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int64, UInt8

from mvit_jax.data import augmentation, sampling
from mvit_jax.data.images import DecodeError, Footage
from mvit_jax.data.sources import Source
from mvit_jax.errors import UserError

Batch = dict[str, np.ndarray]

# What random numbers are drawn for: the first word of their seed, so that no two share a stream.
_ORDER, _CLIP, _SHUFFLE = range(3)

_ATTEMPTS = 10


@dataclass(frozen=True)
class ClipSettings:
    """What a clip is.

    Attributes:
      frames: T, frames of a clip; 1 for images, which may be files of images or of videos.
      stride: tau, distance of neighbouring frames at 30 frames a second.
      size: side of the square clip in pixels.
      short_side: short side of the frames in pixels from which one test crop is cut; three
        crops are cut from frames whose short side is `size`, as in the released code.
      crop_area: bounds of the random resized crop's share of a training frame; None for no
        random crop: short side to `size`, then the centre.
      interpolation: how frames are scaled, "bilinear" as for video or "bicubic" as for ImageNet;
        see `augmentation.resize`.

    Raises:
      UserError: `short_side` smaller than `size`.
    """

    frames: int
    stride: int
    size: int
    short_side: int
    crop_area: tuple[float, float] | None = (0.08, 1.0)
    interpolation: augmentation.Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.short_side < self.size:
            raise UserError(
                f"crops of {self.size} pixels cannot be cut from frames whose short side is "
                f"{self.short_side}: raise the short side or lower the size"
            )


def train_batches(
    videos: Source,
    settings: ClipSettings,
    *,
    seed: int,
    batch: int,
    steps: int,
    start: int = 0,
    rows: range | None = None,
    threads: int = 2,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Gives the batches of steps `start` to `steps - 1`; closing the generator stops loading.

    Every epoch is a permutation of its own; an epoch may end within a batch. A video that cannot
    be decoded is replaced by another one, drawn from (seed, global index), with its own label.

    Args:
      videos: the data set.
      settings: what a clip is.
      seed: of the run, not negative.
      batch: clips per step, all hosts together.
      steps: the step before which to end.
      start: the step to begin with.
      rows: the rows of the global batch that this host loads, contiguous; None for all.
      threads: how many load; 0 to load without prefetching.
      prefetch: batches loaded ahead.

    Yields:
      "clip", uint8 `[rows, T, size, size, 3]`, RGB; "label", int32 `[rows]`; "broken", int32
      `[rows]`, place in `videos` of the video that was asked for but could not be decoded
      (`decoding.why_broken` tells the reason), or -1.

    Raises:
      UserError: while iterating, ten videos in a row cannot be decoded.
    """
    rows = _checked(rows, batch)
    load = _TrainLoader(videos, settings, seed, batch, start, rows)
    return _load(load, max(steps - start, 0), len(rows), threads, prefetch)


def test_batches(
    videos: Source,
    settings: ClipSettings,
    *,
    clips: int,
    crops: int,
    batch: int,
    rows: range | None = None,
    shuffle_seed: int | None = None,
    threads: int = 2,
    prefetch: int = 1,
) -> Generator[Batch, None, None]:
    """Gives the views of every video, each video once, in order, in batches of one shape.

    Args:
      videos: the data set.
      settings: what a clip is.
      clips: K, clips spread evenly over a video.
      crops: squares cut from each clip, 1 or 3.
      batch: videos per batch, all hosts together; the last batch is padded.
      rows: the rows of the global batch that this host loads, contiguous; None for all.
      shuffle_seed: if given, the frames of each clip are permuted, by draws from
        (shuffle_seed, place of the video): the test of Fan et al. 2021, table 9.
      threads: how many load; 0 to load without prefetching.
      prefetch: batches loaded ahead.

    Yields:
      "clip", uint8 `[rows, K * crops, T, size, size, 3]`, RGB, the crops of the first clip
      first; "label", int32 `[rows]`; "video", int32 `[rows]`, place in `videos`, or -1 for
      padding; "valid", bool `[rows]`, False for padding and for videos that cannot be decoded
      (`decoding.why_broken` tells the reason), whose clips are black.
    """
    rows = _checked(rows, batch)
    load = _TestLoader(videos, settings, clips, crops, batch, rows, shuffle_seed)
    return _load(load, -(-len(videos) // batch), len(rows), threads, prefetch)


def load_train_clip(
    videos: Source, index: int, settings: ClipSettings, rng: np.random.Generator
) -> UInt8[np.ndarray, "frames size size 3"]:
    """Decodes and augments one random clip of element `index`; raises `DecodeError`."""
    with videos.opened(index, settings.frames) as video:
        indices = sampling.train_indices(
            video.num_frames, video.fps, frames=settings.frames, stride=settings.stride, rng=rng
        )
        clip = video.frames(indices)
    if settings.crop_area is None:
        return _cropped(clip, settings.size, settings, 1)[0]
    return augmentation.random_resized_crop(
        clip,
        settings.size,
        rng=rng,
        area=settings.crop_area,
        interpolation=settings.interpolation,
    )


def load_views(
    videos: Source,
    index: int,
    settings: ClipSettings,
    *,
    clips: int,
    crops: int,
    shuffle: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "{clips*crops} frames size size 3"]:
    """Decodes the views of the test protocol: `views` of element `index`.

    Raises:
      DecodeError: it cannot be decoded, or is an image where a clip has several frames.
    """
    with videos.opened(index, settings.frames) as video:
        return views(video, settings, clips=clips, crops=crops, shuffle=shuffle)


def views(
    video: Footage,
    settings: ClipSettings,
    *,
    clips: int,
    crops: int,
    shuffle: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "{clips*crops} frames size size 3"]:
    """Gives the views of the test protocol, the crops of the first clip first.

    Args:
      video: an open file, or frames.
      settings: what a clip is.
      clips: K, clips spread evenly over the video.
      crops: squares cut from each clip, 1 or 3.
      shuffle: if given, permutes the frames of each clip.

    Raises:
      DecodeError: the file is broken.
    """
    indices = sampling.view_indices(
        video.num_frames, video.fps, frames=settings.frames, stride=settings.stride, clips=clips
    )
    if shuffle is not None:
        indices = shuffle.permuted(indices, axis=1)
    # Clips of a short video share frames: each is decoded and resized once.
    wanted, places = np.unique(indices, return_inverse=True)
    side = settings.short_side if crops == 1 else settings.size
    cropped = _cropped(video.frames(wanted), side, settings, crops)
    by_clip = np.moveaxis(cropped[:, places.reshape(indices.shape)], 1, 0)
    return by_clip.reshape(clips * crops, *by_clip.shape[2:])


def _cropped(frames: np.ndarray, side: int, settings: ClipSettings, crops: int) -> np.ndarray:
    frames = augmentation.resize_short_side(frames, side, settings.interpolation)
    return augmentation.crop_views(frames, settings.size, crops, image=settings.frames == 1)


@functools.lru_cache(maxsize=4)
def epoch_order(videos: int, seed: int, epoch: int) -> Int64[np.ndarray, " videos"]:
    """Gives the order of an epoch: a permutation of `range(videos)`, from (seed, epoch)."""
    order = _generator(_ORDER, seed, epoch).permutation(videos)
    order.flags.writeable = False  # it is shared by all who ask
    return order


# Loaders are objects rather than closures, so that they can be sent to other processes. repr=False:
# Grain prints them when an iterator is made, and with them all of the data set, 13 s for 55,000
# images in memory.
@dataclass(frozen=True, eq=False, repr=False)
class _TrainLoader:
    videos: Source
    settings: ClipSettings
    seed: int
    batch: int
    start: int
    rows: range

    def __call__(self, element: int) -> dict[str, Any]:
        step, row = divmod(element, len(self.rows))
        index = (self.start + step) * self.batch + self.rows[row]
        epoch, place = divmod(index, len(self.videos))
        asked = video = int(epoch_order(len(self.videos), self.seed, epoch)[place])
        failure = None
        for attempt in range(_ATTEMPTS):
            rng = _generator(_CLIP, self.seed, index, attempt)
            if attempt > 0:
                video = int(rng.integers(len(self.videos)))
            try:
                clip = load_train_clip(self.videos, video, self.settings, rng)
            except DecodeError as error:
                failure = error
                continue
            return {
                "clip": clip,
                "label": np.int32(self.videos.label(video)),
                "broken": np.int32(-1 if failure is None else asked),
            }
        raise UserError(
            f"{_ATTEMPTS} videos drawn from {self.videos.list_file} one after the other cannot be "
            f"decoded, so check what it holds; the last failure: {failure}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class _TestLoader:
    videos: Source
    settings: ClipSettings
    clips: int
    crops: int
    batch: int
    rows: range
    shuffle_seed: int | None

    def __call__(self, element: int) -> dict[str, Any]:
        step, row = divmod(element, len(self.rows))
        video = step * self.batch + self.rows[row]
        if video >= len(self.videos):
            return self._element(None, label=0, video=-1)
        shuffle = None
        if self.shuffle_seed is not None:
            shuffle = _generator(_SHUFFLE, self.shuffle_seed, video)
        label, views = 0, None
        with contextlib.suppress(DecodeError):
            label = self.videos.label(video)
            views = load_views(
                self.videos,
                video,
                self.settings,
                clips=self.clips,
                crops=self.crops,
                shuffle=shuffle,
            )
        return self._element(views, label=label, video=video)

    def _element(self, views: np.ndarray | None, label: int, video: int) -> dict[str, Any]:
        valid = views is not None
        if views is None:
            size = self.settings.size
            shape = (self.clips * self.crops, self.settings.frames, size, size, 3)
            views = np.zeros(shape, np.uint8)
        return {
            "clip": views,
            "label": np.int32(label),
            "video": np.int32(video),
            "valid": np.bool_(valid),
        }


def _load(
    load: Callable[[int], dict[str, Any]], batches: int, rows: int, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    if batches == 0:
        return
    # Elements, not batches, are spread over the threads, so that the first batch comes as early
    # as can be. Stacking is left to the caller's thread: 0.8 ms for a clip of 16x224x224, which
    # took 45 ms to decode.
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, prefetch * rows)
    )
    dataset = grain.MapDataset.range(batches * rows).map(load).to_iter_dataset(options)
    iterator = iter(dataset.batch(rows, drop_remainder=True))
    try:
        yield from iterator
    finally:
        iterator.close()


def _checked(rows: range | None, batch: int) -> range:
    if rows is None:
        return range(batch)
    if len(rows) == 0 or rows.step != 1 or rows.start < 0 or rows.stop > batch:
        raise ValueError(f"{rows} is not a contiguous part of the rows of a batch of {batch}")
    return rows


def _generator(purpose: int, seed: int, index: int, attempt: int = 0) -> np.random.Generator:
    # Always four words: NumPy fills shorter seeds up with zeros, so (a, b) and (a, b, 0) would
    # give the same numbers.
    return np.random.default_rng((purpose, seed, index, attempt))
