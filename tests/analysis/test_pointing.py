"""Grad-CAM of a trained model points at the moving digit."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import pointing
from mvit_jax.analysis import attention_maps, token_geometry
from mvit_jax.data.making import moving_digits
from mvit_jax.models.functional import functional
from mvit_jax.training import in_memory


@pytest.mark.nightly
def test_grad_cam_points_at_the_moving_digit(tmp_path):
    moving_digits.prepare(tmp_path / "data", train_videos=1000, val_videos=8, test_videos=40)
    config = in_memory.read_config(
        "moving_digits", **{"data.folder": str(tmp_path / "data"), "epochs": 4.0, "eval.clips": 1}
    )
    trained = in_memory.run(config)
    assert trained.scores.metrics()["top1"] > 40  # of eight classes
    clips, masks = pointing.scenes(32)
    cam = jax.jit(functools.partial(attention_maps.grad_cam, functional(trained.model)))
    heat = token_geometry.to_pixels(
        np.asarray(cam(trained.params, clips)), (8, 64, 64), trained.model,
        attention_maps.fine_block(trained.model, (8, 64, 64)),
    )  # fmt: skip
    assert masks.mean() < 0.3
    ratios = pointing.ratios(heat, masks)
    assert np.median(ratios) > 2
    assert (ratios > 1.5).mean() > 0.9
