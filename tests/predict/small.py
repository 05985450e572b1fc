"""A run with random weights, and videos, for the tests of predictions."""

import dataclasses
import functools
from contextlib import closing
from unittest import mock

import av
import jax
import numpy as np

from mvit_jax.models.functional import functional
from mvit_jax.predict.predictor import Predictor
from mvit_jax.training import build
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.state import init_state
from tests.data.media.test_video import audio_only
from tests.support import tiny

IMAGES = {
    "model.variant": "mvit_b16",
    "model.frames": 1,
    "model.patch_kernel": (1, 7, 7),
    "model.patch_stride": (1, 8, 8),
    "model.patch_padding": (0, 3, 3),
    "model.depths": (1,),
    "data.interpolation": "bicubic",
    "data.short_side": 36,
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "augment.crop_area": (0.3, 1.0),
    "eval.clips": 1,
    "eval.every_epochs": 0.0,
}


def fresh(config, seed):
    """Returns a state of random weights."""
    model = build.model_config(config, 8)
    optimizer = build.make_optimizer(config)
    return init_state(functional(model).init(jax.random.key(seed)), optimizer, config.optim.ema)


@functools.cache
def shared_run(digits):
    """Returns the folder of a run beside its data, and its `Predictor`, made once for all tests."""
    folder = make_run(digits, digits.parent / f"{digits.name}_run")
    return folder, predictor_of(folder)


def predictor_of(folder, **options):
    """Returns a `Predictor` on one of the devices, which compiles in half the time."""
    one = jax.devices()[:1]
    with mock.patch.object(jax, "devices", lambda: one):
        return Predictor(folder, **options)


def make_run(digits, folder):
    """Writes a run with different weights in its best, last and averaged last state."""
    config = tiny.config(digits, **{"optim.ema": 0.5})
    workdir.record_config(config, folder)
    state = fresh(config, 0)
    larger = jax.tree.map(lambda leaf: 1.5 * leaf, state.params)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save_if_best(state, 2, 50.0)
        checkpoints.save(dataclasses.replace(state, ema=larger), 3)
    return folder


def write_video(path, frames, rate=30, **options):
    """Writes uint8 frames [time, height, width, 3] as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "10"} | options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def write_audio(path):
    """Writes a file without video, a second of silence."""
    return audio_only(path.parent).rename(path)


def textured(count, height=48, width=64, seed=0):
    """Returns frames that all differ."""
    rng = np.random.default_rng(seed)
    still = rng.integers(20, 120, (height // 4, width // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    # Brighter from frame to frame, and every 50 frames dark again and at another position.
    moved = np.stack([np.roll(still, 4 * (i // 50), axis=1) for i in range(count)])
    return moved + (np.arange(count) % 50).astype(np.uint8)[:, None, None, None]
