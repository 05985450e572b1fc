"""The lock of a workdir and the record of its last validation."""

import os

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.config import base
from mvit_jax.training.run import workdir
from mvit_jax.training.run_folder import check_order
from tests.support.refusals import refused


def test_a_second_run_in_a_locked_workdir_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "LOCK_SECONDS", 1)
    messages = []
    refused = pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*: end it")
    with workdir.lock(tmp_path), refused, workdir.lock(tmp_path, messages.append):
        pass
    assert len(messages) == 1 and "waiting until it ends" in messages[0]
    with workdir.lock(tmp_path, messages.append):  # the lock file of an earlier run is there
        assert len(messages) == 1


def test_file_systems_without_locks_are_accepted(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workdir.fcntl, "flock", no_locks)
    with workdir.lock(tmp_path), workdir.lock(tmp_path):
        pass


def test_the_last_validated_step_is_recorded(tmp_path):
    assert workdir.last_validation(tmp_path) == 0
    workdir.record_validation(tmp_path, 12)
    assert workdir.last_validation(tmp_path) == 12
    (tmp_path / "validated.txt").write_text("?")
    assert workdir.last_validation(tmp_path) == 0


def test_a_resumed_run_has_the_class_names_of_its_start(tmp_path):
    config, names = base(), ("walk", "run", "jump ")
    workdir.prepare(tmp_path, config, ("x", "y"), {})
    workdir.prepare(tmp_path, config, names, {})  # nothing is trained yet
    assert (tmp_path / "labels.txt").read_text() == "walk\nrun\njump \n"
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    workdir.prepare(tmp_path, config, names, {})
    with refused(f"has the classes of {tmp_path}/labels.txt in another order"):
        workdir.prepare(tmp_path, config, ("run", "walk", "jump"), {})
    with refused(f"other classes than {tmp_path}/labels.txt, such as 'ran' instead of 'run'"):
        workdir.prepare(tmp_path, config, ("walk", "ran", "jump"), {})
    assert (tmp_path / "labels.txt").read_text() == "walk\nrun\njump \n"

    check_order(tmp_path, ("walk", "run", "jump"))
    with refused("in another order"):
        check_order(tmp_path, ("run", "walk", "jump"))
    (tmp_path / "labels.txt").unlink()  # as in runs of older versions
    workdir.prepare(tmp_path, config, names, {})
    assert (tmp_path / "labels.txt").exists()
