"""A run whose input hangs saves a checkpoint, names the video and exits."""

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
    """Replaces a video by a pipe, which blocks its readers forever."""
    path.rename(path.with_suffix(".good"))
    os.mkfifo(path)
    yield
    path.with_suffix(".good").replace(path)


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    return shutil.copytree(digits, tmp_path_factory.mktemp("hung") / "data")


@pytest.fixture(scope="module")
def stuck(data, tmp_path_factory):
    """A run with a hanging video in the third batch of 8, the video, and the run's output."""
    folder = tmp_path_factory.mktemp("hung") / "run"
    path = video(data, "train", int(pipeline.epoch_order(24, 0, 0)[20]))
    with hung(path):
        [done] = group.finish([start(data, folder)], 240)
    return folder, path, done


def test_training_saves_and_exits_with_an_error_while_a_thread_hangs(stuck):
    folder, path, done = stuck
    assert done.status == 1, done.err
    [error] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert f"{path} is still being read" in error and os.uname().nodename in error
    assert f"data.timeout={TIMEOUT} s" in error and "Traceback" not in done.err
    assert Checkpoints(folder).step() == 2
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "end" and last["step"] == 2
    assert last["spent"]["data"] > TIMEOUT - 1


def test_the_same_command_resumes_after_the_video_is_restored(stuck, data):
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


def test_a_hanging_validation_loses_no_step(data, tmp_path):
    path = video(data, "val", 5)
    with hung(path):
        [done] = group.finish([start(data, tmp_path / "run", "--config.eval.every_epochs=1")], 240)
    assert done.status == 1, done.err
    assert f"{path} is still being read" in done.err and "Traceback" not in done.err
    assert Checkpoints(tmp_path / "run").step() == 3
