"""Reading of a run's folder: any kind of path, `load_run`, custom modules."""

import dataclasses
import os
import sys
from contextlib import closing
from pathlib import Path, PurePosixPath

import jax
import numpy as np
import pytest
from etils import epath

import mvit_jax
from mvit_jax import convert
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.media.video import Video
from mvit_jax.training import build, run_folder
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.state import init_state
from tests.predict import small
from tests.support import tiny

NAMES = tuple("abcdefgh")


def saved(folder, config):
    """Saves random weights, with averaged ones that are 1.5 times these; returns the plain ones."""
    workdir.record_config(config, folder)
    model = build.settings(config, 8).model
    params = model.init(jax.random.key(0))
    state = init_state(params, build.make_optimizer(config), config.optim.ema)
    averaged = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(dataclasses.replace(state, ema=averaged), 3)
    (folder / "labels.txt").write_text("\n".join(NAMES))
    return jax.device_get(params)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaded") / "run"
    changes = {"optim.ema": 0.5, "data.stride": 2, "data.mean": (0.4, 0.5, 0.6)}
    saved(folder, tiny.config(digits, **changes))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    return small.write_video(path, small.textured(40))


@pytest.mark.parametrize("kind", [str, Path, PurePosixPath, epath.Path, "relative"])
def test_every_kind_of_path_is_read(kind, run, tmp_path, monkeypatch):
    path = run
    if kind == "relative":
        monkeypatch.chdir(run.parent)
        path = "run"
    elif kind in (PurePosixPath, epath.Path):
        monkeypatch.chdir(run.parent)
        path = kind("run")
    else:
        path = kind(run)
    params, model = run_folder.read_params(path)
    with closing(Checkpoints(path)) as checkpoints:
        assert checkpoints.step() == 3
    loaded = mvit_jax.load_run(path)
    assert loaded.model == model and loaded.class_names == NAMES
    assert len(repr(loaded)) < 3000 and "step=3" in repr(loaded)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert small.predictor_of(path).names == NAMES
    convert.export_checkpoint(path, tmp_path / "out.pyth", "slowfast", "last")
    assert (tmp_path / "out.pyth").exists()


def test_a_loaded_run_predicts_as_its_parameters_and_protocol(run, video):
    loaded = mvit_jax.load_run(run)
    params, model = run_folder.read_params(run)
    settings = pipeline.ClipSettings(frames=4, stride=2, size=32, short_side=32)
    with Video(video) as opened:
        views = pipeline.views(opened, settings, clips=3, crops=1)
    expected = (views / 255 - np.array([0.4, 0.5, 0.6])) / 0.225
    clips = loaded.preprocess(video, clips=3)
    np.testing.assert_allclose(clips, expected, atol=1e-5)
    logits, _ = jax.jit(model.apply)(params, expected.astype(np.float32))
    probabilities = loaded(clips)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-5)
    assert probabilities.shape == (3, 8) and loaded.step == 3
    assert loaded.config.data.stride == 2
    applied, features = jax.jit(loaded.model.apply)(loaded.params, clips)
    np.testing.assert_allclose(applied, logits, atol=1e-4)
    assert set(features) >= {"stages", "tokens"}
    predictor = small.predictor_of(run, clips=3)
    np.testing.assert_allclose(
        predictor.predict(video).probabilities, np.mean(probabilities, 0), atol=1e-5
    )


def test_load_run_takes_plain_weights_and_names_what_is_missing(run):
    plain, averaged = (mvit_jax.load_run(run, weights=w).params for w in ("plain", "ema"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(1.5 * a, b, rtol=1e-6), plain, averaged)
    with pytest.raises(UserError, match="weights must be plain or ema, not 'mean'"):
        mvit_jax.load_run(run, weights="mean")
    with pytest.raises(UserError, match=r"there is no checkpoint in .*best"):
        mvit_jax.load_run(run, which="best")
    with pytest.raises(UserError, match="holds no run"):
        mvit_jax.load_run(run.parent)


def test_sampling_and_scaling_are_those_of_the_run(digits, tmp_path, video):
    changes = {"data.sampling": "segments", "eval.clips": 1, "data.multi_label": True}
    saved(tmp_path / "run", tiny.config(digits, **changes, **{"eval.whole_image": True}))
    loaded = mvit_jax.load_run(tmp_path / "run")
    settings = pipeline.ClipSettings(
        frames=4, stride=4, size=32, short_side=32, sampling="segments", whole=True
    )
    with Video(video) as opened:
        views = pipeline.views(opened, settings, clips=1, crops=1)
    clips = loaded.preprocess(os.fspath(video))
    np.testing.assert_allclose(clips, (views / 255 - 0.45) / 0.225, atol=1e-5)
    logits, _ = jax.jit(loaded.model.apply)(loaded.params, clips)
    np.testing.assert_allclose(loaded(clips), 1 / (1 + np.exp(-logits)), atol=1e-5)


SOURCE = """
from mvit_jax import Block

class Doubled(Block):
    def __call__(self, *args, **options):
        return 2 * super().__call__(*args, **options)
"""


def test_a_run_with_custom_modules_is_loaded_with_them(digits, tmp_path, video, monkeypatch):
    (tmp_path / "ideas_of_a_run.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny.config(digits, **{"model.block": "ideas_of_a_run:Doubled"})
    params = saved(tmp_path / "run", config)
    loaded = mvit_jax.load_run(tmp_path / "run", weights="plain")
    assert loaded.model.is_custom
    clips = loaded.preprocess(video)
    block = sys.modules["ideas_of_a_run"].Doubled
    custom = mvit_jax.functional(loaded.model.config, block=block)
    logits, _ = jax.jit(custom.apply)(params, clips)
    plain, _ = jax.jit(mvit_jax.functional(loaded.model.config).apply)(params, clips)
    np.testing.assert_allclose(loaded(clips), jax.nn.softmax(logits), atol=1e-5)
    assert np.abs(logits - plain).max() > 1e-3
