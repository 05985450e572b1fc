"""Pointing benchmark: how much of Grad-CAM lies near the digit, relative to a uniform map.

    python -m benchmarks.pointing runs/moving_digits     (a run of `make train`; a minute)

Both variants of Grad-CAM are measured at several early blocks. The ratio is a map's share near the
moving digit, divided by a uniform map's share. The table has the mean ratio over clips, and the
share of clips with a ratio above 2.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mvit_jax.analysis import attention_maps, token_geometry
from mvit_jax.data.making import moving_digits
from mvit_jax.training import run_folder


def scenes(count: int) -> tuple[jax.Array, np.ndarray]:
    """Returns normalised clips `[count, 8, 64, 64, 3]`, and masks of digits (plus 4 pixels)."""
    digits, rng = moving_digits.handwriting(seed=0)["test"], np.random.default_rng(0)
    clips, masks = [], []
    for i in range(count):
        scene = moving_digits.draw(i % 8, digits, rng)
        frames = moving_digits.render(scene)
        bare = dataclasses.replace(
            scene, background=0 * scene.background, noise=0 * scene.noise, brightness=255.0
        )
        sampled = np.linspace((len(frames) - 32) // 2, (len(frames) - 32) // 2 + 31, 8).astype(int)
        clips.append(np.repeat(frames[sampled][..., None], 3, axis=-1))
        masks.append(dilate(moving_digits.render(bare)[sampled] > 64))
    clips = (np.stack(clips) / np.float32(255) - np.float32(0.45)) / np.float32(0.225)
    return jnp.asarray(clips), np.stack(masks)


def dilate(mask: np.ndarray, pixels: int = 4) -> np.ndarray:
    """Dilates a mask by `pixels`; the default is half the side of a token."""
    side = np.arange(-pixels, pixels + 1)
    return np.any([np.roll(mask, (y, x), (1, 2)) for y in side for x in side], axis=0)


def ratios(heat: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Returns, per clip, the share of `heat` inside the mask, divided by a uniform map's share.

    The ratio of an empty map is 0.
    """
    share = (heat * masks).sum((1, 2, 3)) / np.maximum(heat.sum((1, 2, 3)), 1e-12)
    return share / masks.mean((1, 2, 3))


def main(workdir: str) -> None:
    params, model = run_folder.read_params(Path(workdir))
    clips, masks = scenes(48)
    print("block  weights      mean ratio  clips above 2")
    for block in (0, 1, 3):
        for by_channel in (False, True):
            cam = functools.partial(
                attention_maps.grad_cam, model, block=block, by_channel=by_channel
            )
            maps = np.asarray(jax.jit(cam)(params, clips))
            pixels = token_geometry.to_pixels(maps, (8, 64, 64), model.config, block)
            ratio = ratios(pixels, masks)
            form = "by channel" if by_channel else "by position"
            print(f"{block:5}  {form:11}  {ratio.mean():10.2f}  {(ratio > 2).mean():12.0%}")


if __name__ == "__main__":
    main(sys.argv[1])
