"""Predictions of a trained model for video and image files."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from mvit_jax.analysis import attention_maps, token_geometry
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath
from mvit_jax.config import Config
from mvit_jax.data import pipeline
from mvit_jax.data.media.images import Footage, Frames
from mvit_jax.data.media.video import Video, opened
from mvit_jax.models.functional import check_stage, select_features
from mvit_jax.models.inference import Inference, Output, normalise
from mvit_jax.models.plan import MViTConfig
from mvit_jax.predict.windows import Timeline, clips_of, is_long, windows
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import classification
from mvit_jax.training.run_folder import RunFolder, class_names

AT_A_TIME = 8  # windows per batch
SHOWN = 8  # windows of a long video whose frames are returned for figures


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one file, with some of the clips that the model saw.

    Attributes:
      probabilities: softmax (sigmoid if multi-label) of the logits, as mean or maximum over all
        crops of all clips or windows. The run's test protocol selects mean or maximum.
      clips: number of clips or windows.
      timeline: probabilities over time of a long video, else None.
      shown: centre crops of the middle clip, or of evenly spaced windows of a long video.
      times: presentation times of the frames of `shown`, in seconds.
      seconds: length of the video; 0 for an image.
      features: features of each clip or window, as mean over its crops; None if not requested.
    """

    probabilities: Float64[np.ndarray, " classes"]
    clips: int
    timeline: Timeline | None
    shown: UInt8[np.ndarray, "clips time size size 3"]
    times: Float64[np.ndarray, "clips time"]
    seconds: float
    features: Float32[np.ndarray, "inputs channels"] | None = None


class Predictor:
    """The model of a workdir, or of a folder that `convert` wrote.

    Attributes:
      config: the run's config, with `clips` and `crops` applied.
      model: the architecture.
      names: of the classes.
      step: of the checkpoint.

    Raises:
      UserError: the folder has no run or no such checkpoint, or the number of class names is wrong.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        *,
        which: str = "last",
        weights: str | None = None,
        clips: int | None = None,
        crops: int | None = None,
        features: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
          folder: a folder with config.json and checkpoints.
          which: the "last" or the "best" checkpoint.
          weights: "plain", or "ema" for averaged weights; by default averaged ones if any.
          clips: K of the test protocol, which disables windows. By default the config's K, and long
            videos are read in windows.
          crops: squares cut from each clip, 1 or 3; by default the config's.
          features: features that predictions have: "head", the vector that the head classifies, or
            "stage:K", the mean over the grid after stage K, from 0 (`functional.select_features`).
            None for none.
        """
        mesh = sharding.make_mesh()  # the run's mesh may need more devices than this machine has
        changes = {"eval.clips": clips, "eval.crops": crops}
        with RunFolder(folder, changes, weights=weights) as run:
            self.config: Config = run.config
            self.names = class_names(self.config, folder, run.num_classes(which))
            settings = run.settings(which)
            self._params, self.step = run.params_on(mesh, which), run.step(which)
        self._handle, self.model = settings.model, settings.model.config
        self._settings, self._recipe = settings.clips, settings.step
        # With segment sampling, one clip already covers the whole video.
        self._takes_windows = clips is None and self._settings.sampling == "span"
        eval_ = self.config.eval
        self._logits = Inference(
            self._handle,
            self._params,
            mean=self._recipe.mean,
            std=self._recipe.std,
            # Batch sizes for short videos, and for windows of long videos.
            buckets=(eval_.clips * eval_.crops, AT_A_TIME * eval_.crops),
            devices=jax.devices(),
            output=None if features is None else _with_features(features, self.model),
        )

    def predict(
        self,
        path: str | os.PathLike[str],
        *,
        check: Callable[[Video | Frames], None] = lambda video: None,
        progress: Callable[[int, int], object] = lambda done, of: None,
    ) -> Prediction:
        """Predicts the classes of a video or image file.

        A short file is read as in the test protocol, a long video in windows (`windows.is_long`).

        Args:
          path: the file.
          check: called with the opened file; may raise.
          progress: called with the number of windows done and the total, once per batch.

        Raises:
          DecodeError: the file cannot be decoded, or is an image and the model takes clips.
        """
        eval_, settings = self.config.eval, self._settings
        with opened(path, settings.frames) as video:
            check(video)
            n, fps = video.num_frames, video.fps
            if (
                self._takes_windows
                and isinstance(video, Video)
                and is_long(
                    n, fps, frames=settings.frames, stride=settings.stride, clips=eval_.clips
                )
            ):
                return self._predict_windows(video, progress)
            indices = settings.view_indices(video, eval_.clips)
            if isinstance(video, Video):
                views = np.concatenate(list(clips_of(video, indices, self._crop)))
            else:
                views = pipeline.views(video, settings, clips=eval_.clips, crops=eval_.crops)
        middle = eval_.clips // 2
        by_view, features = self._split(list(self._scored([views])), eval_.clips)
        return Prediction(
            probabilities=classification.reduce_views(by_view, eval_.ensemble, axis=0),
            clips=eval_.clips,
            timeline=None,
            shown=views[middle * eval_.crops + eval_.crops // 2][None],
            times=_seconds(video, indices[middle][None]),
            seconds=n / fps if isinstance(video, Video) else 0.0,
            features=features,
        )

    def _predict_windows(self, video: Video, progress: Callable[[int, int], object]) -> Prediction:
        settings, crops = self._settings, self.config.eval.crops
        spans = windows(video.num_frames, video.fps, frames=settings.frames, stride=settings.stride)
        indices = settings.by_time(video, spans.indices)
        count = len(indices)
        drawn = np.unique(np.linspace(0, count - 1, SHOWN).round().astype(int))
        shown: list[np.ndarray] = []

        def batches() -> Iterator[np.ndarray]:
            batch: list[np.ndarray] = []
            for i, clip in enumerate(clips_of(video, indices, self._crop)):
                batch.append(clip)
                if i in drawn:
                    shown.append(clip[crops // 2])
                if len(batch) == AT_A_TIME or i == count - 1:
                    progress(i + 1, count)
                    yield np.concatenate(batch)
                    batch.clear()

        by_view, features = self._split(list(self._scored(batches())), count)
        ensemble = self.config.eval.ensemble
        by_crop = by_view.reshape(count, crops, -1)
        by_window = classification.reduce_views(by_crop, ensemble, axis=1)
        return Prediction(
            probabilities=classification.reduce_views(by_window, ensemble, axis=0),
            clips=count,
            timeline=Timeline(spans.starts, spans.ends, by_window),
            shown=np.stack(shown),
            times=_seconds(video, indices[drawn]),
            seconds=video.num_frames / video.fps,
            features=features,
        )

    def _crop(
        self, frames: UInt8[np.ndarray, "time _ _ 3"]
    ) -> UInt8[np.ndarray, "crops time size size 3"]:
        return pipeline.test_crops(frames, self._settings, self.config.eval.crops)

    def _scored(
        self, batches: Iterable[np.ndarray]
    ) -> Iterator[Float64[np.ndarray, "views columns"]]:
        """Yields probabilities of batches of uint8 views, and after them the features, if any."""
        classes = len(self.names)
        activation = jax.nn.sigmoid if self._recipe.multi_label else jax.nn.softmax
        pending: jax.Array | None = None
        for views in batches:
            with jax.default_matmul_precision(self.config.precision):
                output = self._logits(views)
                probabilities = activation(output[:, :classes])
                if output.shape[1] > classes:
                    probabilities = jnp.concatenate([probabilities, output[:, classes:]], axis=1)
            if pending is not None:  # the next batch is decoded while the model computes
                yield np.asarray(pending, np.float64)
            pending = probabilities
        if pending is not None:
            yield np.asarray(pending, np.float64)

    def _split(
        self, batches: list[Float64[np.ndarray, "_ columns"]], clips: int
    ) -> tuple[Float64[np.ndarray, "views classes"], Float32[np.ndarray, "clips channels"] | None]:
        """Splits the columns of `_scored` into probabilities, and features averaged over crops."""
        by_view, classes = np.concatenate(batches), len(self.names)
        if by_view.shape[1] == classes:
            return by_view, None
        features = by_view[:, classes:].reshape(clips, -1, by_view.shape[1] - classes).mean(1)
        return by_view[:, :classes], features.astype(np.float32)

    def grad_cam(
        self, shown: UInt8[np.ndarray, "clips time size size 3"]
    ) -> Float32[np.ndarray, "clips time size size"]:
        """Returns Grad-CAM of each clip's most probable class, per pixel.

        Values are at least 0; their scale differs from clip to clip.
        """
        with jax.default_matmul_precision(self.config.precision):
            # One clip at a time: gradients need the activations of many blocks.
            maps = [np.asarray(self._jitted_grad_cam(self._params, clip[None])) for clip in shown]
        size = shown.shape[1:4]
        return token_geometry.to_pixels(np.concatenate(maps), size, self.model, self._fine_block)

    @cached_property
    def _jitted_grad_cam(self) -> Callable[[Any, np.ndarray], jax.Array]:
        model = replace(self._handle, dtype=jnp.dtype("float32"))

        def grad_cam(params: Any, clip: jax.Array) -> jax.Array:
            clip = normalise(clip, self._recipe.mean, self._recipe.std, jnp.float32)
            return attention_maps.grad_cam(model, params, clip, block=self._fine_block)

        return jax.jit(grad_cam)

    @property
    def _fine_block(self) -> int:
        size = self.model.size
        return attention_maps.fine_block(self.model, (self.model.frames, size, size))


def _with_features(name: str, model: MViTConfig) -> Output:
    """Returns the function that appends the features called `name` to the logits.

    Raises:
      UserError: there are no such features.
    """
    kind, _, number = name.partition(":")
    if name != "head" and not (kind == "stage" and number.isdecimal()):
        raise UserError(f"features of {name!r} do not exist: choose head, or stage:K from stage:0")
    stage = None if name == "head" else int(number)
    check_stage(model, stage)

    def append(logits: jax.Array, features: dict[str, Any]) -> jax.Array:
        return jnp.concatenate([logits, select_features(features, stage)], axis=1)

    return append


def _seconds(video: Footage, indices: np.ndarray) -> np.ndarray:
    """Returns the presentation times of frames."""
    return video.seconds[indices] if isinstance(video, Video) else indices / video.fps
