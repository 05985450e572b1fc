"""Paths and buckets of arguments, atomic writes, and early errors for unwritable paths."""

import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from etils import epath

import mvit_jax.config
from mvit_jax.common import files
from mvit_jax.common.errors import UserError
from mvit_jax.data.making.splitting import write_lists
from mvit_jax.data.source import open_source
from mvit_jax.training.run import workdir
from mvit_jax.training.run_folder import RunFolder, class_names
from mvit_jax.weights.tensor_files import read_tensors, write_torch
from tests.support import bucket


@pytest.mark.parametrize("name", ["runs/b", "runs/b/", "/runs", ".", "", "gs:/b", "C:\\runs"])
def test_names_without_a_scheme_are_local_paths(name):
    assert files.to_path(name) == Path(name) == files.local_path(name)
    assert isinstance(files.to_path(Path(name)), Path)


def test_a_leading_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for name, path in {
        "~": "/home/ann",
        "~/runs/b": "/home/ann/runs/b",
        "runs/~/b": "runs/~/b",
        "./~/b": str(Path.cwd() / "~/b"),
        "~nobody-has-this-name/b": str(Path.cwd() / "~nobody-has-this-name/b"),
    }.items():
        assert files.to_path(name) == files.local_path(name) == files.expanded(name) == Path(path)
        assert files.to_path(files.to_path(name)) == Path(path)


def test_files_are_written_and_read_in_the_home(tmp_path, monkeypatch):
    """Functions of all rooms that get a user's path; none makes a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    home = tmp_path / "home"
    for name in ("cat/a.mp4", "dog/b.mp4"):
        (home / "data" / name).parent.mkdir(parents=True)
        (home / "data" / name).touch()
    write_lists("~/data", val=0.0, test=0.0)
    assert len(open_source("~/data", "train.csv")) == 2
    assert len(open_source(home, "data", source="folders", train_list="data")) == 2
    config = mvit_jax.config.base()
    config.data.folder = "~/data"
    assert class_names(config, home, 2) == ("cat", "dog")

    workdir.prepare("~/runs/a", config, ("cat", "dog"), {})
    assert (home / "runs/a/labels.txt").read_text() == "cat\ndog\n"
    with RunFolder("~/runs/a") as run:
        assert run.path == home / "runs/a" and run.config.data.folder == "~/data"
    files.write_atomically("~/a.json", "{}")
    assert (home / "a.json").exists()
    write_torch("~/a.pth", {"x": np.ones(2, np.float32)})
    assert read_tensors("~/a.pth").tensors["x"].tolist() == [1, 1]
    (home / "mine.py").write_text("from mvit_jax import config\nget_config = config.base\n")
    assert mvit_jax.config.load("~/mine.py").to_dict() == mvit_jax.config.base().to_dict()
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("kind", [PurePosixPath, epath.Path])
def test_paths_of_other_libraries_are_local_paths(kind):
    """A relative one would reach Orbax, which refuses it."""
    path = files.to_path(kind("runs/b"))
    assert isinstance(path, Path) and path == Path("runs/b")


@pytest.mark.parametrize("name", ["s3://b/runs", "http://host/runs", "file:///runs", "gs://"])
def test_other_addresses_are_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is neither a local folder nor in a bucket"):
        files.to_path(name)
    with pytest.raises(UserError, match="is neither a local folder nor in a bucket"):
        files.write_atomically(name, "")
    with pytest.raises(UserError, match="is not a local path"):
        files.local_path(name)
    assert not list(tmp_path.iterdir())


def test_files_are_replaced_without_remains(tmp_path):
    for path in (tmp_path / "a", epath.Path(tmp_path) / "b"):
        files.write_atomically(path, "before, ä\n")
        files.write_atomically(path, b"after")
        assert path.read_bytes() == b"after"
        files.write_atomically(path, "ä")
        assert path.read_bytes() == "ä".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path):
    files.write_atomically(tmp_path / "a.csv", "caf\udce9.mp4 ä\n")
    assert (tmp_path / "a.csv").read_text() == "caf\\udce9.mp4 ä\n"


def test_a_failed_write_ends_with_a_one_sentence_error(tmp_path):
    for folder in (tmp_path, epath.Path(tmp_path)):
        with pytest.raises(UserError, match=r"missing/a cannot be written \(No such file"):
            files.write_atomically(folder / "missing" / "a", "text")


def test_bucket_errors_are_shortened():
    error = OSError('HTTP response code 403 with body \'{\n "message": "refused"}\'\n\t when')
    assert files.describe_error(error) == "HTTP response code 403"
    assert files.describe_error(PermissionError(13, "Permission denied")) == "Permission denied"
    assert files.describe_error(RuntimeError()) == "RuntimeError"


@pytest.fixture
def storage(tmp_path, monkeypatch):
    with bucket.serve(tmp_path, "a-bucket") as storage:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        files._check_bucket.cache_clear()
        yield storage
        files._check_bucket.cache_clear()


def test_a_bucket_is_checked_once(storage):
    path = files.to_path("gs://a-bucket/runs/b/")
    assert str(path / "config.json") == "gs://a-bucket/runs/b/config.json"
    assert not files.is_local(path) and path.name == "b"
    count = len(storage.requests)
    assert count > 0
    files.to_path("gs://a-bucket/runs/c")
    assert files.to_path(path) is path
    assert len(storage.requests) == count


def test_an_unusable_bucket_ends_with_a_one_sentence_error(storage):
    with pytest.raises(UserError, match=r"^there is no bucket gs://no-bucket: .*\n?$"):
        files.to_path("gs://no-bucket/runs")
    for denied in ("^GET /storage/v1/b/a-bucket", "^GET /storage/v1/b/a-bucket/o"):
        storage.denied = denied
        with pytest.raises(UserError) as error:
            files.to_path("gs://a-bucket/runs")
        assert str(error.value).startswith("the bucket gs://a-bucket cannot be used (")
        assert "give this account roles/storage.objectUser" in str(error.value)
        assert "\n" not in str(error.value)
    storage.denied = None
    assert str(files.to_path("gs://a-bucket/runs")) == "gs://a-bucket/runs"


def test_without_the_gcs_clients_the_error_has_the_pip_line(monkeypatch):
    files._check_bucket.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(UserError, match=r"gs://some needs .*: pip install -e '.\[gcs\]'"):
        files.to_path("gs://some/runs")


def test_checking_a_writable_path_leaves_it_unchanged(tmp_path):
    files.check_writable(tmp_path / "new.json")
    assert not any(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("old")
    files.check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize("name", ["folder", "missing/new.json", "file/new.json"])
def test_unwritable_paths_are_refused_by_check_and_write(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for write in (files.check_writable, lambda path: files.write_atomically(path, "x")):
        with pytest.raises(UserError, match="cannot be written"):
            write(tmp_path / name)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="is not writable"):
        files.check_writable(tmp_path / "new.json")
