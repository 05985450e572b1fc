"""A run of action detection with random weights, for the tests of predictions."""

from contextlib import closing

import jax
import numpy as np

from mvit_jax.models.functional import functional
from mvit_jax.training import build
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.state import init_state
from tests.predict.small import textured, write_video
from tests.support import ava_folder, drawn, tiny

NAMES = ("stand", "walk", "talk to (a person)")


def make_run(folder):
    """Writes a run; returns its config and parameters."""
    config = tiny.config(folder, **ava_folder.FLAGS)
    params = drawn.weights(functional(build.model_config(config, len(NAMES))))
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    workdir.record_config(config, folder)
    (folder / "labels.txt").write_text("\n".join(NAMES) + "\n")
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(init_state(params, build.make_optimizer(config), 0.0), 3)
    return config, params


def wide_video(path):
    """Writes a video of 96 frames of 48 x 64 pixels, at 24 per second."""
    return write_video(path, textured(96), rate=24)
