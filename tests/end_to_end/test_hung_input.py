"""A run whose clips stop to come saves what it has, says what hangs, and ends all the same."""

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


def hang(path):
    """Puts a pipe, which blocks who opens it for ever, in the place of a video."""
    path.rename(path.with_suffix(".good"))
    os.mkfifo(path)


def mend(path):
    path.with_suffix(".good").replace(path)


@pytest.fixture(scope="module")
def data(digits, tmp_path_factory):
    return shutil.copytree(digits, tmp_path_factory.mktemp("hung") / "data")


@pytest.fixture(scope="module")
def stuck(data, tmp_path_factory):
    """A run one of whose videos, in the third batch of 8, is never read; and how it ended."""
    folder = tmp_path_factory.mktemp("hung") / "run"
    path = video(data, "train", int(pipeline.epoch_order(24, 0, 0)[20]))
    hang(path)
    process = start(data, folder)
    out, err = process.communicate(timeout=240)
    mend(path)
    return folder, path, process.returncode, out, err


def test_training_is_saved_and_ends_with_a_sentence_though_a_thread_still_hangs(stuck):
    folder, path, status, _, err = stuck
    assert status == 1, err
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in err
    assert f"{path} is still being read" in said[0] and os.uname().nodename in said[0]
    assert f"data.timeout={TIMEOUT} s" in said[0]
    assert Checkpoints(folder).step() == 2
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "end" and last["step"] == 2
    assert last["spent"]["data"] > TIMEOUT - 1


def test_the_same_command_goes_on_when_that_is_mended(stuck, data):
    folder = stuck[0]
    process = start(data, folder)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "trained 6 steps" in out and "goodput " in out
    assert Checkpoints(folder).step() == 6

    path = video(data, "test", 3)
    hang(path)
    began = time.monotonic()
    status, output = commands.run("evaluate", f"--workdir={folder}")
    mend(path)
    assert status == 1 and time.monotonic() - began < 120
    assert f"{path} is still being read" in output and "Traceback" not in output
    assert not (folder / "evaluation.json").exists()


def test_a_validation_that_hangs_costs_no_step(data, tmp_path):
    path = video(data, "val", 5)
    hang(path)
    process = start(data, tmp_path / "run", "--config.eval.every_epochs=1")
    _, err = process.communicate(timeout=240)
    mend(path)
    assert process.returncode == 1, err
    assert f"{path} is still being read" in err and "Traceback" not in err
    assert Checkpoints(tmp_path / "run").step() == 3
