"""Preprocessing of a file or raw frames into the input of a variant's model."""

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.media.images import Frames
from mvit_jax.data.media.video import opened
from mvit_jax.models.variants import Preprocessing, preprocessing


@dataclass(frozen=True)
class Preprocess:
    """The test preprocessing of a variant, as a callable.

    Attributes:
      settings: sampling, scaling, crop and normalisation.
    """

    settings: Preprocessing

    def __call__(
        self,
        source: str | os.PathLike[str] | np.ndarray,
        *,
        fps: float = 30.0,
        clips: int = 1,
        crops: int = 1,
    ) -> Float32[np.ndarray, "views *time size size 3"]:
        """Samples, scales, crops and normalises frames to the input of the variant's model.

        Args:
          source: path of a video, or of an image for image models; or raw frames `[T, H, W, 3]`,
            uint8 RGB, with any T, H and W; or a raw image `[H, W, 3]` for image models. Image
            models get the middle frame of a video if `clips` is 1.
          fps: frame rate of raw frames; files state their own.
          clips: K, clips spread evenly over the video. A video shorter than a clip repeats its last
            frame.
          crops: crops of each clip: 1 for the centre, 3 along the long side.

        Returns:
          `[clips * crops, T, size, size, 3]`, for image models `[clips * crops, size, size, 3]`,
          normalised by (value / 255 - mean) / std. The crops of the first clip come first.

        Raises:
          UserError: invalid frames or arguments.
          DecodeError: the file cannot be decoded, or is an image although clips have several
            frames.
        """
        if clips < 1 or crops not in (1, 3) or not 0 < fps < float("inf"):
            raise UserError(
                f"clips must be at least 1, crops 1 or 3 and fps above 0, not clips={clips}, "
                f"crops={crops} and fps={fps}"
            )
        expected = self.settings
        settings = pipeline.ClipSettings(
            frames=expected.frames,
            stride=expected.stride,
            size=expected.size,
            short_side=expected.short_side,
            interpolation=expected.interpolation,
            sampling=expected.sampling,
            whole=expected.whole_image,
        )
        if isinstance(source, str | os.PathLike):
            footage = opened(source, expected.frames)
        else:
            footage = contextlib.nullcontext(Frames(_check_frames(source, expected.frames), fps))
        with footage as video:
            views = pipeline.views(video, settings, clips=clips, crops=crops)
        if expected.frames == 1:
            views = views[:, 0]
        # The same arithmetic as models.inference.normalise, which runs on devices.
        std = np.asarray(expected.std)
        clip = views * (1 / (255 * std)).astype(np.float32)
        clip -= (np.asarray(expected.mean) / std).astype(np.float32)
        return clip


def preprocess(variant: str, /, **overrides: Any) -> Preprocess:
    """Returns the preprocessing that the published weights of a variant require, as a callable.

        clip = mvit_jax.preprocess("mvit_b_16x4")("video.mp4")  # float32 [1, 16, 224, 224, 3]

    Args:
      variant: a name of `mvit_jax.VARIANTS`.
      **overrides: fields of `MViTConfig`, as for `create_model`; only `frames` and `size` have an
        effect. Other settings of a preprocessing `p` are changed by
        `Preprocess(dataclasses.replace(p.settings, stride=8))`.

    Raises:
      UserError: unknown variant or field, or a value out of range.
    """
    return Preprocess(preprocessing(variant, **overrides))


def _check_frames(source: Any, clip_frames: int) -> np.ndarray:
    """Returns raw frames as `[T, H, W, 3]`; raises `UserError` if they are invalid."""
    advice = "pass a path, or uint8 RGB frames from 0 to 255 as a NumPy array [T, H, W, 3]"
    if not isinstance(source, np.ndarray):
        raise UserError(f"frames of type {type(source).__name__} are not supported: {advice}")
    if source.dtype != np.uint8:
        raise UserError(f"frames of dtype {source.dtype} are not supported: {advice}")
    if source.ndim not in (3, 4) or source.shape[-1] != 3 or source.size == 0:
        raise UserError(f"frames of shape {list(source.shape)} are not supported: {advice}")
    if source.ndim == 4:
        return source
    if clip_frames > 1:
        raise UserError(
            f"this is one image, but the model requires clips of {clip_frames} frames: {advice}"
        )
    return source[None]
