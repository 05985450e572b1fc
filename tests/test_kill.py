"""kill -9 at any moment, start again, end with the same parameters."""

import itertools
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny
from tests.test_programs import final_state

pytestmark = pytest.mark.slow
COMMAND = [
    sys.executable, "-m", "mvit_jax.train", "--config=configs/moving_digits.py", *tiny.FLAGS,
    "--config.epochs=10.0", "--config.checkpoint.every=3", "--config.model.drop_path=0.3",
]  # fmt: skip


def start(digits, folder):
    flags = [f"--config.data.folder={digits}", f"--workdir={folder}"]
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.Popen(
        [*COMMAND, *flags], cwd=tiny.ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(start(digits, folder))
    return final_state(folder)


@pytest.mark.parametrize("seed", range(3))
def test_killed_several_times_ends_with_the_same_parameters(seed, digits, tmp_path, uninterrupted):
    """Kills some random time after one of the lines that tell of a step, twice. Saves happen at
    every third step, so that some kills fall into one."""
    draw = random.Random(seed)
    for _ in range(2):
        process = start(digits, tmp_path)
        assert process.stdout
        steps = (line for line in process.stdout if line.startswith("step"))
        next(itertools.islice(steps, draw.randrange(5, 10), None))
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.wait()
    out = finish(start(digits, tmp_path))
    assert "resumed" in out
    ours = final_state(tmp_path)
    assert ours.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_killed_before_the_first_checkpoint_starts_anew(digits, tmp_path, uninterrupted):
    process = start(digits, tmp_path)
    assert process.stdout
    next(line for line in process.stdout if line.startswith("from step"))
    process.kill()
    process.wait()
    finish(start(digits, tmp_path))
    ours = final_state(tmp_path)
    for name, value in uninterrupted.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
