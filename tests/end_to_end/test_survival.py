"""What can happen to a run from outside: each has its outcome, and is caused here.

Kills are in `test_kill.py`, losses that are not finite in `training/test_not_finite.py`.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.training import run_folder
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import group, tiny
from tests.support.environment import of_process
from tests.support.group import final_state
from tests.training.run.test_checkpoints import flip, values_of

RECIPE = tiny.RECIPE


def flags(data, folder):
    return [
        "--config=configs/moving_digits.py", *tiny.RECIPE_FLAGS,
        f"--config.data.folder={data}", f"--workdir={folder}",
    ]  # fmt: skip


def start(data, folder, stderr=subprocess.PIPE, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "mvit_jax.train", *flags(data, folder)],
        cwd=tiny.ROOT, env=of_process(1), stdout=subprocess.PIPE, stderr=stderr, text=True, **more,
    )  # fmt: skip


def assert_ends_like(folder, reference):
    ours, theirs = final_state(folder), final_state(reference)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    digits, reference, tmp_path, capsys
):
    folder = shutil.copytree(reference, tmp_path / "run")
    flip(values_of(folder, 9, "ema"))
    with pytest.raises(UserError, match=r"checkpoints/9 (is damaged|cannot be read)"):
        run_folder.read_params(folder)
    assert train.train(tiny.config(digits, **RECIPE), str(folder)) == 0
    said = capsys.readouterr().out
    assert "training goes on from 8" in said
    assert f"is now {folder}/damaged/9" in said and "from step 8 to 9 (resumed)" in said
    assert_ends_like(folder, reference)


@pytest.mark.slow
def test_with_all_checkpoints_damaged_nothing_starts_anew(digits, reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "run")
    for step in (8, 9):
        flip(values_of(folder, step))
    with pytest.raises(UserError, match=r"no checkpoint is left to go on from: .*checkpoints/8"):
        train.train(tiny.config(digits, **RECIPE), str(folder))
    assert sorted(child.name for child in (folder / "checkpoints").iterdir()) == ["8", "9"]


@pytest.mark.slow
def test_on_a_full_disk_training_goes_on_as_long_as_there_is_hope(digits, tmp_path, reference):
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
    assert f"that of step {last} is whole; training goes on" in out
    assert f"error: the checkpoint {tmp_path}/checkpoints/" in err, err[-2000:]
    assert "Event loop is closed" not in err
    # The same command goes on.
    process = start(digits, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"from step {last} to 9 (resumed)" in out
    assert_ends_like(tmp_path, reference)


@pytest.mark.nightly
def test_a_disk_that_was_full_for_a_while_costs_nothing(digits, tmp_path, reference):
    process = start(digits, tmp_path, stderr=subprocess.DEVNULL)  # Orbax would fill a pipe
    group.wait_for(process, "step 2/")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    group.wait_for(process, "the checkpoint ")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    out, _ = process.communicate(timeout=120)  # Orbax's threads would wait longer
    assert process.returncode == 0 and "trained 9 steps" in out
    assert_ends_like(tmp_path, reference)


@pytest.mark.nightly
def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(digits, tmp_path, reference):
    folder = tmp_path / "run"
    process = start(digits, folder)
    unfinished = None
    while unfinished is None:
        assert process.poll() is None
        with contextlib.suppress(FileNotFoundError):
            names = [child.name for child in (folder / "checkpoints").iterdir()]
            unfinished = next((n for n in names if n.startswith("4.orbax-checkpoint-tmp")), None)
    process.kill()
    process.communicate()
    # It was found half-written; where it was renamed before the kill came, that is made undone.
    step = Checkpoints(folder).step()
    assert step in (2, 4)
    if step == 4:
        whole = folder / "checkpoints" / "4"
        values_of(folder, 4).unlink()
        whole.rename(folder / "checkpoints" / str(unfinished))
    process = start(digits, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "from step 2 to 9 (resumed)" in out
    assert_ends_like(folder, reference)
    assert sorted(child.name for child in (folder / "checkpoints").iterdir()) == ["8", "9"]


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_is_told_before_anything_is_compiled(
    digits, reference, tmp_path, monkeypatch
):
    """Also one that holds a run, of which nothing is to be written but the next checkpoint."""

    def no(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(train.build, "program", no)
    with pytest.raises(UserError, match="the workdir /sys/kernel cannot be written"):
        train.train(tiny.config(digits, **RECIPE), "/sys/kernel")  # not by root either

    folder = shutil.copytree(reference, tmp_path / "run")
    before = sorted(folder.rglob("*"))

    def read_only(path, *args, **more):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(type(folder), "write_text", read_only)
    monkeypatch.setattr(type(folder), "write_bytes", read_only)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): choose"):
        train.train(tiny.config(digits, **RECIPE), str(folder))
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_video_removed_in_mid_run_is_replaced_and_told(digits, tmp_path, capsys):
    data = shutil.copytree(digits, tmp_path / "data")
    gone = [data / line.split()[0] for line in (data / "train.csv").read_text().splitlines()[:3]]

    class Removing(train.Logbook):
        def step(self, step, *args):
            super().step(step, *args)
            if step == 2:
                for path in gone:
                    path.unlink()

    changes = RECIPE | {"data.threads": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Logbook", Removing)
        assert train.train(tiny.config(data, **changes), str(tmp_path / "run")) == 0
    said = capsys.readouterr().out
    for path in gone:
        assert said.count(f"{path} cannot be decoded (") == 1
    assert "3 of the 24 videos could not be decoded and were replaced" in said


@pytest.mark.parametrize(
    "processes",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.nightly)],
)
def test_a_folder_removed_in_mid_run_ends_it_and_costs_no_step(digits, tmp_path, processes):
    data = shutil.copytree(digits, tmp_path / "data")
    videos, elsewhere = data / "videos" / "train", data / "elsewhere"

    class Removing(train.Logbook):
        def step(self, step, *args):
            super().step(step, *args)
            if step == 3 and videos.exists():
                videos.rename(elsewhere)

    folder = str(tmp_path / "run")
    changes = {"epochs": 6.0, "data.processes": processes, "data.threads": 1}  # 18 steps
    config = tiny.config(data, **(RECIPE | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Logbook", Removing)
        with pytest.raises(UserError, match=r"cannot be decoded, so check what it holds"):
            train.train(config, folder)
    step = Checkpoints(folder).step()
    assert step is not None and 3 <= step < 18
    elsewhere.rename(videos)
    assert train.train(config, folder) == 0
    assert Checkpoints(folder).step() == 18
