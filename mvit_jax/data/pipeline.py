"""Batches of clips for training and testing.

The data of a run is a pure function of (seed, step). A training step of `batch` clips decodes batch
/ repeats videos. Video v of step s has the global index s * batch / repeats + v. This index
determines the file, the frames and all random draws of the augmentation. Hence the batches do not
depend on the numbers of hosts, processes and threads. A run resumes by starting at another step; no
iterator state is stored.
"""

import contextlib
import copy
import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.data import augmentation, detection, sampling, watchdog
from mvit_jax.data.formats.ava import KeyFrameClips
from mvit_jax.data.loader import DEFAULT, Batch, LoaderOptions, load_batches
from mvit_jax.data.media.images import DecodeError, Footage
from mvit_jax.data.media.parts import transform_frames
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.data.source import Source, all_labels

# First word of each random seed, different for each purpose, so that no streams are shared.
_ORDER, _CLIP, _SHUFFLE = range(3)

_ATTEMPTS = 10


def train_batches(
    videos: Source,
    settings: ClipSettings,
    *,
    seed: int,
    batch: int,
    steps: int,
    start: int = 0,
    rows: range | None = None,
    repeats: int = 1,
    balanced: bool = False,
    loader: LoaderOptions = DEFAULT,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Yields the batches of steps `start` to `steps - 1`; closing the generator stops loading.

    Each epoch has its own permutation of the videos and may end within a batch. A video that cannot
    be decoded is replaced by another video and its label, drawn from (seed, global index). With
    repeated augmentation (Hoffer et al. 2020) the clips of a video are neighbours in the batch.

    Args:
      videos: data set.
      settings: frame sampling, size and augmentation of the clips.
      seed: seed of the run, not negative.
      batch: clips per step over all hosts, a multiple of `repeats`.
      steps: first step that is not yielded.
      start: first step.
      rows: contiguous rows of the global batch that this host loads; None for all. Start and
        length are multiples of `repeats`.
      repeats: clips augmented from the same decoded frames.
      balanced: True for epochs with each class equally often, see `balanced_order`. A replacement
        of a broken video may have another class.
      loader: threads, processes and timeout of the loading; the batches do not depend on them.
      prefetch: number of prefetched batches.

    Yields:
      "clip", uint8 `[rows, T, size, size, 3]`, RGB; "label", int32 `[rows]`, or uint8 `[rows,
      classes]`, multi-hot; "broken", int32 `[rows]`, index of the video that was drawn first and
      could not be decoded, or -1. `video.decode_failure` returns the reason. Key frames also have
      "boxes" and "box_mask", and labels of each box, see `detection`.

    Raises:
      UserError: `repeats` does not divide the batch or the rows; while iterating, ten videos in a
        row cannot be decoded.
      HungError: while iterating, a batch takes longer than `loader.timeout`.
    """
    rows = _check_rows(rows, batch)
    if batch % repeats or rows.start % repeats or len(rows) % repeats:
        raise UserError(
            f"the batch ({batch} clips, {len(rows)} on this host) must be a multiple of "
            f"data.repeats={repeats} on each host: change batch"
        )
    decoded = range(rows.start // repeats, rows.stop // repeats)
    members = ClassMembers.of(all_labels(videos)) if balanced else None
    load = _TrainElements(
        videos, settings, seed, batch // repeats, start, decoded, repeats, members
    )
    batches = load_batches(load, max(steps - start, 0), len(decoded), loader, prefetch)
    return _flatten_repeats(batches)


def test_batches(
    videos: Source,
    settings: ClipSettings,
    *,
    clips: int | Sequence[int],
    crops: int,
    batch: int,
    rows: range | None = None,
    shuffle_seed: int | None = None,
    loader: LoaderOptions = DEFAULT,
    prefetch: int = 1,
    size: tuple[int, int] | None = None,
) -> Generator[Batch, None, None]:
    """Yields batches of the views of every video, each video once, in order.

    All batches have the same shape.

    Args:
      videos: data set.
      settings: frame sampling and size of the clips.
      clips: K, number of clips, spread evenly over a video. If there are several numbers, K is
        their sum, and the clips of the first number come first.
      crops: crops of each clip, 1 or 3.
      batch: videos per batch over all hosts; the last batch is padded.
      rows: contiguous rows of the global batch that this host loads; None for all.
      shuffle_seed: seed for shuffling the frames of each clip (Fan et al. 2021, table 9), combined
        with the index of the video; None to keep the order of the frames.
      loader: threads, processes and timeout of the loading; the batches do not depend on them.
      prefetch: number of prefetched batches.
      size: height and width of the clips; None for the square. All key frames of `videos` have this
        size with `settings.full_frame`.

    Yields:
      "clip", uint8 `[rows, K * crops, T, size, size, 3]`, RGB, the crops of the first clip
      first; "label", int32 `[rows]`, or uint8 `[rows, classes]`; "video", int32 `[rows]`, index of
      the video, or -1 for padding; "valid", bool `[rows]`, False for padding and for videos that
      cannot be decoded, whose clips are black. `video.decode_failure` returns the reason. Key
      frames also have "boxes" and "box_mask", see `detection`.

    Raises:
      HungError: while iterating, a batch takes longer than `loader.timeout`.
    """
    rows = _check_rows(rows, batch)
    counts = (clips,) if isinstance(clips, int) else tuple(clips)
    size = size or (settings.size, settings.size)
    load = _TestElements(videos, settings, counts, crops, batch, rows, shuffle_seed, size)
    return load_batches(load, -(-len(videos) // batch), len(rows), loader, prefetch)


def load_train_clips(
    videos: Source, index: int, settings: ClipSettings, rng: np.random.Generator, repeats: int = 1
) -> tuple[UInt8[np.ndarray, "repeats frames size size 3"], Any]:
    """Decodes one random clip of element `index` and augments it `repeats` times.

    Returns:
      The clips, and their label, see `Source.label`.

    Raises:
      DecodeError: the element cannot be decoded.
    """
    with videos.opened(index, settings.frames) as video:
        indices = sampling.train_indices(
            video.num_frames,
            video.fps,
            frames=settings.frames,
            stride=settings.stride,
            sampling=settings.sampling,
            rng=rng,
        )
        indices = settings.by_time(video, indices)

        def augment(frames: np.ndarray) -> np.ndarray:
            # The draws do not depend on the pixels, so all parts of a clip have the same.
            same_rng = copy.deepcopy(rng)
            return np.stack([
                augmentation.augment(
                    frames,
                    settings.augmentation,
                    settings.size,
                    rng=same_rng,
                    image=settings.frames == 1,
                )
                for _ in range(repeats)
            ])  # fmt: skip

        clips = transform_frames(video, indices, augment)
    return clips, videos.label(index, indices)


def load_views(
    videos: Source,
    index: int,
    settings: ClipSettings,
    *,
    clips: int | Sequence[int],
    crops: int,
    shuffle: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "views frames size size 3"]:
    """Returns the test protocol's views of element `index`, see `views`.

    Raises:
      DecodeError: the element cannot be decoded, or is an image although clips have several frames.
    """
    with videos.opened(index, settings.frames) as video:
        return views(video, settings, clips=clips, crops=crops, shuffle=shuffle)


def views(
    video: Footage,
    settings: ClipSettings,
    *,
    clips: int | Sequence[int],
    crops: int,
    shuffle: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "views frames size size 3"]:
    """Returns the test protocol's views of a video, the crops of the first clip first.

    Args:
      video: opened video, image or frames.
      settings: frame sampling and size of the clips.
      clips: clips of the video, as for `test_batches`.
      crops: crops of each clip, 1 or 3.
      shuffle: generator that permutes the frames of each clip; None to keep their order.

    Raises:
      DecodeError: the file is broken.
    """
    counts = (clips,) if isinstance(clips, int) else clips
    indices = np.concatenate([settings.view_indices(video, count) for count in counts])
    if shuffle is not None:
        indices = shuffle.permuted(indices, axis=1)
    cropped = transform_frames(
        video, indices.ravel(), lambda frames: test_crops(frames, settings, crops)
    )
    by_clip = cropped.reshape(crops, *indices.shape, *cropped.shape[2:]).swapaxes(0, 1)
    return by_clip.reshape(len(indices) * crops, *by_clip.shape[2:])


def test_crops(
    frames: UInt8[np.ndarray, "frames height width 3"], settings: ClipSettings, crops: int
) -> UInt8[np.ndarray, "{crops} frames size size 3"]:
    """Returns the test protocol's crops of the scaled frames."""
    size = settings.size
    if settings.whole:
        return augmentation.resize(frames, size, size, settings.interpolation)[None]
    side = settings.short_side if crops == 1 else size
    frames = augmentation.resize_short_side(frames, side, settings.interpolation)
    return augmentation.crop_views(frames, size, crops, image=settings.frames == 1)


@functools.lru_cache(maxsize=4)
def epoch_order(videos: int, seed: int, epoch: int) -> Int64[np.ndarray, " videos"]:
    """Returns the video order of an epoch: a permutation of `range(videos)` from (seed, epoch)."""
    order = _make_rng(_ORDER, seed, epoch).permutation(videos)
    order.flags.writeable = False  # the cache returns the same array to all callers
    return order


@dataclass(frozen=True, eq=False, repr=False)
class ClassMembers:
    """The videos of each class that has any; hashed by identity.

    Attributes:
      indices: indices of the videos, an array for each class.
      videos: number of all videos, including those of unknown class.
    """

    indices: tuple[Int64[np.ndarray, "_"], ...]
    videos: int

    @classmethod
    def of(cls, labels: Int32[np.ndarray, " videos"]) -> "ClassMembers":
        """Groups the videos by their label; a negative label is unknown."""
        classes = np.unique(labels[labels >= 0])
        return cls(tuple(np.flatnonzero(labels == label) for label in classes), len(labels))


@functools.lru_cache(maxsize=4)
def balanced_order(members: ClassMembers, seed: int, epoch: int) -> Int64[np.ndarray, " videos"]:
    """Returns the videos of an epoch of as many draws as videos, from (seed, epoch).

    The classes' numbers of draws differ by 1 at most, as do those of the videos of one class.
    """
    rng = _make_rng(_ORDER, seed, epoch)
    classes = len(members.indices)
    counts = np.full(classes, members.videos // classes)
    counts[rng.permutation(classes)[: members.videos % classes]] += 1
    drawn = []
    for indices, count in zip(members.indices, counts.tolist(), strict=True):
        passes = [rng.permutation(indices) for _ in range(-(-count // len(indices)))]
        drawn.append(np.concatenate(passes)[:count])
    order = rng.permutation(np.concatenate(drawn))
    order.flags.writeable = False  # the cache returns the same array to all callers
    return order


# Dataclasses rather than closures, so that they can be pickled for worker processes. repr=False:
# Grain formats them when it makes an iterator, which took 13 s for 55,000 images in memory.
@dataclass(frozen=True, eq=False, repr=False)
class _TrainElements:
    videos: Source
    settings: ClipSettings
    seed: int
    batch: int
    start: int
    rows: range
    repeats: int
    members: ClassMembers | None = None
    reads: watchdog.ActiveReads | None = None

    def __call__(self, element: int) -> dict[str, Any]:
        step, row = divmod(element, len(self.rows))
        index = (self.start + step) * self.batch + self.rows[row]
        epoch, position = divmod(index, len(self.videos))
        if self.members is None:
            order = epoch_order(len(self.videos), self.seed, epoch)
        else:
            order = balanced_order(self.members, self.seed, epoch)
        drawn = video = int(order[position])
        failure = None
        for attempt in range(_ATTEMPTS):
            rng = _make_rng(_CLIP, self.seed, index, attempt)
            if attempt > 0:
                video = int(rng.integers(len(self.videos)))
            try:
                with watchdog.record_read(self.reads, element, video):
                    content = _train_content(self.videos, video, self.settings, rng, self.repeats)
            except DecodeError as error:
                failure = error
                continue
            broken = np.full(self.repeats, -1 if failure is None else drawn, np.int32)
            return content | {"broken": broken}
        raise UserError(
            f"{_ATTEMPTS} videos drawn from {self.videos.list_file} in a row cannot be decoded: "
            f"check its files; the last failure: {failure}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class _TestElements:
    videos: Source
    settings: ClipSettings
    clips: tuple[int, ...]
    crops: int
    batch: int
    rows: range
    shuffle_seed: int | None
    size: tuple[int, int]
    reads: watchdog.ActiveReads | None = None

    def __call__(self, element: int) -> dict[str, Any]:
        step, row = divmod(element, len(self.rows))
        video = step * self.batch + self.rows[row]
        content = None
        if video >= len(self.videos):
            video = -1  # padding
        else:
            with contextlib.suppress(DecodeError), watchdog.record_read(self.reads, element, video):
                content = self._content(video)
        valid = np.bool_(content is not None)
        return (content or self._blank(video)) | {"video": np.int32(video), "valid": valid}

    def _content(self, video: int) -> dict[str, Any]:
        seed = self.shuffle_seed
        rng = None if seed is None else _make_rng(_SHUFFLE, seed, video)
        if isinstance(self.videos, KeyFrameClips):
            content = detection.load_test_clip(self.videos, video, self.settings, rng)
            if content["clip"].shape[2:4] != self.size:
                raise DecodeError(self.videos.item(video), "its frames differ in size")
            return content
        label = self.videos.label(video)
        views = load_views(
            self.videos, video, self.settings, clips=self.clips, crops=self.crops, shuffle=rng
        )
        return {"clip": views, "label": _label_array(label)}

    def _blank(self, video: int) -> dict[str, Any]:
        """Returns black views, with the label of a video if it can be read.

        Other labels are 0; all labels of a source have one shape.
        """
        frames = self.settings.frames
        if isinstance(self.videos, KeyFrameClips):
            return detection.make_blank_clip(self.videos, frames, *self.size)
        label = 0
        with contextlib.suppress(DecodeError):
            label = np.zeros_like(self.videos.label(0))
            label = self.videos.label(video) if video >= 0 else label
        shape = (sum(self.clips) * self.crops, frames, *self.size, 3)
        return {"clip": np.zeros(shape, np.uint8), "label": _label_array(label)}


def _train_content(
    videos: Source, index: int, settings: ClipSettings, rng: np.random.Generator, repeats: int
) -> dict[str, Any]:
    if isinstance(videos, KeyFrameClips):
        return detection.load_train_clips(videos, index, settings, rng, repeats)
    clips, label = load_train_clips(videos, index, settings, rng, repeats)
    return {"clip": clips, "label": np.stack([_label_array(label)] * repeats)}


def _label_array(label: Any) -> np.ndarray:
    return np.asarray(label, np.int32 if np.ndim(label) == 0 else np.uint8)


def _flatten_repeats(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Reshapes `[videos, repeats, ...]` to `[videos * repeats, ...]`."""
    with contextlib.closing(batches):
        for batch in batches:
            yield {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def _check_rows(rows: range | None, batch: int) -> range:
    if rows is None:
        return range(batch)
    if len(rows) == 0 or rows.step != 1 or rows.start < 0 or rows.stop > batch:
        raise ValueError(f"{rows} is not a contiguous part of the rows of a batch of {batch}")
    return rows


def _make_rng(purpose: int, seed: int, index: int, attempt: int = 0) -> np.random.Generator:
    # Always four words: NumPy pads shorter seeds with zeros, so (a, b) and (a, b, 0) would have
    # the same stream.
    return np.random.default_rng((purpose, seed, index, attempt))
