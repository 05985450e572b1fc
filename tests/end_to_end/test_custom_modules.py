"""Custom modules that a config names, from training to every program that reads the folder."""

import sys

import jax
import numpy as np
import pytest

from mvit_jax import convert, train
from mvit_jax.common.errors import UserError
from mvit_jax.predict.predictor import Predictor
from mvit_jax.training import build
from mvit_jax.training.run import history
from mvit_jax.training.run_folder import RunFolder, initial_params, read_params
from tests.support import group, scoring, tiny

SOURCE = """
import jax.numpy as jnp
SHARE = 0.5
from flax import nnx
from mvit_jax.models.mvit import Block, PooledAttention
from mvit_jax.models.ops.attention import attend
from mvit_jax.models.pooling import ConvPool


class LayerScale(Block):
    def __init__(self, plan, drop_path, **rest):
        super().__init__(plan, drop_path, **rest)
        self.scale = nnx.Param(jnp.full((1, 1, plan.width_out), 0.5))

    def __call__(self, x, grid, key=None, record=None):
        x = super().__call__(x, grid, key, record)
        return x * self.scale[...].astype(x.dtype)


class Sharper(PooledAttention):  # without weights of its own
    def attend(self, q, k, v, *, query_grid, key_grid, relative=None, record=None):
        return attend(4 * q, k, v, self.plan.heads, relative, record)


class Gated(nnx.Module):
    def __init__(self, pool, channels, *, dtype, rngs):
        self.pool = ConvPool(pool, channels, dtype=dtype, rngs=rngs)
        self.gate = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, tokens, grid):
        gate = nnx.sigmoid(self.gate(tokens.mean(1, keepdims=True)))
        return self.pool(tokens * gate, grid)
"""
NAMES = {
    "model.block": "my_ideas:LayerScale",
    "model.attention": "my_ideas:Sharper",
    "model.pooling": "my_ideas:Gated",
}


@pytest.fixture
def ideas(tmp_path, monkeypatch):
    file = tmp_path / "code" / "my_ideas.py"
    file.parent.mkdir()
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(file.parent)
    yield file
    sys.modules.pop("my_ideas", None)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("LayerScale", "model.block=LayerScale must be MODULE:CLASS"),
        ("no_such:A", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such'\)"),
        ("my_ideas:Nothing", "the module my_ideas has no class Nothing"),
        ("my_ideas:SHARE", "the module my_ideas has no class SHARE"),
    ],
)
def test_bad_module_names_end_with_a_one_sentence_error(name, sentence, ideas):
    with pytest.raises(UserError, match=sentence):
        build.settings(tiny.config("", **{"model.block": name}), 3)


@pytest.mark.parametrize(
    "code",
    [
        "def __init__(self, plan): pass",  # another signature
        "def __call__(self, x, grid, key=None): return x, grid",  # a pair
        "def __call__(self, x, grid, key=None): return x[:, :3]",  # too few tokens
    ],
)
def test_a_module_that_cannot_run_fails_before_anything_is_written(code, ideas, digits, tmp_path):
    ideas.write_text(f"{SOURCE}\n\nclass Broken(Block):\n    {code}\n")
    config = tiny.config(digits, **{"model.block": "my_ideas:Broken"})
    with pytest.raises(UserError, match=r"custom modules fails|block 0"):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def scanned(config, model, mesh):
    """Returns `model.apply` as accelerators run it."""
    return lambda *args, **rest: model.apply(*args, **rest, scan=True, remat="blocks")


@pytest.mark.slow
def test_custom_modules_work_in_every_program(ideas, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "model_apply", scanned)
    folder = tmp_path / "run"
    config = tiny.config(digits, **tiny.RECIPE, **NAMES)
    assert train.train(config, str(folder)) == 0
    out = capsys.readouterr().out
    parameters = sum(x.size for x in jax.tree.leaves(read_params(folder)[0]))
    assert f"{parameters:,} parameters" in out
    assert (folder / "report.html").exists()

    # Stopped in the middle and resumed, it ends the same.
    again = tmp_path / "again"
    with group.at_step(5, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        train.train(config, str(again))
    assert train.train(config, str(again)) == 0
    assert "resumes from this workdir's last checkpoint" in capsys.readouterr().out
    group.assert_same_state(again, folder)

    videos = build.videos(config, "test")
    other = tiny.config(digits, **tiny.RECIPE, **NAMES, resume=str(folder))
    other.model.attention = None
    with pytest.raises(UserError, match=r"resume=.* has other custom modules"):
        train.train(other, str(tmp_path / "other"))
    [scores], _ = scoring.score(config, folder, videos)
    best = history.read(folder).val[-1]
    assert scores.tested.all() and best["videos"] == 8
    predicted = Predictor(folder).predict(videos.item(0))
    np.testing.assert_allclose(predicted.probabilities, scores.probabilities[0], atol=1e-5)

    convert.export_program(folder, tmp_path / "program", "last", 1, None)
    with pytest.raises(UserError, match="has custom modules, which no other project's format"):
        convert.export_checkpoint(folder, tmp_path / "x.pyth", "slowfast", "last")
    plain = build.settings(tiny.config(digits, **tiny.RECIPE), 8).model
    params, words = initial_params(folder, plain, None)
    assert "new" in words and "scale" not in params["blocks"]["0"]

    # Another source is another model.
    capsys.readouterr()
    ideas.write_text(SOURCE.replace("4 * q", "8 * q"))
    with RunFolder(folder) as run:
        run.settings()
    assert "the source of model.block" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has changed since .* delete .*custom\.json"):
        train.train(config, str(folder))
    other.model.attention = NAMES["model.attention"]
    with pytest.raises(UserError, match=r"resume=.*: the source of .* has changed .* restore"):
        train.train(other, str(tmp_path / "other"))
    sys.modules.pop("my_ideas")
    ideas.unlink()
    with pytest.raises(UserError, match="No module named 'my_ideas'"):
        scoring.score(config, folder, videos)
