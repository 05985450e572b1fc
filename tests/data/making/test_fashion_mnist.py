"""Preparation of Fashion-MNIST: atomic, resumable, and only from the published files."""

import gzip
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.tfds import read_split
from mvit_jax.data.making import fashion_mnist
from tests.data.making import idx
from tests.data.stored import stills, store
from tests.support import tiny
from tests.support.refusals import refused


@pytest.fixture
def files(tmp_path, monkeypatch):
    idx.replace_published_files(monkeypatch, idx.write(tmp_path / "files"))
    return tmp_path / "files"


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_set_is_not_changed(tmp_path, files):
    out = tmp_path / "out"
    fashion_mnist.prepare(str(out), str(files))
    assert [path.name for path in out.iterdir()] == ["fashion_mnist"]  # no downloads beside it
    before = stamps(out)
    fashion_mnist.prepare(str(out), str(tmp_path / "nowhere"))
    fashion_mnist.prepare(str(out))
    assert stamps(out) == before
    assert len(read_split("fashion_mnist", str(out), "train")) == 96


def test_an_interrupted_run_leaves_no_files_and_can_be_repeated(tmp_path, files, monkeypatch):
    out = tmp_path / "out"
    generate = fashion_mnist.examples

    def interrupted(**kwargs):
        for number, example in enumerate(generate(**kwargs)):
            if number == 30:
                raise KeyboardInterrupt
            yield example

    with monkeypatch.context() as patch:
        patch.setattr(fashion_mnist, "examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fashion_mnist.prepare(str(out), str(files))
    assert not [path for path in out.rglob("*") if path.is_file()]
    with pytest.raises(UserError, match="is not prepared"):
        read_split("fashion_mnist", str(out), "train")
    fashion_mnist.prepare(str(out), str(files))
    assert len(read_split("fashion_mnist", str(out), "test")) == 40


def test_a_finished_set_of_another_format_is_rejected(tmp_path, files):
    options = {"version": "3.0.1", "split": "test", "file_format": "tfrecord"}
    black = {"image": np.zeros((28, 28, 1), np.uint8), "label": 0}
    store(tmp_path / "out", "fashion_mnist", stills(shape=(28, 28, 1)), black, **options)
    with pytest.raises(UserError, match=r"is prepared in .* as tfrecord"):
        fashion_mnist.prepare(str(tmp_path / "out"), str(files))


def test_an_unwritable_folder_ends_with_a_one_sentence_error(files):
    below_a_file = files / "train-images-idx3-ubyte.gz" / "out"
    with pytest.raises(UserError, match=r"cannot be written into .*: not a directory"):
        fashion_mnist.prepare(str(below_a_file), str(files))


def flipped(content, index):
    return content[:index] + bytes([content[index] ^ 0xFF]) + content[index + 1 :]


@pytest.mark.parametrize("name", [f"{name}.gz" for name in fashion_mnist.CONTENTS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "there is no file"),
        (lambda packed: packed[:-20], "cannot be unpacked (compressed file ended"),
        (lambda packed: flipped(packed, len(packed) // 2), "cannot be unpacked ("),
        (
            lambda packed: gzip.compress(flipped(gzip.decompress(packed), 20)),
            "is not Fashion-MNIST's file of this name",
        ),
        (gzip.decompress, "cannot be unpacked (not a gzipped file"),
    ],
)
def test_wrong_files_raise_before_anything_is_written(tmp_path, files, damage, message, name):
    packed = (files / name).read_bytes()
    (files / name).unlink()
    if damage:
        (files / name).write_bytes(damage(packed))
    with refused(message, files / name):
        fashion_mnist.prepare(str(tmp_path / "out"), str(files))
    assert not (tmp_path / "out").exists()


def test_the_error_without_a_network_names_the_files_flag(tmp_path, monkeypatch):
    def no_network(url, timeout):
        assert url.startswith("http") and "fashion-mnist" in url and url.endswith(".gz")
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with refused("(name or service not known): fetch its four files another way", "--files=DIR"):
        fashion_mnist.prepare(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_downloaded_files_and_local_files_give_the_same_set(tmp_path, files, monkeypatch):
    def network(url, timeout):
        return (files / url.rpartition("/")[2]).open("rb")

    monkeypatch.setattr("urllib.request.urlopen", network)
    fashion_mnist.prepare(str(tmp_path / "downloaded"))
    fashion_mnist.prepare(str(tmp_path / "here"), str(files))
    assert [path.name for path in (tmp_path / "downloaded").iterdir()] == ["fashion_mnist"]
    one, other = (
        [example["image"] for example in read_split("fashion_mnist", str(path), "test").examples]
        for path in (tmp_path / "downloaded", tmp_path / "here")
    )
    assert one == other


@pytest.mark.slow
def test_a_killed_run_leaves_no_set_and_can_be_repeated(tmp_path):
    counts = {"train": 6000, "t10k": 1000}
    files, out = tmp_path / "files", tmp_path / "out"
    sums = idx.write(files, counts)
    code = f"""
        import sys
        sys.path.insert(0, {str(tiny.ROOT)!r})
        import pytest
        from mvit_jax.data.making import fashion_mnist
        from tests.data.making import idx
        with pytest.MonkeyPatch.context() as patch:
            idx.replace_published_files(patch, {sums!r}, {counts!r})
            fashion_mnist.prepare({str(out)!r}, {str(files)!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("*/incomplete.*/*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    assert not list(out.glob("fashion_mnist/3*"))
    with pytest.raises(UserError, match="is not prepared"):
        read_split("fashion_mnist", str(out), "train")
    subprocess.run(command, check=True, capture_output=True)
    assert [path.name for path in (out / "fashion_mnist").iterdir()] == ["3.0.1"]
    split = read_split("fashion_mnist", str(out), "train")
    assert idx.elements(split) == idx.expected("train", counts)
