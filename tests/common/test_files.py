"""Paths that people name, and files: written whole or not at all, refused before the work."""

import sys
from pathlib import Path

import pytest
from etils import epath

from mvit_jax.common import files
from mvit_jax.common.errors import UserError
from tests.support import bucket


@pytest.mark.parametrize("named", ["runs/b", "runs/b/", "/runs", ".", "", "gs:/b", "C:\\runs", "~"])
def test_what_is_no_address_is_a_path_as_before(named):
    assert files.to_path(named) == Path(named) == files.local_path(named)
    assert isinstance(files.to_path(Path(named)), Path)


@pytest.mark.parametrize("named", ["s3://b/runs", "http://host/runs", "file:///runs", "gs://"])
def test_other_addresses_are_refused_in_one_sentence(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is neither a folder nor in a bucket"):
        files.to_path(named)
    with pytest.raises(UserError, match="is neither a folder nor in a bucket"):
        files.write_whole(named, "")
    with pytest.raises(UserError, match="is not a local path"):
        files.local_path(named)
    assert not list(tmp_path.iterdir())


def test_files_are_written_whole(tmp_path):
    for path in (tmp_path / "a", epath.Path(tmp_path) / "b"):
        files.write_whole(path, "before, ä\n")
        files.write_whole(path, b"after")
        assert path.read_bytes() == b"after"
        files.write_whole(path, "ä")
        assert path.read_bytes() == "ä".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    for folder in (tmp_path, epath.Path(tmp_path)):
        with pytest.raises(UserError, match=r"missing/a cannot be written \(No such file"):
            files.write_whole(folder / "missing" / "a", "text")


def test_faults_in_buckets_are_told_shortly():
    error = OSError('HTTP response code 403 with body \'{\n "message": "refused"}\'\n\t when')
    assert files.why(error) == "HTTP response code 403"
    assert files.why(PermissionError(13, "Permission denied")) == "Permission denied"
    assert files.why(RuntimeError()) == "RuntimeError"


@pytest.fixture
def storage(tmp_path, monkeypatch):
    with bucket.serve(tmp_path, "a-bucket") as storage:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        files._check_bucket.cache_clear()
        yield storage
        files._check_bucket.cache_clear()


def test_a_bucket_is_looked_at_once(storage):
    path = files.to_path("gs://a-bucket/runs/b/")
    assert str(path / "config.json") == "gs://a-bucket/runs/b/config.json"
    assert not files.is_local(path) and path.name == "b"
    asked = len(storage.requests)
    assert asked > 0
    files.to_path("gs://a-bucket/runs/c")
    assert files.to_path(path) is path
    assert len(storage.requests) == asked


def test_a_bucket_that_cannot_be_used_is_one_sentence(storage):
    with pytest.raises(UserError, match=r"^there is no bucket gs://no-bucket: .*\n?$"):
        files.to_path("gs://no-bucket/runs")
    for denied in ("^GET /storage/v1/b/a-bucket", "^GET /storage/v1/b/a-bucket/o"):
        storage.denied = denied
        with pytest.raises(UserError) as told:
            files.to_path("gs://a-bucket/runs")
        assert str(told.value).startswith("the bucket gs://a-bucket cannot be used (")
        assert "give this account roles/storage.objectUser" in str(told.value)
        assert "\n" not in str(told.value)
    storage.denied = None
    assert str(files.to_path("gs://a-bucket/runs")) == "gs://a-bucket/runs"


def test_without_googles_clients_the_pip_line_is_told(monkeypatch):
    files._check_bucket.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(UserError, match=r"gs://some needs .*: pip install -e '.\[gcs\]'"):
        files.to_path("gs://some/runs")


def test_what_can_be_written_is_not_touched(tmp_path):
    files.check_writable(tmp_path / "new.json")
    assert not any(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("old")
    files.check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize("name", ["folder", "missing/new.json", "file/new.json"])
def test_what_cannot_be_written_is_refused_by_both(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for write in (files.check_writable, lambda path: files.write_whole(path, "x")):
        with pytest.raises(UserError, match="cannot be written"):
            write(tmp_path / name)


def test_a_folder_that_is_read_only_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="is not writable"):
        files.check_writable(tmp_path / "new.json")
