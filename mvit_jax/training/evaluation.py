"""The test protocol: every video exactly once, several views each, scores averaged over views."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, Integer

from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.loader import DEFAULT, LoaderOptions
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.source import Source
from mvit_jax.data.video import why_broken
from mvit_jax.training.distributed.sharding import (
    batch_sharding,
    local_rows,
    replicated,
    state_shardings,
    to_devices,
)
from mvit_jax.training.state import State
from mvit_jax.training.step import StepConfig, predict_step

Ensemble = Literal["mean", "max"]


@dataclass(frozen=True)
class Protocol:
    """The test protocol: views of a video, and how their scores become one.

    Attributes:
      clips: numbers of clips spread evenly over a video; for each number, the scores of a video
        are found from so many x `crops` views.
      crops: squares cut from each clip, 1 or 3.
      batch: videos at a time; rounded up to a multiple of the devices.
      ensemble: "mean" of the views' probabilities (the sum of the reference code), or "max"
        (Charades).
      max_broken: share of the videos that may be broken. One that cannot be decoded is left out
        and listed in the result.
    """

    clips: tuple[int, ...] = (1,)
    crops: int = 1
    batch: int = 8
    ensemble: Ensemble = "mean"
    max_broken: float = 1.0


@dataclass
class Scores:
    """What a model said of each video of a list."""

    probabilities: Float[np.ndarray, "videos classes"]  # float64, over views by mean or maximum
    labels: Integer[
        np.ndarray, "videos *classes"
    ]  # a class, or which of the classes (1) or not (0)
    tested: Bool[np.ndarray, " videos"]  # False where the video could not be decoded
    failures: list[str] = field(default_factory=list)  # one sentence for each of those

    @property
    def predicted(self) -> Int[np.ndarray, " videos"]:
        """The most probable class."""
        return self.probabilities.argmax(1)

    @property
    def hit(self) -> Bool[np.ndarray, " videos"]:
        """Whether the most probable class is (one of) the video's."""
        return self._truth()[np.arange(len(self.labels)), self.predicted]

    @property
    def first_label(self) -> Integer[np.ndarray, " videos"]:
        """The video's class, or the first of them; 0 where it has none."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(1)

    def metrics(self) -> dict[str, Any]:
        """top1 and top5 in percent of the tested videos, per-class accuracy, confusion matrix.

        `confusion[i][j]` counts videos of class i that were taken for class j. A class without
        tested videos has an accuracy of None.

        Where a video has any number of classes, it counts as right in top1 and top5 if one of them
        is among the most probable, `confusion[i][j]` counts it for each of its classes i,
        "per_class" is the average precision, and "map" their mean over the classes that occur
        (Charades; Sigurdsson et al. 2016).

        Raises:
          UserError: no video was tested.
        """
        if not self.tested.any():
            raise UserError(
                f"none of the {len(self.tested)} videos can be decoded: {self.failures[0]}"
            )
        scores, truth = self.probabilities[self.tested], self._truth()[self.tested]
        # A stable order, so that equal scores give the same answer everywhere.
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = np.take_along_axis(truth, order, axis=1)
        taken_for = np.eye(scores.shape[1], dtype=np.int64)[order[:, 0]]
        confusion = truth.T.astype(np.int64) @ taken_for
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
        else:
            from sklearn.metrics import average_precision_score  # takes a second

            per_class = [
                100 * float(average_precision_score(t, s)) if t.any() else None
                for t, s in zip(truth.T, scores.T, strict=True)
            ]
            metrics["map"] = float(np.mean([a for a in per_class if a is not None] or [np.nan]))
        return metrics | {"per_class": per_class, "confusion": confusion.tolist()}

    def _truth(self) -> Bool[np.ndarray, "videos classes"]:
        if self.labels.ndim == 2:
            return self.labels.astype(bool)
        return self.labels[:, None] == np.arange(self.probabilities.shape[1])


def evaluate(
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
    """Scores every video of a list, about `protocol.batch` videos at a time.

    Args:
      predict: of `predictor`.
      params: of the model.
      videos: the list.
      settings: what a clip is.
      protocol: the views, and how their scores are averaged.
      mesh: of devices.
      loader: threads and processes that decode.
      shuffle_seed: if given, the frames of each clip are shuffled (MViT, Table 9).
      progress: is told how many videos are done.

    Returns:
      Scores for each of `protocol.clips`, all from one pass over the list.

    Raises:
      UserError: too large a share of the videos is broken.
      HungError: a batch does not come in time.
    """
    count, clips, crops = len(videos), protocol.clips, protocol.crops
    scores = np.zeros((len(clips), count, len(videos.class_names)))
    labels = np.zeros(0, np.int32)
    seen, tested = np.zeros(count, bool), np.zeros(count, bool)
    views = np.split(np.arange(sum(clips) * crops), np.cumsum(clips)[:-1] * crops)
    batch = -(-protocol.batch // mesh.size) * mesh.size  # at least one for each device
    rows = local_rows(batch, mesh)
    for loaded in pipeline.test_batches(
        videos, settings, clips=clips, crops=crops, batch=batch, rows=rows,
        shuffle_seed=shuffle_seed, loader=loader,
    ):  # fmt: skip
        on_devices = to_devices(loaded, mesh)
        probabilities = _everywhere(predict(params, on_devices["clip"]))
        index, valid, label = (_everywhere(on_devices[k]) for k in ("video", "valid", "label"))
        real = index >= 0  # the last batch is filled up
        if len(labels) == 0:
            labels = np.zeros((count, *label.shape[1:]), label.dtype)
        for row, chosen in enumerate(views):
            scores[row, index[real]] = over_views(
                probabilities[real][:, chosen], protocol.ensemble, axis=1
            )
        labels[index[real]] = label[real]
        tested[index[real]] = valid[real]
        seen[index[real]] = True
        progress(int(seen.sum()))
    assert seen.all(), "a video was not visited"
    failures = [
        f"{videos.item(i)}: {why_broken(videos.opened(i, settings.frames))}"
        for i in np.flatnonzero(~tested).tolist()
    ]
    if tested.any() and len(failures) > protocol.max_broken * count:
        raise UserError(
            f"{len(failures)} of the {count} videos of {videos.list_file} cannot be decoded, more "
            f"than data.max_broken={protocol.max_broken:g} of them: mend them or take them out, or "
            f"raise it; the first is {failures[0]}"
        )
    return [Scores(one, labels, tested, failures) for one in scores]


def validate(
    state: State,
    predict: Callable[[Any, jax.Array], jax.Array],
    videos: Source,
    settings: ClipSettings,
    protocol: Protocol,
    *,
    mesh: Mesh,
    loader: LoaderOptions,
) -> dict[str, float]:
    """Returns accuracies in percent, the number of videos and the seconds of a validation, with the
    averaged parameters where the state has them. Arguments are those of `evaluate`."""
    began = time.monotonic()
    [scores] = evaluate(predict, state.tested, videos, settings, protocol, mesh=mesh, loader=loader)
    metrics = scores.metrics()
    return {name: metrics[name] for name in ("map", "top1", "top5") if name in metrics} | {
        "videos": metrics["videos"],
        "seconds": time.monotonic() - began,
    }


def over_views(
    probabilities: Float[np.ndarray, "..."], ensemble: Ensemble, axis: int
) -> Float[np.ndarray, "..."]:
    """What the views along `axis` say together."""
    # In float64: the maximum is the same, the mean does not depend on how many views came together.
    return (np.mean if ensemble == "mean" else np.max)(probabilities.astype(np.float64), axis=axis)


def predictor(
    apply: Callable[..., Any], recipe: StepConfig, params: Any, mesh: Mesh
) -> Callable[[Any, jax.Array], jax.Array]:
    """`predict(params, clip)`: probabilities of each uint8 view, see `step.predict_step`; `params`
    may be shapes. Split by video over the mesh; the answer is on every device."""
    return jax.jit(
        partial(predict_step, apply=apply, recipe=recipe),
        in_shardings=(state_shardings(mesh, params), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def _everywhere(x: jax.Array) -> np.ndarray:
    """The whole array on this process, whichever process holds its rows."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
