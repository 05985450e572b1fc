"""Policies for losses that are not finite, compared with a plain training loop."""

import contextlib
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax import train
from mvit_jax.training import build
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import history
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.run.nan_policy import ROLLBACKS, SKIPS, NotFiniteError
from mvit_jax.training.step import train_step
from tests.support import tiny
from tests.support.environment import of_process
from tests.support.group import final_state

# 24 videos in batches of 8: 9 steps.
RECIPE = tiny.RECIPE | {"eval.every_epochs": 0.0}


def spoiled(state, batch, learning_rate, *, apply, optimizer, recipe):
    """Runs the training step, with a loss of NaN for batches marked as bad."""

    def model(*args, **more):
        logits, features = apply(*args, **more)
        return logits * jnp.where(jnp.any(batch["bad"]), jnp.nan, 1.0), features

    return train_step(state, batch, learning_rate, apply=model, optimizer=optimizer, recipe=recipe)


BUILT = {}
PROGRAM, BATCHES = build.program, build.batches


def program(config, settings, mesh):
    """Returns `build.program` with the spoiled step, compiled once for all tests."""
    key = config.optim.name
    if key not in BUILT:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "train_step", spoiled)
            BUILT[key] = PROGRAM(config, settings, mesh)
    return BUILT[key]


@contextlib.contextmanager
def bad_at(*steps):
    """Patches `train` so that the loss is NaN at these steps."""

    def spoiling(config, settings, videos, mesh, last, start=0):
        batches = BATCHES(config, settings, videos, mesh, last, start)
        for step, batch in enumerate(batches, start + 1):
            yield batch | {"bad": np.full(config.batch, step in steps)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "batches", spoiling)
        patch.setattr(build, "program", program)
        yield


def run(digits, folder, *steps, **changes):
    with bad_at(*steps):
        assert train.train(tiny.config(digits, **(RECIPE | changes)), str(folder)) == 0
    return final_state(folder)


def by_hand(digits, at):
    """Returns the final tensors of a plain loop.

    `at(step, states)` returns the state after a step that is replaced, computed from all states
    before it, and None for other steps.
    """
    config = tiny.config(digits, **RECIPE)
    videos = build.videos(config, "train")
    settings = build.settings(config, len(videos.class_names))
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), bad_at():
        built = build.program(config, settings, mesh)
        run_step, state = built.step, built.initial_state()
        rates = build.schedule(config, len(videos))
        states = [jax.tree.map(jnp.copy, state)]
        for step, batch in enumerate(build.batches(config, settings, videos, mesh, 9), start=1):
            state = at(step, states)
            if state is None:
                copy, rate = jax.tree.map(jnp.copy, states[-1]), np.float32(rates(step - 1))
                state, _ = run_step(copy, sharding.to_devices(batch, mesh), rate)
            states.append(state)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def with_step(state, step):
    """Returns a state with the same weights and moments and another number of steps."""
    counts = jax.tree.map(
        lambda x: jnp.full_like(x, step) if x.dtype == jnp.int32 else x, state.opt_state
    )
    return replace(state, step=jnp.full_like(state.step, step), opt_state=counts)


def assert_same(ours, theirs):
    ours, theirs = (
        sorted((str(leaf.shape), str(leaf.dtype), leaf.tobytes()) for leaf in leaves)
        for leaves in (ours.values(), theirs)
    )
    assert len(ours) == len(theirs) > 150 and ours == theirs


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    return run(digits, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
def test_skip_drops_the_update_of_a_bad_batch_and_counts_it(digits, tmp_path, plain, capsys):
    ours = run(digits, tmp_path, 4, 5, on_nan="skip")
    assert_same(ours, by_hand(digits, lambda n, s: with_step(s[-1], n) if n in (4, 5) else None))
    assert any((ours[name] != plain[name]).any() for name in plain)
    output = capsys.readouterr().out
    assert "loss is nan at step 4: its update is skipped (1 in a row)" in output
    assert "loss is nan at step 5: its update is skipped (2 in a row)" in output
    lines = history.read(tmp_path).train
    skipped = {line["step"]: line["skipped"] for line in lines}
    assert skipped == {2: 0, 4: 1, 6: 1, 8: 0, 9: 0}
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
def test_rollback_resumes_from_the_last_checkpoint_after_the_bad_batch(
    digits, tmp_path, plain, capsys
):
    """The metrics of step 5 arrive at step 6; the last checkpoint is that of step 4."""
    ours = run(digits, tmp_path, 5, on_nan="rollback")
    assert_same(ours, by_hand(digits, lambda n, s: with_step(s[4], 6) if n == 6 else None))
    assert any((ours[name] != plain[name]).any() for name in plain)
    output = capsys.readouterr().out
    message = "loss is nan at step 5: training continues after step 6 with the weights of step 4"
    assert message in output
    assert int(ours["['training']['step']"]) == 9


@pytest.mark.slow
def test_stop_keeps_the_last_checkpoint_and_allows_another_policy(digits, tmp_path):
    with pytest.raises(NotFiniteError, match=r"loss is nan at step 5: .*on_nan=skip"):
        run(digits, tmp_path, 5)
    assert Checkpoints(tmp_path).step() == 4
    ours = run(digits, tmp_path, 5, on_nan="skip")
    assert_same(ours, by_hand(digits, lambda n, s: with_step(s[-1], n) if n == 5 else None))


@pytest.mark.slow
def test_too_many_skips_in_a_row_end_the_run(digits, tmp_path):
    more = {"epochs": 8.0, "on_nan": "skip"}
    message = rf"at step {2 + SKIPS}, the last of {SKIPS} skipped updates in a row"
    with pytest.raises(NotFiniteError, match=message):
        run(digits, tmp_path, *range(3, 24), **more)
    saved = final_state(tmp_path)
    assert all(np.isfinite(value).all() for value in saved.values())
    # Fewer in a row do not end the run, nor do others apart from each other.
    run(digits, tmp_path / "fewer", *range(3, 2 + SKIPS), 13, 15, 17, **more)


@pytest.mark.nightly
def test_rollbacks_without_progress_end_the_run(digits, tmp_path, capsys):
    with pytest.raises(NotFiniteError, match=f"after {ROLLBACKS} rollbacks to the same weights"):
        run(digits, tmp_path, *range(3, 24), epochs=8.0, on_nan="rollback")
    assert capsys.readouterr().out.count("with the weights of step") == ROLLBACKS
    # Rollbacks with progress in between do not end the run.
    run(digits, tmp_path / "apart", 5, 9, 13, 17, 21, epochs=8.0, on_nan="rollback")


@pytest.mark.slow
def test_a_rollback_before_the_first_checkpoint_ends_the_run(digits, tmp_path):
    with pytest.raises(NotFiniteError, match="at step 1, before the first checkpoint"):
        run(digits, tmp_path, 1, on_nan="rollback")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_weights_that_are_not_finite_are_never_saved(digits, tmp_path, policy):
    """The gradient is finite and the learning rate too large: no batch can be skipped."""
    rates = {"optim.start_lr": 1e-3, "optim.lr": 1e30, "optim.warmup_epochs": 1.0}
    with pytest.raises(NotFiniteError, match="param_norm is inf at step"):
        run(digits, tmp_path, **(rates | {"checkpoint.every": 1, "on_nan": policy}))
    assert all(np.isfinite(value).all() for value in final_state(tmp_path).values())


KILLED = """
import os, signal, sys
from mvit_jax import train
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import tiny
from tests.training.run import test_nan_policy as t

moment, data, folder = sys.argv[1:]
save, wait_and_log = Checkpoints.save, Checkpoints.wait_and_log
rolled = []

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def saving(self, state, step, **more):
    if step == 7:  # no other save is at an odd step
        rolled.append(step)
        if moment == "before":
            kill()
    save(self, state, step, **more)

def waiting(self, *args):
    wait_and_log(self, *args)
    if rolled and self.last.latest_step() == 7:
        kill()

Checkpoints.save = saving
if moment == "after":
    Checkpoints.wait_and_log = waiting
config = tiny.config(data, **(t.RECIPE | {"on_nan": "rollback", "log_every": 1}))
with t.bad_at(7):
    train.train(config, folder)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_during_a_rollback_resumes_to_the_same_parameters(digits, tmp_path, moment):
    """SIGKILL arrives just before or just after the save of the state after the rollback."""
    more = {"on_nan": "rollback", "log_every": 1}
    whole = run(digits, tmp_path / "whole", 7, **more)
    folder = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(digits), str(folder)],
        cwd=tiny.ROOT, env=of_process(1), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert Checkpoints(folder).step() == {"before": 6, "after": 7}[moment]
    ours = run(digits, folder, 7, **more)
    for name, value in whole.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
