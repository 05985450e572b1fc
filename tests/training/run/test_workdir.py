"""The lock of a workdir and the record of its last validation."""

import os

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.training.run import workdir


def test_a_second_run_in_a_locked_workdir_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "LOCK_SECONDS", 1)
    messages = []
    refused = pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*: end it")
    with workdir.locked(tmp_path), refused, workdir.locked(tmp_path, messages.append):
        pass
    assert len(messages) == 1 and "waiting until it ends" in messages[0]
    with workdir.locked(tmp_path, messages.append):  # the lock file of an earlier run is there
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
