"""One run in one folder at a time."""

import os

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.training.run import workdir


def test_a_second_start_waits_and_is_then_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "LOCK_SECONDS", 1)
    said = []
    refused = pytest.raises(UserError, match=f"in use: process {os.getpid()} of .* trains there")
    with workdir.locked(tmp_path), refused, workdir.locked(tmp_path, said.append):
        pass
    assert len(said) == 1 and "waiting until it has ended" in said[0]
    with workdir.locked(tmp_path, said.append):  # whatever an earlier one has left
        assert len(said) == 1


def test_where_a_file_system_has_no_locks_training_goes_on(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(workdir.fcntl, "flock", no_locks)
    with workdir.locked(tmp_path), workdir.locked(tmp_path):
        pass


def test_the_last_step_that_was_validated_is_noted(tmp_path):
    assert workdir.validated(tmp_path) == 0
    workdir.keep_validated(tmp_path, 12)
    assert workdir.validated(tmp_path) == 12
    (tmp_path / "validated.txt").write_text("?")
    assert workdir.validated(tmp_path) == 0
