"""Fashion-MNIST from files that are here: whole or not at all, and nothing but the real ones."""

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
from tests.support import tiny


@pytest.fixture
def files(tmp_path, monkeypatch):
    idx.instead_of_the_real_ones(monkeypatch, idx.write(tmp_path / "files"))
    return tmp_path / "files"


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_set_is_left_as_it_is(tmp_path, files):
    out = tmp_path / "out"
    fashion_mnist.prepare(str(out), str(files))
    assert [path.name for path in out.iterdir()] == ["fashion_mnist"]  # no downloads beside it
    before = stamps(out)
    fashion_mnist.prepare(str(out), str(tmp_path / "nowhere"))
    fashion_mnist.prepare(str(out))
    assert stamps(out) == before
    assert len(read_split("fashion_mnist", str(out), "train")) == 96


def test_an_interrupted_run_leaves_nothing_and_is_done_again(tmp_path, files, monkeypatch):
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


def test_a_set_of_another_format_is_not_taken_for_a_finished_one(tmp_path, files):
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name="fashion_mnist",
        version="3.0.1",
        data_dir=tmp_path / "out",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        split_datasets={"test": [(0, {"image": np.zeros((28, 28, 1), np.uint8), "label": 0})]},
        file_format="tfrecord",
    )
    with pytest.raises(UserError, match=r"is prepared in .* as tfrecord"):
        fashion_mnist.prepare(str(tmp_path / "out"), str(files))


def test_a_folder_that_cannot_be_written_ends_in_one_sentence(files):
    below_a_file = files / "train-images-idx3-ubyte.gz" / "out"
    with pytest.raises(UserError, match=r"cannot be written into .*: not a directory"):
        fashion_mnist.prepare(str(below_a_file), str(files))


def without(folder, name):
    (folder / name).unlink()


def cut(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def damage(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / name).write_bytes(content)


def other(folder, name):
    content = bytearray(gzip.decompress((folder / name).read_bytes()))
    content[-1] ^= 1
    (folder / name).write_bytes(gzip.compress(bytes(content)))


def plain(folder, name):
    (folder / name).write_bytes(gzip.decompress((folder / name).read_bytes()))


@pytest.mark.parametrize("name", [f"{name}.gz" for name in fashion_mnist.CONTENTS])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (without, "there is no file"),
        (cut, "cannot be unpacked (compressed file ended"),
        (damage, "cannot be unpacked ("),
        (other, "does not hold what Fashion-MNIST's file of this name does"),
        (plain, "cannot be unpacked (not a gzipped file"),
    ],
)
def test_wrong_files_end_in_one_sentence_and_nothing_written(tmp_path, files, harm, message, name):
    harm(files, name)
    with pytest.raises(UserError) as caught:
        fashion_mnist.prepare(str(tmp_path / "out"), str(files))
    assert message in str(caught.value) and str(files / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_a_network_another_way_is_named(tmp_path, monkeypatch):
    def no_network(url, timeout):
        assert url.startswith("http") and "fashion-mnist" in url and url.endswith(".gz")
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError) as caught:
        fashion_mnist.prepare(str(tmp_path / "out"))
    assert "(name or service not known): fetch its four files another way" in str(caught.value)
    assert "--files=DIR" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_downloaded_files_make_the_same_set_as_files_that_are_here(tmp_path, files, monkeypatch):
    def network(url, timeout):
        return (files / url.rpartition("/")[2]).open("rb")

    monkeypatch.setattr("urllib.request.urlopen", network)
    fashion_mnist.prepare(str(tmp_path / "downloaded"))
    fashion_mnist.prepare(str(tmp_path / "here"), str(files))
    assert [path.name for path in (tmp_path / "downloaded").iterdir()] == ["fashion_mnist"]
    splits = (
        read_split("fashion_mnist", str(tmp_path / n), "test") for n in ("downloaded", "here")
    )
    assert [x["image"] for x in next(splits).examples] == [
        x["image"] for x in next(splits).examples
    ]


@pytest.mark.slow
def test_a_killed_run_leaves_no_set_and_is_done_again(tmp_path):
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
            idx.instead_of_the_real_ones(patch, {sums!r}, {counts!r})
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
    images, labels = idx.read(files, "train")
    found = []
    for index in range(len(split)):
        with split.opened(index, 1) as frames:
            found.append((frames.pixels[0, :, :, 0].tobytes(), split.label(index)))
    assert sorted(found) == sorted(zip(map(bytes, images), labels.tolist(), strict=True))
