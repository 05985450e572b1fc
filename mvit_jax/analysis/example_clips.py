"""Example clips of a test with predictions and Grad-CAM, for the HTML report."""

import base64
import functools
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from mvit_jax.analysis import attention_maps, render, token_geometry
from mvit_jax.common.errors import UserError
from mvit_jax.common.text import first_line
from mvit_jax.data import pipeline
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.source import Source
from mvit_jax.models.functional import Functional
from mvit_jax.models.inference import normalise
from mvit_jax.training.evaluation.classification import Scores
from mvit_jax.training.step import StepConfig

EXAMPLES = 16  # example clips at most
MISTAKES = 8  # misclassified clips at most
FRAMES = 8  # frames drawn per clip
ROW = 4  # frames side by side in an image, as many as fit on a phone's screen
SIDE = 112  # pixels of a frame's longer side at most


def make(
    scores: Scores, videos: Source, settings: ClipSettings, params: Any, model: Functional,
    recipe: StepConfig,
) -> dict[str, Any]:  # fmt: skip
    """Draws example clips of a test and its worst mistakes.

    Returns:
      A JSON-serialisable dict:

      - "examples" and "mistakes": lists of clips. A clip has "video" (path relative to the list's
        folder), "truth" and "predicted" (labels), "probability" (of the predicted class, over all
        views) and "pictures" (WebP images as data URIs). A picture has some frames of the centre
        clip, with Grad-CAM of the most probable class below each.
      - "wrong": number of misclassified videos.
      - "no_grad_cam": the reason for missing maps, or None.
    """
    painter = Painter(params, model, recipe)
    chosen, worst = examples(scores), mistakes(scores)
    entries = {
        index: _entry(index, scores, videos, settings, painter) for index in {*chosen, *worst}
    }
    wrong = scores.tested & ~scores.hit
    return {
        "examples": [entries[index] for index in chosen],
        "mistakes": [entries[index] for index in worst],
        "wrong": int(wrong.sum()),
        "no_grad_cam": painter.failure,
    }


def examples(scores: Scores, limit: int = EXAMPLES) -> list[int]:
    """Returns indices of at most `limit` example videos: the first tested ones of each class.

    With more than `limit` classes, only evenly spaced classes have an example, one each.
    """
    first = scores.first_label
    labels = np.unique(first[scores.tested])
    if len(labels) > limit:
        labels = labels[np.linspace(0, len(labels) - 1, limit).round().astype(int)]
    by_class = [np.flatnonzero(scores.tested & (first == label)) for label in labels]
    return [int(i) for indices in by_class for i in indices[: limit // len(labels)]]


def mistakes(scores: Scores, limit: int = MISTAKES) -> list[int]:
    """Returns indices of at most `limit` misclassified videos, the most confident first."""
    predicted = scores.predicted
    wrong = np.flatnonzero(scores.tested & ~scores.hit)
    confidence = scores.probabilities[wrong, predicted[wrong]]
    return [int(i) for i in wrong[np.argsort(-confidence, kind="stable")][:limit]]


class Painter:
    """Draws clips with Grad-CAM.

    Attributes:
      failure: the reason why maps are missing, or None. After the first failure, no
        further maps are computed.
    """

    def __init__(self, params: Any, model: Functional, recipe: StepConfig) -> None:
        self.params, self.model, self.recipe = params, model.config, recipe
        exact = replace(model, dtype=jnp.dtype("float32"))
        self.failure: str | None = None
        self.grad_cam = jax.jit(functools.partial(attention_maps.grad_cam, exact))

    def pictures(self, clip: UInt8[np.ndarray, "time height width 3"]) -> list[str]:
        """Returns a clip as WebP images with up to `ROW` frames each, as data URIs."""
        frames = frame_indices(len(clip))
        strips = np.stack([shrink(strip[frames]) for strip in (clip, *self._overlay(clip))])
        if len(frames) == 1:  # one frame: its overlay is beside it, not below
            return [webp(strips.swapaxes(0, 1))]
        return [webp(strips[:, start : start + ROW]) for start in range(0, len(frames), ROW)]

    def _overlay(self, clip: np.ndarray) -> list[np.ndarray]:
        """Returns the clip overlaid with Grad-CAM, alone in a list; [] on failure."""
        if self.failure is not None:
            return []
        recipe = self.recipe
        try:
            normal = normalise(jnp.asarray(clip[None]), recipe.mean, recipe.std, jnp.float32)
            maps = np.asarray(self.grad_cam(self.params, normal))
        except (UserError, jax.errors.JaxRuntimeError) as error:
            self.failure = first_line(error)
            return []
        time, height, width, _ = clip.shape
        size = (time, height, width)
        block = attention_maps.fine_block(self.model, size)
        return [render.overlay(clip, token_geometry.to_pixels(maps, size, self.model, block)[0])]


def frame_indices(frames: int) -> list[int]:
    """Returns indices of the frames to draw: at most `FRAMES`, evenly spaced."""
    return [int(i) for i in np.linspace(0, frames - 1, min(frames, FRAMES)).round()]


def _entry(
    index: int, scores: Scores, videos: Source, settings: ClipSettings, painter: Painter
) -> dict[str, Any]:
    clip = pipeline.load_views(videos, index, settings, clips=1, crops=1)[0]
    predicted = int(scores.predicted[index])
    return {
        "video": _name(videos, index),
        # With several labels: the predicted one if correct, else the first.
        "truth": predicted if scores.hit[index] else int(scores.first_label[index]),
        "predicted": predicted,
        "probability": float(scores.probabilities[index, predicted]),
        "pictures": painter.pictures(clip),
    }


def _name(videos: Source, index: int) -> str:
    folder = Path(videos.list_file).parent
    path = Path(videos.item(index))
    return os.fspath(path.relative_to(folder) if path.is_relative_to(folder) else path)


def shrink(frames: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Resizes frames to at most `side` pixels on the longer side."""
    height, width = frames.shape[1:3]
    factor = min(side / max(width, height), 1)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    images = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for image in images])


def webp(frames: UInt8[np.ndarray, "rows columns height width 3"]) -> str:
    """Encodes a grid of frames, with transparent gaps, as a data URI."""
    gap = max(frames.shape[3] // 32, 1)
    opaque = np.pad(frames, [*[(0, 0)] * 4, (0, 1)], constant_values=255)
    tiles = np.pad(opaque, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)])
    sheet = rearrange(tiles, "r c height width rgba -> (r height) (c width) rgba")[:-gap, :-gap]
    buffer = io.BytesIO()
    Image.fromarray(sheet, "RGBA").save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
