"""Grad-CAM of a trained model points at the digit: there is what tells the motions apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.data import moving_digits
from mvit_jax.inspection import places, saliency
from mvit_jax.training import trial


def scenes(count):
    """Clips as the model takes them, [count, 8, 64, 64, 3], and where their digits are."""
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
        masks.append(grown(moving_digits.render(bare)[sampled] > 64))
    clips = (np.stack(clips) / np.float32(255) - np.float32(0.45)) / np.float32(0.225)
    return jnp.asarray(clips), np.stack(masks)


def grown(mask, pixels=4):
    """The mask, and what is within half a token of it."""
    side = np.arange(-pixels, pixels + 1)
    return np.any([np.roll(mask, (y, x), (1, 2)) for y in side for x in side], axis=0)


@pytest.mark.slow
def test_grad_cam_points_at_the_moving_digit(tmp_path):
    moving_digits.prepare(tmp_path / "data", train_videos=1000, val_videos=8, test_videos=40)
    config = trial.read_config(
        "moving_digits", **{"data.folder": str(tmp_path / "data"), "epochs": 2.0, "eval.clips": 1}
    )
    trained = trial.run(config)
    assert trained.scores.metrics()["top1"] > 40  # of eight classes
    clips, masks = scenes(32)
    cam = jax.jit(functools.partial(saliency.grad_cam, config=trained.model))
    heat = places.to_pixels(
        np.asarray(cam(trained.params, clips)), (8, 64, 64), trained.model,
        saliency.fine_block(trained.model, (8, 64, 64)),
    )  # fmt: skip
    share = (heat * masks).sum((1, 2, 3)) / heat.sum((1, 2, 3))
    uniform = masks.mean((1, 2, 3))
    assert uniform.mean() < 0.3
    assert np.median(share / uniform) > 2
    assert (share / uniform > 1.5).mean() > 0.9
