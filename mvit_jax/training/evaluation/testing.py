"""Tests of a model on a list: the scores of a classification or a detection data set."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from mvit_jax.data.formats.ava import KeyFrameClips
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.data.source import Source
from mvit_jax.models.plan import Task
from mvit_jax.training.distributed.sharding import batch_sharding, replicated, state_shardings
from mvit_jax.training.evaluation.boxes import BoxScores, score_boxes
from mvit_jax.training.evaluation.classification import Scores, score_videos
from mvit_jax.training.evaluation.protocol import Protocol
from mvit_jax.training.state import State
from mvit_jax.training.step import StepConfig, detect_step, predict_step


def evaluate(
    predict: Callable[..., jax.Array],
    params: Any,
    videos: Source,
    settings: ClipSettings,
    protocol: Protocol,
    **options: Any,
) -> list[Scores] | list[BoxScores]:
    """Scores every video or key frame of a list; arguments as for `score_videos`.

    Returns:
      Scores for each of `protocol.clips`.
    """
    if isinstance(videos, KeyFrameClips):
        return [score_boxes(predict, params, videos, settings, protocol, **options)]
    return score_videos(predict, params, videos, settings, protocol, **options)


def validate(
    state: State,
    predict: Callable[..., jax.Array],
    videos: Source,
    settings: ClipSettings,
    protocol: Protocol,
    *,
    mesh: Mesh,
    loader: LoaderOptions,
) -> dict[str, float]:
    """Validates a state, with its averaged parameters if it has any; arguments as for `evaluate`.

    Returns:
      "top1", "top5" and "mean_class", for multi-label data "map" in place of "mean_class", for
      detection "map" alone, in percent; "videos", the number of tested videos or key frames;
      "seconds", the duration.
    """
    began = time.monotonic()
    [scores] = evaluate(
        predict, state.eval_params, videos, settings, protocol, mesh=mesh, loader=loader
    )
    metrics = scores.metrics()
    names = ("map", "top1", "top5", "mean_class")
    return {name: metrics[name] for name in names if name in metrics} | {
        "videos": metrics["videos"],
        "seconds": time.monotonic() - began,
    }


def predictor(
    apply: Callable[..., Any], recipe: StepConfig, params: Any, mesh: Mesh, task: Task
) -> Callable[..., jax.Array]:
    """Returns the jitted `predict(params, clip)`, for detection `predict(params, clip, boxes)`.

    See `step.predict_step` and `step.detect_step`. The clips are sharded by video over the mesh;
    the probabilities are replicated.

    Args:
      apply: `Functional.apply`.
      recipe: normalisation, dtype and `multi_label`.
      params: the model's parameters, as arrays or shapes.
      mesh: the device mesh.
      task: task of the model.
    """
    step, inputs = (detect_step, 2) if task == "detection" else (predict_step, 1)
    return jax.jit(
        partial(step, apply=apply, recipe=recipe),
        in_shardings=(state_shardings(mesh, params), *[batch_sharding(mesh)] * inputs),
        out_shardings=replicated(mesh),
    )
