"""From a file or raw frames to what a variant takes, in one call."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.images import Frames
from mvit_jax.data.video import opened
from mvit_jax.models.variants import Preprocessing, preprocessing


@dataclass(frozen=True)
class Preprocess:
    """The test protocol of a variant, as a function; `settings` says what it does."""

    settings: Preprocessing

    def __call__(
        self,
        source: str | os.PathLike[str] | np.ndarray,
        *,
        fps: float = 30.0,
        clips: int = 1,
        crops: int = 1,
    ) -> Float32[np.ndarray, "views *time size size 3"]:
        """Samples, scales, crops and normalises; gives what the variant's model takes.

        Args:
          source: the path of a video or, where the model takes images, of an image; or frames,
            uint8 RGB from 0 to 255, `[T, H, W, 3]` with any number of frames of any size; or an
            image `[H, W, 3]`. Of a video, a model of images gets the frame in the middle.
          fps: frames a second of raw frames; a file says it itself.
          clips: K, clips spread evenly over the video. The last frame of a video that is shorter
            than a clip is repeated.
          crops: squares cut from each clip: 1 for the centre; 3 along the longer side.

        Returns:
          `[clips * crops, T, size, size, 3]`, and for models of images `[clips * crops, size,
          size, 3]`; the crops of the first clip first; (value / 255 - mean) / std.

        Raises:
          UserError: what is passed is none of these.
          DecodeError: a file cannot be decoded, or is an image where a clip has several frames.
        """
        if clips < 1 or crops not in (1, 3) or not 0 < fps < float("inf"):
            raise UserError(
                f"clips must be at least 1, crops 1 or 3 and fps above 0, not clips={clips}, "
                f"crops={crops} and fps={fps}"
            )
        want = self.settings
        settings = pipeline.ClipSettings(
            frames=want.frames,
            stride=want.stride,
            size=want.size,
            short_side=want.short_side,
            interpolation=want.interpolation,
        )
        if isinstance(source, str | os.PathLike):
            footage = opened(source, want.frames)
        else:
            footage = contextlib.nullcontext(Frames(_checked(source, want.frames), fps))
        with footage as video:
            views = pipeline.views(video, settings, clips=clips, crops=crops)
        if want.frames == 1:
            views = views[:, 0]
        # The arithmetic of models.inference.normalise, which works on devices.
        std = np.asarray(want.std)
        clip = views * (1 / (255 * std)).astype(np.float32)
        clip -= (np.asarray(want.mean) / std).astype(np.float32)
        return clip


def preprocess(variant: str, /, **overrides: Any) -> Preprocess:
    """The preprocessing that the published weights of a variant expect, as a function.

        clip = mvit_jax.preprocess("mvit_b_16x4")("video.mp4")  # float32 [1, 16, 224, 224, 3]

    Args:
      variant: a name of `mvit_jax.VARIANTS`.
      **overrides: fields of `MViTConfig`, as for `create_model`: `frames` and `size` matter.
        Other settings are changed by `Preprocess(dataclasses.replace(p.settings, stride=8))`.

    Raises:
      UserError: no such variant or field.
    """
    return Preprocess(preprocessing(variant, **overrides))


def _checked(source: Any, clip_frames: int) -> np.ndarray:
    """Raw frames `[T, H, W, 3]`, or a sentence on what is wrong with them."""
    wanted = "pass a path, or uint8 RGB frames from 0 to 255 as a NumPy array [T, H, W, 3]"
    if not isinstance(source, np.ndarray):
        raise UserError(f"frames of type {type(source).__name__} are not understood: {wanted}")
    if source.dtype != np.uint8:
        raise UserError(f"frames of {source.dtype} are not understood: {wanted}")
    if source.ndim not in (3, 4) or source.shape[-1] != 3 or source.size == 0:
        raise UserError(f"frames of shape {list(source.shape)} are not understood: {wanted}")
    if source.ndim == 4:
        return source
    if clip_frames > 1:
        raise UserError(
            f"this is one image, and the model takes clips of {clip_frames} frames: {wanted}"
        )
    return source[None]
