"""Clips of a test, to be looked at: what the model said of each, and where it looked."""

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
from mvit_jax.training.evaluation import Scores
from mvit_jax.training.step import StepConfig

EXAMPLES = 16  # clips of the sheet
MISTAKES = 8  # of the worst ones
FRAMES = 8  # shown of each clip
ROW = 4  # frames side by side: a picture that a telephone's screen holds
SIDE = 112  # pixels, at most


def make(
    scores: Scores, videos: Source, settings: ClipSettings, params: Any, model: Functional,
    recipe: StepConfig,
) -> dict[str, Any]:  # fmt: skip
    """The sheet of a test and its worst mistakes, to be kept as JSON.

    Returns:
      "examples" and "mistakes", each a list of clips: "video" (its path, from the list's folder),
      "truth" and "predicted" (labels), "probability" (of the predicted class, mean over views),
      "pictures" (WebP as data URIs, each of some frames of the centre clip, and below each frame
      the rollout of attention and Grad-CAM of the clip's most probable class); "wrong", how many
      videos were; "no_attention", why there is none, or None.
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
        "no_attention": painter.why_not,
    }


def examples(scores: Scores, most: int = EXAMPLES) -> list[int]:
    """Places of the videos to show, by class: the first ones that were tested of each class; where
    there are more classes than pictures, of classes spread evenly."""
    first = scores.first_label
    labels = np.unique(first[scores.tested])
    if len(labels) > most:
        labels = labels[np.linspace(0, len(labels) - 1, most).round().astype(int)]
    of_class = [np.flatnonzero(scores.tested & (first == label)) for label in labels]
    return [int(i) for found in of_class for i in found[: most // len(labels)]]


def mistakes(scores: Scores, most: int = MISTAKES) -> list[int]:
    """Places of the videos that were taken for another class, the surest of these first."""
    predicted = scores.predicted
    wrong = np.flatnonzero(scores.tested & ~scores.hit)
    sure = scores.probabilities[wrong, predicted[wrong]]
    return [int(i) for i in wrong[np.argsort(-sure, kind="stable")][:most]]


class Painter:
    """Draws clips, and below them where the model looks, as far as it can be seen."""

    def __init__(self, params: Any, model: Functional, recipe: StepConfig) -> None:
        self.params, self.model, self.recipe = params, model.config, recipe
        exact = replace(model, dtype=jnp.dtype("float32"))
        self.why_not: str | None = None
        self.rollout = jax.jit(functools.partial(attention_maps.rollout, exact))
        self.grad_cam = jax.jit(functools.partial(attention_maps.grad_cam, exact))

    def pictures(self, clip: UInt8[np.ndarray, "time height width 3"]) -> list[str]:
        """Data URIs of WebP pictures with `ROW` frames each."""
        frames = shown(len(clip))
        strips = np.stack([_shrunk(strip[frames]) for strip in (clip, *self._looks(clip))])
        if len(frames) == 1:  # an image: side by side
            return [_webp(strips.swapaxes(0, 1))]
        return [_webp(strips[:, start : start + ROW]) for start in range(0, len(frames), ROW)]

    def _looks(self, clip: np.ndarray) -> list[np.ndarray]:
        """The clip under its rollout, and under its Grad-CAM."""
        if self.why_not is not None:
            return []
        recipe = self.recipe
        try:
            # One clip at a time: the probabilities of a full-size model take much memory.
            normal = normalise(jnp.asarray(clip[None]), recipe.mean, recipe.std, jnp.float32)
            maps = [np.asarray(f(self.params, normal)) for f in (self.rollout, self.grad_cam)]
        except (UserError, jax.errors.JaxRuntimeError) as error:
            self.why_not = first_line(error)
            return []
        time, height, width, _ = clip.shape
        size = (time, height, width)
        blocks = (0, attention_maps.fine_block(self.model, size))
        spread = [
            token_geometry.to_pixels(m, size, self.model, b)
            for m, b in zip(maps, blocks, strict=True)
        ]
        return [render.overlay(clip, heat[0]) for heat in spread]


def shown(frames: int) -> list[int]:
    """Which frames of a clip are shown: all, or some that are spread evenly."""
    return [int(i) for i in np.linspace(0, frames - 1, min(frames, FRAMES)).round()]


def _entry(
    index: int, scores: Scores, videos: Source, settings: ClipSettings, painter: Painter
) -> dict[str, Any]:
    clip = pipeline.load_views(videos, index, settings, clips=1, crops=1)[0]
    predicted = int(scores.predicted[index])
    return {
        "video": _name(videos, index),
        # Of several classes the one that was found, or else the first.
        "truth": predicted if scores.hit[index] else int(scores.first_label[index]),
        "predicted": predicted,
        "probability": float(scores.probabilities[index, predicted]),
        "pictures": painter.pictures(clip),
    }


def _name(videos: Source, index: int) -> str:
    folder = Path(videos.list_file).parent
    path = Path(videos.item(index))
    return os.fspath(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _shrunk(frames: np.ndarray) -> np.ndarray:
    """Frames of at most `SIDE` pixels on either side."""
    height, width = frames.shape[1:3]
    shrink = min(SIDE / max(width, height), 1)
    size = max(round(width * shrink), 1), max(round(height * shrink), 1)
    images = (Image.fromarray(frame) for frame in frames)
    return np.stack([np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for image in images])


def _webp(frames: UInt8[np.ndarray, "rows columns height width 3"]) -> str:
    """Frames in rows, as a data URI; the gaps between them are transparent."""
    gap = max(frames.shape[3] // 32, 1)
    opaque = np.pad(frames, [*[(0, 0)] * 4, (0, 1)], constant_values=255)
    tiles = np.pad(opaque, [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)])
    sheet = rearrange(tiles, "r c height width rgba -> (r height) (c width) rgba")[:-gap, :-gap]
    buffer = io.BytesIO()
    Image.fromarray(sheet, "RGBA").save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
