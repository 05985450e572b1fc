"""Action detection tests: class probabilities of every box, and the frame mAP."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float64, Int64, Shaped

from mvit_jax.common.errors import UserError
from mvit_jax.data import detection, pipeline
from mvit_jax.data.formats.ava import KeyFrameClips
from mvit_jax.data.formats.ava_tables import KeyFrames
from mvit_jax.data.loader import DEFAULT, LoaderOptions
from mvit_jax.data.media.video import decode_failure
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.training.distributed.sharding import local_rows, to_devices
from mvit_jax.training.evaluation.frame_map import Boxes, FrameAP, Order, measure_frame_ap
from mvit_jax.training.evaluation.protocol import (
    Protocol,
    check_failures,
    divisible_batch,
    gather,
)


@dataclass
class BoxScores:
    """Probabilities of each box of a list, and decode failures.

    Attributes:
      clips: the tested key frames.
      probabilities: those of each row of `clips.key_frames.box`.
      tested: False for key frames that could not be decoded.
      failures: one sentence for each video that has some of these.
    """

    clips: KeyFrameClips
    probabilities: Float64[np.ndarray, "boxes classes"]
    tested: Bool[np.ndarray, " frames"]
    failures: list[str] = field(default_factory=list)

    def frame_ap(self, order: Order) -> FrameAP:
        """Computes the average precisions in an order of matching, see `frame_map`."""
        frames, truth = self.clips.key_frames, self.clips.truth
        names = {name: i for i, name in enumerate(dict.fromkeys(frames.videos + truth.videos))}
        codes = _encode(frames, names), _encode(truth, names)
        images, numbers = np.unique(np.concatenate(codes), return_inverse=True)
        image, true_image = np.split(numbers, [len(frames)])
        if not np.isin(image, true_image).any():
            raise UserError(
                f"none of the tested key frames is in {self.clips.list_file}: check "
                "data.test_boxes and data.val_boxes, which may be of another split"
            )
        left_out = np.isin(true_image, image[~self.tested])
        # In a video that cannot be decoded, key frames without detections are left out as well.
        whole = np.setdiff1d(frames.video[~self.tested], frames.video[self.tested])
        broken = [names[frames.videos[video]] for video in whole.tolist()]
        left_out |= np.isin(codes[1] // _SECONDS, broken)
        classes = np.array([*self.clips.classes.names])
        counted = np.repeat(self.tested, np.diff(frames.starts))
        rows = np.flatnonzero(counted)
        detections = Boxes(
            np.repeat(_spread(frames, image)[rows], len(classes)),
            np.repeat(frames.box[rows], len(classes), axis=0),
            np.tile(classes, len(rows)),
            self.probabilities[rows][:, classes - 1].ravel(),
        )
        box, column = np.nonzero(truth.labels)
        repeats = truth.labels[box, column]
        box, column = np.repeat(box, repeats), np.repeat(column, repeats)
        sound = ~_spread(truth, left_out)[box]
        box, column = box[sound], column[sound]
        excluded_codes = [
            names[video] * _SECONDS + second
            for video, second in self.clips.excluded
            if video in names
        ]
        excluded = np.flatnonzero(np.isin(images, excluded_codes)).tolist()
        return measure_frame_ap(
            Boxes(_spread(truth, true_image)[box], truth.box[box], column + 1),
            detections,
            classes.tolist(),
            order=order,
            excluded=excluded,
            mentioned=true_image.tolist(),
        )

    def metrics(self) -> dict[str, Any]:
        """Computes the frame mAP over the tested key frames.

        Returns:
          A JSON-serialisable dictionary. All precisions are in percent, None for a class without
          labelled boxes.

          * "map": the mAP as PySlowFast computes it, for figures as in the papers.
          * "map_score_order": the mAP as the ActivityNet challenge computes it.
          * "per_class": average precision of each evaluated class, as in "map".
          * "classes": names of these classes; "class_ids", their ids.
          * "truth_per_class": number of labelled boxes of each.
          * "map_by_group", "map_by_size": the mAP of groups of classes, and of the sizes of
            `frame_map.SIZES`.
          * "counts": numbers of images and pairs of a box and a class, see `FrameAP`.
          * "videos": number of tested key frames.
          * "left_out": one sentence per video with key frames that could not be decoded.

        Raises:
          UserError: no key frame was tested, or no evaluated class has a labelled box.
        """
        if not self.tested.any():
            raise UserError(
                f"none of the {len(self.tested)} key frames can be decoded; the first: "
                f"{self.failures[0]}"
            )
        by_file, by_score = self.frame_ap("file"), self.frame_ap("score")
        if math.isnan(by_file.mean):
            raise UserError(
                f"{self.clips.list_file} has no box with one of the evaluated classes, so there is "
                "no mAP: check data.class_list and data.excluded"
            )
        classes = self.clips.classes
        return {
            "map": 100 * by_file.mean,
            "map_score_order": _percent(by_score.mean),
            "per_class": [_percent(ap) for ap in by_file.per_class.tolist()],
            "classes": list(classes.names.values()),
            "class_ids": list(classes.names),
            "truth_per_class": by_file.truth_per_class.tolist(),
            "map_by_group": _percents(by_file.mean_by_group(classes.groups)),
            "map_by_size": _percents(by_file.mean_by_size()),
            "counts": by_file.counts,
            "videos": int(self.tested.sum()),
            "left_out": self.failures,
        }


_SECONDS = 10**6  # more than any second of a key frame


def _encode(frames: KeyFrames, names: dict[str, int]) -> Int64[np.ndarray, " frames"]:
    """Returns a number for each key frame, equal for the same video and second."""
    videos = np.array([names[name] for name in frames.videos], np.int64)
    return videos[frames.video] * _SECONDS + frames.second


def _spread(
    frames: KeyFrames, values: Shaped[np.ndarray, " frames"]
) -> Shaped[np.ndarray, " boxes"]:
    """Returns the value of each box's key frame."""
    return np.repeat(values, np.diff(frames.starts))


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else 100 * share


def _percents(shares: dict[str, float]) -> dict[str, float | None]:
    return {name: _percent(share) for name, share in shares.items()}


def score_boxes(
    predict: Callable[..., jax.Array],
    params: Any,
    clips: KeyFrameClips,
    settings: ClipSettings,
    protocol: Protocol,
    *,
    mesh: Mesh,
    loader: LoaderOptions = DEFAULT,
    shuffle_seed: int | None = None,
    progress: Callable[[int], object] = lambda frames_done: None,
) -> BoxScores:
    """Scores every box of a list; arguments as for `classification.score_videos`.

    With `settings.full_frame`, key frames of videos of one shape follow each other, since each
    shape is a compilation.

    Raises:
      UserError: the share of key frames that cannot be decoded exceeds `protocol.max_broken`.
      HungError: loading a batch exceeds `loader.timeout`.
    """
    scores = np.zeros((len(clips.key_frames.box), clips.classes.count))
    tested, done = np.zeros(len(clips), bool), 0
    batch = divisible_batch(protocol, mesh)
    for frames, size in _same_size(clips, settings):
        part = clips.subset(frames)
        for loaded in pipeline.test_batches(
            part, settings, clips=1, crops=1, batch=batch, rows=local_rows(batch, mesh),
            shuffle_seed=shuffle_seed, loader=loader, size=size,
        ):  # fmt: skip
            on_devices = to_devices(loaded, mesh)
            probabilities = gather(predict(params, on_devices["clip"], on_devices["boxes"]))
            index, valid = gather(on_devices["video"]), gather(on_devices["valid"])
            for row in np.flatnonzero(valid).tolist():
                frame = int(frames[index[row]])
                rows = clips.key_frames.rows(frame)
                scores[rows] = probabilities[row, : rows.stop - rows.start]
                tested[frame] = True
            done += int((index >= 0).sum())
            progress(done)

    broken = np.flatnonzero(~tested)
    failures = _failures(clips, broken, settings.frames)
    check_failures(failures, len(broken), len(clips), protocol, clips.list_file, "key frames")
    return BoxScores(clips, scores, tested, failures)


def _failures(
    clips: KeyFrameClips, broken: Int64[np.ndarray, " frames"], clip_frames: int
) -> list[str]:
    """Returns a sentence for each video of key frames that could not be decoded."""
    sentences = []
    of_video = clips.key_frames.video[broken]
    for video in np.unique(of_video).tolist():
        indices = broken[of_video == video].tolist()
        # All frames may decode, but differ in size from the first.
        reason = (
            decode_failure(clips.opened(indices[0], clip_frames)) or "its frames differ in size"
        )
        more = f" and {len(indices) - 1} more key frames" if len(indices) > 1 else ""
        sentences.append(f"{clips.item(indices[0])}{more}: {reason}")
    return sentences


def _same_size(
    clips: KeyFrameClips, settings: ClipSettings
) -> Iterator[tuple[Int64[np.ndarray, " frames"], tuple[int, int]]]:
    """Yields the key frames whose test clips have the same height and width, and this size."""
    everything = np.arange(len(clips))
    if not settings.full_frame:
        yield everything, (settings.size, settings.size)
        return
    sizes = []
    for video in range(len(clips.key_frames.videos)):
        size = clips.frame_size(video)
        # The clips of a video that cannot be decoded are black, of any size.
        cut = size and detection.choose_test_cut(*size, settings)
        sizes.append((cut.height, cut.width) if cut else (settings.size, settings.size))
    of_clips = np.array(sizes)[clips.key_frames.video]
    for size in sorted(set(sizes)):
        frames = np.flatnonzero((of_clips == size).all(1))
        if len(frames):
            yield frames, size
