"""Batches of clips for training and testing.

The data of a run is a pure function of (seed, step). A step of `batch` clips decodes batch /
repeats videos; video v of step s has the global index s * batch / repeats + v, which decides the
file, the frames and every draw of their augmentation. So neither the number of hosts nor of
processes and threads changes what a step sees, and a run resumes by starting at another step; there
is no iterator state to store.
"""

import contextlib
import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.data import augmentation, sampling, watchdog
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.images import DecodeError, Footage
from mvit_jax.data.loader import DEFAULT, Batch, LoaderOptions, batched
from mvit_jax.data.sampling import Sampling
from mvit_jax.data.source import Source

# What random numbers are drawn for: the first word of their seed, so that no two share a stream.
_ORDER, _CLIP, _SHUFFLE = range(3)

_ATTEMPTS = 10


@dataclass(frozen=True)
class ClipSettings:
    """What a clip is.

    Attributes:
      frames: T, frames of a clip; 1 for images, which may be files of images or of videos.
      stride: tau, distance of neighbouring frames, see `sampling`.
      size: side of the square clip in pixels.
      short_side: short side of the frames in pixels from which one test crop is cut; three
        crops are cut from frames whose short side is `size`, as in the released code.
      sampling: which frames of a video make a clip, see `sampling.train_indices`.
      interpolation: how test frames are scaled, "bilinear" as for video or "bicubic" as for
        ImageNet; see `augmentation.resize`.
      whole: whether test frames are squashed to the square, so that nothing is cut off: the
        "resize" column of MViTv2's tables.
      augmentation: what makes a training clip of decoded frames.

    Raises:
      UserError: `short_side` smaller than `size`.
    """

    frames: int
    stride: int
    size: int
    short_side: int
    sampling: Sampling = "span"
    interpolation: augmentation.Interpolation = "bilinear"
    whole: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.short_side < self.size:
            raise UserError(
                f"crops of {self.size} pixels cannot be cut from frames whose short side is "
                f"{self.short_side}: raise the short side or lower the size"
            )
        jitter = self.augmentation.jitter
        if jitter is not None and jitter[0] < self.size:
            raise UserError(
                f"crops of {self.size} pixels cannot be cut from frames whose short side is drawn "
                f"from {jitter[0]} on: raise the lower bound of the jitter, or lower the size"
            )

    def view_indices(self, video: Footage, clips: int) -> Int64[np.ndarray, "clips frames"]:
        """Gives the frames of the test protocol's clips, see `sampling.view_indices`."""
        return sampling.view_indices(
            video.num_frames,
            video.fps,
            frames=self.frames,
            stride=self.stride,
            sampling=self.sampling,
            clips=clips,
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
    repeats: int = 1,
    loader: LoaderOptions = DEFAULT,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Gives the batches of steps `start` to `steps - 1`; closing the generator stops loading.

    Every epoch is a permutation of its own; an epoch may end within a batch. A video that cannot
    be decoded is replaced by another one, drawn from (seed, global index), with its own label.
    With repeats (Hoffer et al. 2020) the clips of a video are neighbours in the batch.

    Args:
      videos: the data set.
      settings: what a clip is.
      seed: of the run, not negative.
      batch: clips per step, all hosts together.
      steps: the step before which to end.
      start: the step to begin with.
      rows: the rows of the global batch that this host loads, contiguous; None for all. Like the
        batch a multiple of `repeats`.
      repeats: clips that are augmented out of the same decoded frames.
      loader: threads, processes and time-out of the loading; the batches do not depend on it.
      prefetch: batches loaded ahead.

    Yields:
      "clip", uint8 `[rows, T, size, size, 3]`, RGB; "label", int32 `[rows]`, or uint8 `[rows,
      classes]` where a video has any number of classes; "broken", int32 `[rows]`, place in
      `videos` of the video that was asked for but could not be decoded (`decoding.why_broken`
      tells the reason), or -1.

    Raises:
      UserError: while iterating, ten videos in a row cannot be decoded.
      HungError: while iterating, a batch does not come in time.
    """
    rows = _checked(rows, batch)
    if batch % repeats or rows.start % repeats or len(rows) % repeats:
        raise UserError(
            f"a batch of {batch} clips, {len(rows)} of them on this host, does not divide into "
            f"{repeats} repeats of each video: set batch to a multiple of {repeats} for each host"
        )
    decoded = range(rows.start // repeats, rows.stop // repeats)
    load = _TrainElements(videos, settings, seed, batch // repeats, start, decoded, repeats)
    return _merged(batched(load, max(steps - start, 0), len(decoded), loader, prefetch))


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
) -> Generator[Batch, None, None]:
    """Gives the views of every video, each video once, in order, in batches of one shape.

    Arguments that are not named here are as for `train_batches`.

    Args:
      clips: K, clips spread evenly over a video; of several numbers, the clips of each in turn.
      crops: squares cut from each clip, 1 or 3.
      batch: videos per batch, all hosts together; the last batch is padded.
      shuffle_seed: if given, the frames of each clip are permuted, by draws from
        (shuffle_seed, place of the video): the test of Fan et al. 2021, table 9.

    Yields:
      "clip", uint8 `[rows, K * crops, T, size, size, 3]`, RGB, the crops of the first clip
      first; "label", int32 `[rows]`, or uint8 `[rows, classes]`; "video", int32 `[rows]`, place
      in `videos`, or -1 for padding; "valid", bool `[rows]`, False for padding and for videos that
      cannot be decoded (`decoding.why_broken` tells the reason), whose clips are black.

    Raises:
      HungError: while iterating, a batch does not come in time.
    """
    rows = _checked(rows, batch)
    counts = (clips,) if isinstance(clips, int) else tuple(clips)
    load = _TestElements(videos, settings, counts, crops, batch, rows, shuffle_seed)
    return batched(load, -(-len(videos) // batch), len(rows), loader, prefetch)


def load_train_clips(
    videos: Source, index: int, settings: ClipSettings, rng: np.random.Generator, repeats: int = 1
) -> tuple[UInt8[np.ndarray, "repeats frames size size 3"], Any]:
    """Decodes the frames of one random clip of element `index`, augments them `repeats` times.

    Returns:
      The clips, and the label, see `Source.label`.

    Raises:
      DecodeError: the file is broken.
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
        frames = video.frames(indices)
    clips = np.stack([
        augmentation.augment(
            frames, settings.augmentation, settings.size, rng=rng, image=settings.frames == 1
        )
        for _ in range(repeats)
    ])  # fmt: skip
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
    clips: int | Sequence[int],
    crops: int,
    shuffle: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "views frames size size 3"]:
    """Gives the views of the test protocol, the crops of the first clip first.

    `clips` and `crops` are as for `test_batches`; `shuffle` permutes the frames of each clip.

    Raises:
      DecodeError: the file is broken.
    """
    counts = (clips,) if isinstance(clips, int) else clips
    indices = np.concatenate([settings.view_indices(video, count) for count in counts])
    if shuffle is not None:
        indices = shuffle.permuted(indices, axis=1)
    # Clips of a short video share frames: each is decoded and resized once.
    wanted, places = np.unique(indices, return_inverse=True)
    cropped = crops_of(video.frames(wanted), settings, crops)
    by_clip = np.moveaxis(cropped[:, places.reshape(indices.shape)], 1, 0)
    return by_clip.reshape(len(indices) * crops, *by_clip.shape[2:])


def crops_of(
    frames: UInt8[np.ndarray, "frames height width 3"], settings: ClipSettings, crops: int
) -> UInt8[np.ndarray, "{crops} frames size size 3"]:
    """Frames scaled and cropped as the test protocol has it."""
    size = settings.size
    if settings.whole:
        return augmentation.resize(frames, size, size, settings.interpolation)[None]
    side = settings.short_side if crops == 1 else size
    frames = augmentation.resize_short_side(frames, side, settings.interpolation)
    return augmentation.crop_views(frames, size, crops, image=settings.frames == 1)


@functools.lru_cache(maxsize=4)
def epoch_order(videos: int, seed: int, epoch: int) -> Int64[np.ndarray, " videos"]:
    """Gives the order of an epoch: a permutation of `range(videos)`, from (seed, epoch)."""
    order = _generator(_ORDER, seed, epoch).permutation(videos)
    order.flags.writeable = False  # it is shared by all who ask
    return order


# These are objects rather than closures, so that they can be sent to other processes. repr=False:
# Grain prints them when an iterator is made, and with them all of the data set, 13 s for 55,000
# images in memory.
@dataclass(frozen=True, eq=False, repr=False)
class _TrainElements:
    videos: Source
    settings: ClipSettings
    seed: int
    batch: int
    start: int
    rows: range
    repeats: int
    board: watchdog.Board | None = None

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
                with watchdog.noted(self.board, element, video):
                    clips, label = load_train_clips(
                        self.videos, video, self.settings, rng, self.repeats
                    )
            except DecodeError as error:
                failure = error
                continue
            label = np.asarray(label, np.int32 if np.ndim(label) == 0 else np.uint8)
            broken = np.full(self.repeats, -1 if failure is None else asked, np.int32)
            return {"clip": clips, "label": np.stack([label] * self.repeats), "broken": broken}
        raise UserError(
            f"{_ATTEMPTS} videos drawn from {self.videos.list_file} one after the other cannot be "
            f"decoded, so check what it holds; the last failure: {failure}"
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
    board: watchdog.Board | None = None

    def __call__(self, element: int) -> dict[str, Any]:
        step, row = divmod(element, len(self.rows))
        video = step * self.batch + self.rows[row]
        settings, label, views = self.settings, None, None
        if video >= len(self.videos):
            video = -1  # padding
        else:
            seed = self.shuffle_seed
            rng = None if seed is None else _generator(_SHUFFLE, seed, video)
            with contextlib.suppress(DecodeError), watchdog.noted(self.board, element, video):
                label = self.videos.label(video)
                views = load_views(
                    self.videos, video, settings, clips=self.clips, crops=self.crops, shuffle=rng
                )
        valid = views is not None
        if views is None:
            size = settings.size
            shape = (sum(self.clips) * self.crops, settings.frames, size, size, 3)
            views = np.zeros(shape, np.uint8)
        if label is None:
            label = self._blank_label()
        return {
            "clip": views,
            "label": np.asarray(label, np.int32 if np.ndim(label) == 0 else np.uint8),
            "video": np.int32(video),
            "valid": np.bool_(valid),
        }

    def _blank_label(self) -> Any:
        """Zeros in the shape of a label; those of a source are all of one kind."""
        with contextlib.suppress(DecodeError):
            return np.zeros_like(self.videos.label(0))
        return 0


def _merged(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Repeats of videos `[videos, repeats, ...]` as clips one after the other."""
    with contextlib.closing(batches):
        for batch in batches:
            yield {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


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
