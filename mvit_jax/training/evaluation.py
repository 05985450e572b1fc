"""The test protocol: every video exactly once, several views each, scores averaged over views."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from mvit_jax.data import pipeline
from mvit_jax.data.decoding import why_broken
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.sources import Source
from mvit_jax.errors import UserError
from mvit_jax.training.sharding import (
    batch_sharding,
    local_rows,
    replicated,
    state_shardings,
    to_devices,
)
from mvit_jax.training.step import Recipe, predict_step


@dataclass
class Scores:
    """What a model said of each video of a list."""

    probabilities: Float[np.ndarray, "videos classes"]  # float64, mean over views
    labels: Int[np.ndarray, " videos"]
    tested: Bool[np.ndarray, " videos"]  # False where the video could not be decoded
    failures: list[str] = field(default_factory=list)  # one sentence for each of those

    def metrics(self) -> dict[str, Any]:
        """top1 and top5 in percent of the tested videos, per-class accuracy, confusion matrix.

        `confusion[i][j]` counts videos of class i that were taken for class j. A class without
        tested videos has an accuracy of None. A `UserError` where no video was tested.
        """
        if not self.tested.any():
            raise UserError(
                f"none of the {len(self.tested)} videos can be decoded: {self.failures[0]}"
            )
        scores, labels = self.probabilities[self.tested], self.labels[self.tested]
        classes = self.probabilities.shape[1]
        # A stable order, so that equal scores give the same answer everywhere.
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = order == labels[:, None]
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (labels, order[:, 0]), 1)
        counts = confusion.sum(1)
        return {
            "top1": 100 * float(hits[:, :1].any(1).mean()),
            "top5": 100 * float(hits[:, :5].any(1).mean()),
            "videos": int(self.tested.sum()),
            "left_out": self.failures,
            "per_class": [
                100 * float(confusion[i, i] / n) if n else None for i, n in enumerate(counts)
            ],
            "confusion": confusion.tolist(),
        }


def evaluate(
    predict: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    videos: Source,
    settings: ClipSettings,
    *,
    clips: int,
    crops: int,
    batch: int,
    mesh: Mesh,
    threads: int = 2,
    shuffle_seed: int | None = None,
    progress: Callable[[int], object] = lambda videos_done: None,
) -> Scores:
    """Scores every video of a list from `clips` x `crops` views, about `batch` videos at a time.

    `predict` comes from `predictor`. With a `shuffle_seed` the frames of each clip are shuffled
    (MViT, Table 9). A video that cannot be decoded is left out and listed in the result.
    """
    scores = np.zeros((len(videos), len(videos.class_names)))
    labels = np.zeros(len(videos), np.int32)
    seen, tested = np.zeros(len(videos), bool), np.zeros(len(videos), bool)
    batch = -(-batch // mesh.size) * mesh.size  # at least one for each device
    rows = local_rows(batch, mesh)
    for loaded in pipeline.test_batches(
        videos, settings, clips=clips, crops=crops, batch=batch, rows=rows,
        shuffle_seed=shuffle_seed, threads=threads,
    ):  # fmt: skip
        on_devices = to_devices(loaded, mesh)
        probabilities = _everywhere(predict(params, on_devices["clip"]))
        index, valid, label = (_everywhere(on_devices[k]) for k in ("video", "valid", "label"))
        real = index >= 0  # the last batch is filled up
        scores[index[real]] = probabilities[real]
        labels[index[real]] = label[real]
        tested[index[real]] = valid[real]
        seen[index[real]] = True
        progress(int(seen.sum()))
    assert seen.all(), "a video was not visited"
    failures = [
        f"{videos.item(i)}: {why_broken(videos.opened(i, settings.frames))}"
        for i in np.flatnonzero(~tested).tolist()
    ]
    return Scores(scores, labels, tested, failures)


def predictor(
    apply: Callable[..., Any], recipe: Recipe, params: Any, mesh: Mesh
) -> Callable[[Any, jax.Array], jax.Array]:
    """`predict(params, clip)`: probabilities of uint8 views, see `step.predict_step`; `params` may
    be shapes. Split by video over the mesh; the answer is on every device."""
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
