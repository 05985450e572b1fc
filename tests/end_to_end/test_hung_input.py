"""A run whose clips stop to come saves what it has, says what hangs, and ends all the same."""

import contextlib
import json
import os
import shutil
import time

import pytest

from mvit_jax.data import pipeline
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import commands, group

pytestmark = pytest.mark.slow

TIMEOUT = 6  # seconds: loading 8 tiny clips takes milliseconds, but machines are shared


def start(data, folder, *flags):
    program = [
        *group.TRAIN, f"--config.data.folder={data}", f"--workdir={folder}", "--config.epochs=2",
        f"--config.data.timeout={TIMEOUT}", "--config.data.threads=1", *flags,
    ]  # fmt: skip
    return group.start(program, 1, 1)[0]


def video(data, name, number):
    return data / (data / f"{name}.csv").read_text().splitlines()[number].split()[0]


@contextlib.contextmanager
def hung(path):
    """Within, a pipe, which blocks who opens it for ever, is in the place of a video."""
    path.rename(path.with_suffix(".good"))
    os.mkfifo(path)
    yield
    path.with_suffix(".good").replace(path)


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    return shutil.copytree(digits, tmp_path_factory.mktemp("hung") / "data")


@pytest.fixture(scope="module")
def stuck(data, tmp_path_factory):
    """A run one of whose videos, in the third batch of 8, is never read; and how it ended."""
    folder = tmp_path_factory.mktemp("hung") / "run"
    path = video(data, "train", int(pipeline.epoch_order(24, 0, 0)[20]))
    with hung(path):
        [done] = group.finish([start(data, folder)], 240)
    return folder, path, done


def test_training_is_saved_and_ends_with_a_sentence_though_a_thread_still_hangs(stuck):
    folder, path, done = stuck
    assert done.status == 1, done.err
    [said] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert f"{path} is still being read" in said and os.uname().nodename in said
    assert f"data.timeout={TIMEOUT} s" in said and "Traceback" not in done.err
    assert Checkpoints(folder).step() == 2
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "end" and last["step"] == 2
    assert last["spent"]["data"] > TIMEOUT - 1


def test_the_same_command_goes_on_when_that_is_mended(stuck, data):
    folder = stuck[0]
    [done] = group.finish([start(data, folder)], 240)
    assert done.status == 0, done.err
    assert "trained 6 steps" in done.out and "goodput " in done.out
    assert Checkpoints(folder).step() == 6

    path = video(data, "test", 3)
    began = time.monotonic()
    with hung(path):
        status, output = commands.run("evaluate", f"--workdir={folder}")
    assert status == 1 and time.monotonic() - began < 120
    assert f"{path} is still being read" in output and "Traceback" not in output
    assert not (folder / "evaluation.json").exists()


def test_a_validation_that_hangs_costs_no_step(data, tmp_path):
    path = video(data, "val", 5)
    with hung(path):
        [done] = group.finish([start(data, tmp_path / "run", "--config.eval.every_epochs=1")], 240)
    assert done.status == 1, done.err
    assert f"{path} is still being read" in done.err and "Traceback" not in done.err
    assert Checkpoints(tmp_path / "run").step() == 3
