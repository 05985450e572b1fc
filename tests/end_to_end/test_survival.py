"""External failures of a run: a full disk, a read-only workdir, removed data.

Kills are in `test_kill.py`, losses that are not finite in `training/run/test_nan_policy.py`.
"""

import os
import resource
import shutil

import pytest

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import group, tiny
from tests.support.marks import nightly, slow


def start(data, folder):
    flags = [*tiny.RECIPE_FLAGS, f"--config.data.folder={data}", f"--workdir={folder}"]
    program = ["-m", "mvit_jax.train", "--config=configs/moving_digits.py", *flags]
    return group.start(program, 1, 1)[0]


@pytest.mark.slow
def test_training_on_a_full_disk_continues_until_the_last_save_fails(digits, tmp_path, reference):
    """No file may grow beyond 3 kB from step 4 or 6 on: the saves after that, and of 9, fail."""
    process = start(digits, tmp_path)
    group.wait_for(process, "step 4/")
    while not (tmp_path / "checkpoints" / "4").exists():  # it is written in the background
        assert process.poll() is None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    out, err = process.communicate(timeout=120)  # Orbax's threads would wait longer
    assert process.returncode == 1
    last = Checkpoints(tmp_path).step()
    assert last in (4, 6)
    assert f"checkpoints/{last + 2} could not be written (File too large; its disk has" in out
    assert f"the checkpoint of step {last} is intact; training continues" in out
    assert f"error: the checkpoint {tmp_path}/checkpoints/" in err, err[-2000:]
    assert "Event loop is closed" not in err
    # The same command resumes.
    process = start(digits, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"from step {last} to 9 (resumed)" in out
    group.assert_same_state(tmp_path, reference)


@pytest.mark.slow
def test_a_read_only_workdir_fails_before_compilation(digits, reference, tmp_path, monkeypatch):
    """Also a workdir that holds a run, which needs no writes before the next checkpoint."""

    def fail(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(train, "initial_state", fail)  # the first call that compiles
    with pytest.raises(UserError, match="the workdir /sys/kernel cannot be written"):
        train.train(tiny.config(digits, **tiny.RECIPE), "/sys/kernel")  # not by root either

    folder = shutil.copytree(reference, tmp_path / "run")
    before = sorted(folder.rglob("*"))

    def read_only(path, *args, **more):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(type(folder), "write_text", read_only)
    monkeypatch.setattr(type(folder), "write_bytes", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): choose"):
        train.train(tiny.config(digits, **tiny.RECIPE), str(folder))
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("processes", [slow(0), nightly(2)])
def test_removing_the_data_during_a_run_ends_it_without_losing_steps(digits, tmp_path, processes):
    data = shutil.copytree(digits, tmp_path / "data")
    videos, elsewhere = data / "videos" / "train", data / "elsewhere"

    folder = str(tmp_path / "run")
    changes = {"epochs": 6.0, "data.processes": processes, "data.threads": 1}  # 18 steps
    config = tiny.config(data, **(tiny.RECIPE | changes))
    error = pytest.raises(UserError, match=r"cannot be decoded: check its files")
    with group.at_step(3, lambda: videos.rename(elsewhere)), error:
        train.train(config, folder)
    step = Checkpoints(folder).step()
    assert step is not None and 3 <= step < 18
    elsewhere.rename(videos)
    assert train.train(config, folder) == 0
    assert Checkpoints(folder).step() == 18
