"""Classification tests: class probabilities of every video over several views, and metrics."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, Integer

from mvit_jax.common import extras
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.loader import DEFAULT, LoaderOptions
from mvit_jax.data.media.video import decode_failure
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.data.source import Source
from mvit_jax.training.distributed.sharding import local_rows, to_devices
from mvit_jax.training.evaluation.protocol import (
    Ensemble,
    Protocol,
    check_failures,
    divisible_batch,
    gather,
)


@dataclass
class Scores:
    """Per-video probabilities, labels and decode failures of a test."""

    probabilities: Float[np.ndarray, "videos classes"]  # float64, mean or maximum over the views
    labels: Integer[np.ndarray, "videos *classes"]  # class indices, or 0 and 1 if multi-label
    tested: Bool[np.ndarray, " videos"]  # False for videos that could not be decoded
    failures: list[str] = field(default_factory=list)  # one sentence per undecodable video

    @property
    def predicted(self) -> Int[np.ndarray, " videos"]:
        """The most probable class of each video."""
        return self.probabilities.argmax(1)

    @property
    def hit(self) -> Bool[np.ndarray, " videos"]:
        """True for videos whose most probable class is one of their labels."""
        return self._label_mask()[np.arange(len(self.labels)), self.predicted]

    @property
    def first_label(self) -> Integer[np.ndarray, " videos"]:
        """The first class of each video; 0 for a multi-label video without classes."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def metrics(self) -> dict[str, Any]:
        """Computes accuracies and the confusion matrix over the tested videos.

        Returns:
          A JSON-serialisable dictionary. All accuracies are in percent.

          * "top1", "top5": share of the videos for which one of the 1 or 5 most probable classes is
            correct.
          * "mean_class", for single-label data: mean class accuracy, the mean of the top-1
            accuracies of all classes with tested videos.
          * "per_class": accuracy of each class; for multi-label data its average precision. None
            for classes without tested videos.
          * "confusion": `confusion[i][j]` counts videos of class i predicted as class j. A
            multi-label video counts for each of its classes i.
          * "map", for multi-label data: mean average precision over the classes that occur
            (Charades; Sigurdsson et al. 2016).
          * "videos": number of tested videos.
          * "left_out": one sentence per undecodable video.

        Raises:
          UserError: no video was tested.
        """
        if not self.tested.any():
            raise UserError(
                f"none of the {len(self.tested)} videos can be decoded; the first: "
                f"{self.failures[0]}"
            )
        scores, truth = self.probabilities[self.tested], self._label_mask()[self.tested]
        # Stable sorting gives the same result on every platform for equal scores.
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = np.take_along_axis(truth, order, axis=1)
        predictions = np.eye(scores.shape[1], dtype=np.int64)[order[:, 0]]
        confusion = truth.T.astype(np.int64) @ predictions
        metrics = {
            "top1": 100 * float(hits[:, :1].any(1).mean()),
            "top5": 100 * float(hits[:, :5].any(1).mean()),
            "videos": int(self.tested.sum()),
            "left_out": self.failures,
        }
        if self.labels.ndim == 1:
            per_class = [
                100 * float(confusion[i, i] / n) if n else None
                for i, n in enumerate(truth.sum(0).tolist())
            ]
            metrics["mean_class"] = float(np.mean([a for a in per_class if a is not None]))
        else:
            extras.require("sklearn")
            from sklearn.metrics import average_precision_score  # importing takes a second

            per_class = [
                100 * float(average_precision_score(t, s)) if t.any() else None
                for t, s in zip(truth.T, scores.T, strict=True)
            ]
            metrics["map"] = float(np.mean([a for a in per_class if a is not None] or [np.nan]))
        return metrics | {"per_class": per_class, "confusion": confusion.tolist()}

    def _label_mask(self) -> Bool[np.ndarray, "videos classes"]:
        if self.labels.ndim == 2:
            return self.labels.astype(bool)
        return self.labels[:, None] == np.arange(self.probabilities.shape[1])


def score_videos(
    predict: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    videos: Source,
    settings: ClipSettings,
    protocol: Protocol,
    *,
    mesh: Mesh,
    loader: LoaderOptions = DEFAULT,
    shuffle_seed: int | None = None,
    progress: Callable[[int], object] = lambda videos_done: None,
) -> list[Scores]:
    """Scores every video of a list in one pass.

    Args:
      predict: the function returned by `testing.predictor`.
      params: the model's parameters.
      videos: the list of videos.
      settings: frames and size of a clip.
      protocol: the views, the ensemble and the batch size.
      mesh: the device mesh.
      loader: decoding threads, processes and timeout.
      shuffle_seed: seed to shuffle the frames of each clip (MViT, Table 9); None for no shuffling.
      progress: called with the number of finished videos after each batch.

    Returns:
      Scores for each of `protocol.clips`.

    Raises:
      UserError: the share of broken videos exceeds `protocol.max_broken`. If all videos are broken,
        `Scores.metrics` raises instead.
      HungError: loading a batch exceeds `loader.timeout`.
    """
    count, clips, crops = len(videos), protocol.clips, protocol.crops
    scores = np.zeros((len(clips), count, len(videos.class_names)))
    labels = np.zeros(0, np.int32)
    seen, tested = np.zeros(count, bool), np.zeros(count, bool)
    views = np.split(np.arange(sum(clips) * crops), np.cumsum(clips)[:-1] * crops)
    batch = divisible_batch(protocol, mesh)
    rows = local_rows(batch, mesh)
    for loaded in pipeline.test_batches(
        videos, settings, clips=clips, crops=crops, batch=batch, rows=rows,
        shuffle_seed=shuffle_seed, loader=loader,
    ):  # fmt: skip
        on_devices = to_devices(loaded, mesh)
        probabilities = gather(predict(params, on_devices["clip"]))
        index, valid, label = (gather(on_devices[k]) for k in ("video", "valid", "label"))
        real = index >= 0  # the last batch is padded
        if len(labels) == 0:
            labels = np.zeros((count, *label.shape[1:]), label.dtype)
        for row, columns in enumerate(views):
            scores[row, index[real]] = reduce_views(
                probabilities[real][:, columns], protocol.ensemble, axis=1
            )
        labels[index[real]] = label[real]
        tested[index[real]] = valid[real]
        seen[index[real]] = True
        progress(int(seen.sum()))
    assert seen.all(), "a video was not visited"
    failures = [
        f"{videos.item(i)}: {decode_failure(videos.opened(i, settings.frames))}"
        for i in np.flatnonzero(~tested).tolist()
    ]
    check_failures(failures, len(failures), count, protocol, videos.list_file)
    return [Scores(p, labels, tested, failures) for p in scores]


def reduce_views(
    probabilities: Float[np.ndarray, "..."], ensemble: Ensemble, axis: int
) -> Float[np.ndarray, "..."]:
    """Reduces the probabilities of the views along `axis` to their mean or maximum, in float64."""
    # In float64, the mean is independent of the batching of views, as the maximum always is.
    return (np.mean if ensemble == "mean" else np.max)(probabilities.astype(np.float64), axis=axis)
