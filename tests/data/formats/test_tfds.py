"""Images prepared by TFDS against the original files."""

import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.data import pipeline
from mvit_jax.data.formats import tfds as tfds_images
from mvit_jax.data.formats.tfds import read_split
from mvit_jax.data.making import fashion_mnist
from mvit_jax.data.media.video import DecodeError, decode_failure
from mvit_jax.training import build
from tests.data.making import idx
from tests.data.stored import stills, store
from tests.support import scoring, tiny
from tests.support.refusals import refused

# Synsets of ImageNet.
SYNSETS = ("n01440764", "n15075141", "n01739381")  # labels 0, 999 and 60
VALIDATION = [3, 1, 4, 2]  # in the order of the tar, not sorted by name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set in the format of Fashion-MNIST, prepared by TFDS."""
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        idx.replace_published_files(patch, idx.write(files))
        fashion_mnist.prepare(str(folder), str(files))
    return str(folder)


def pixels(split, index):
    with split.opened(index, 1) as frames:
        return frames.frames([0])[0]


@pytest.mark.parametrize(("name", "part"), [("train", "train"), ("test", "t10k")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_elements_equal_the_original_files(folder, monkeypatch, name, part, in_memory):
    if not in_memory:
        monkeypatch.setattr(tfds_images, "IN_MEMORY", 0)
    split = read_split("fashion_mnist:3.0.1", folder, name)
    assert idx.elements(split) == idx.expected(part)
    assert split.class_names[0] == "T-shirt/top" and split.class_names[9] == "Ankle boot"
    assert len(split.class_names) == 10
    assert split.item(3) == f"fashion_mnist/3.0.1/{name}/3"
    repeated = [pixels(split, index) for index in (5, 5)]
    assert np.array_equal(*repeated)
    assert (split.decoded is not None) == in_memory


def test_slices_of_a_split_add_up_to_the_split(folder):
    parts = [read_split("fashion_mnist", folder, name) for name in ("train[:70]", "train[70:]")]
    assert [len(part) for part in parts] == [70, 26]
    assert sorted(idx.elements(parts[0]) + idx.elements(parts[1])) == idx.expected("train")
    assert parts[1].list_file == "fashion_mnist/3.0.1/train[70:]"


def jpeg(name):
    """Returns a JPEG of noise that depends on the name alone."""
    rng = np.random.default_rng(list(name.encode()))
    image = rng.integers(0, 256, (10 + len(name) % 5, 15, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "clip_frames", "reason"),
    [
        (b"", 1, "it is empty"),
        (b"hello" * 20, 1, "it is not an image"),
        (jpeg("a")[:-30], 1, "it is damaged or cut off"),
        (jpeg("a"), 4, "it is an image, but the model requires clips of 4 frames"),
    ],
)
def test_invalid_images_raise_a_decode_error_with_the_reason(image, clip_frames, reason):
    split = tfds_images.TfdsSplit([{"image": image, "label": 0}], ("a",), "levels/1.0.0/train", {})
    with (
        refused(f"levels/1.0.0/train/0 cannot be decoded: {reason}", by=DecodeError),
        split.opened(0, clip_frames),
    ):
        pass


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_record_affects_its_images_alone(folder, tmp_path, monkeypatch, in_memory):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (path,) = copy.glob("*/*/*-test.array_record*")
    whole = read_split("fashion_mnist", folder, "test")
    content = bytearray(path.read_bytes())
    # Records are stored one after the other and noise does not compress, so this is the middle of
    # one image.
    position = content.index(whole.examples[7]["image"][200:260])
    content[position : position + 20] = bytes(20)
    path.write_bytes(content)
    if in_memory:  # the set is read at once, and reading fails
        with refused("hash mismatch ", "prepare the set again"):
            read_split("fashion_mnist", str(copy), "test")
        return
    monkeypatch.setattr(tfds_images, "IN_MEMORY", 0)
    split = read_split("fashion_mnist", str(copy), "test")
    settings = pipeline.ClipSettings(frames=1, stride=1, size=28, short_side=28)
    (batch,) = pipeline.test_batches(split, settings, clips=1, crops=1, batch=40)
    assert np.flatnonzero(~batch["valid"]).tolist() == [7]
    assert "hash mismatch" in str(decode_failure(split.opened(7, 1)))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("fashion_mnist", "val", "Unknown split 'val'. Should be one of ['train', 'test']): name"),
        ("fashion_mnist", "train[5", "'train[5'"),
        ("fashion_mnist", "train[:97]", "Requested slice [:97] incompatible with 96 examples): "),
        ("fashion_mnist", "train[5:5]", "cannot be read (it is empty): name another split"),
        ("fashion_minst", "train", "no data set data.tfds=fashion_minst (Dataset fashion_minst no"),
        ("fashion_mnist:9.9.9", "train", "at version 9.9.9, only: 3.0.1): check the name"),
    ],
)
def test_unknown_sets_and_splits_end_with_a_one_sentence_error(folder, name, split, message):
    with refused(message):
        read_split(name, folder, split)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "mnist is not prepared in {0}: "),
        ("mnist", "tfds.builder('mnist', data_dir='{0}'"),
        ("fashion_mnist:3.0.1", "`python -m mvit_jax.prepare fashion_mnist --out={0}`"),
        ("imagenet2012", "from the files that TFDS requires in {0}/downloads/manual"),
    ],
)
def test_the_error_for_an_unprepared_set_names_the_command(tmp_path, name, message):
    with refused(message.format(tmp_path)):
        read_split(name, str(tmp_path), "train")
    assert not list(tmp_path.iterdir())


def test_unsupported_formats_and_features_are_rejected(tmp_path):
    from tensorflow_datasets import features

    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    good, grey = {"image": image, "label": 1}, np.zeros((4, 5, 1), np.float32)
    floats = stills(shape=grey.shape, dtype=np.float32)
    store(tmp_path, "records", stills(), good, file_format="tfrecord")
    store(tmp_path, "sizes", stills(), good, good, good)
    store(tmp_path, "floats", floats, {"image": grey, "label": 1})
    store(tmp_path, "texts", {"text": features.Text()}, {"text": "hello"})
    for name, parts in (
        (
            "records",
            ["as tfrecord, which has no random access: prepare it as array_record in another"],
        ),
        ("floats", ["must have the features image ", "float32"]),
        ("texts", ["must have the features image ", "'text': Text"]),
    ):
        with refused(*parts):
            read_split(name, str(tmp_path), "train")
    # A set without code in TFDS, with colour images of any size.
    split = read_split("sizes", str(tmp_path), "train")
    assert split.decoded is None and split.class_names == ("a", "b")
    assert np.array_equal(pixels(split, 2), image) and split.label(2) == 1


def write_tar(file, members):
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_tars(folder):
    folder.mkdir(parents=True)
    inner = []
    for synset in SYNSETS:
        names = [f"{synset}_{number}.JPEG" for number in (7, 12, 9)]
        file = io.BytesIO()
        write_tar(file, [(name, jpeg(name)) for name in names])
        inner.append((f"{synset}.tar", file.getvalue()))
    splits = {"train": inner}
    for split, numbers in (("val", VALIDATION), ("test", [1, 2])):
        names = [f"ILSVRC2012_{split}_{number:08d}.JPEG" for number in numbers]
        splits[split] = [(name, jpeg(name)) for name in names]
    for split, members in splits.items():
        with (folder / f"ILSVRC2012_img_{split}.tar").open("wb") as file:
            write_tar(file, members)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Folder with small ImageNets that TFDS has prepared in both file formats."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("imagenet")
    write_tars(root / "downloads/manual")
    config = tfds.download.DownloadConfig(manual_dir=root / "downloads/manual")
    for name in ("array_record", "tfrecord"):
        builder = tfds.builder("imagenet2012:5.1.0", data_dir=root / name, file_format=name)
        builder.download_and_prepare(download_config=config)
    return root


def test_a_split_without_labels_is_rejected(imagenet):
    with refused("5.1.0/test have no labels: name another split"):
        read_split("imagenet2012", str(imagenet / "array_record"), "test")


@pytest.mark.slow
def test_the_suggested_command_converts_a_tfrecord_set(imagenet, tmp_path):
    with pytest.raises(UserError) as error:
        read_split("imagenet2012:5.1.0", str(imagenet / "tfrecord"), "train")
    (command,) = re.findall(r"as tfrecord, which has .* by `(.*)`, and set ", str(error.value))
    program, *arguments = shlex.split(command.replace("DIR", str(tmp_path / "converted")))
    assert program == "python" and "\n" not in str(error.value)
    # TFDS requires the tars in this folder.
    (imagenet / "tfrecord/downloads/manual").symlink_to(imagenet / "downloads/manual")
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    for split in ("train", "validation"):
        converted = read_split("imagenet2012:5.1.0", str(tmp_path / "converted"), split)
        expected = read_split("imagenet2012:5.1.0", str(imagenet / "array_record"), split)
        assert converted.class_names == expected.class_names and len(converted) == len(expected)
        assert list(converted.examples) == list(expected.examples)


def test_reading_does_not_import_tensorflow(folder):
    code = (
        "import sys\n"
        "from mvit_jax.data import pipeline\n"
        "from mvit_jax.data.formats import tfds\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"split = tfds.read_split('fashion_mnist', {folder!r}, 'train')\n"
        "settings = pipeline.ClipSettings(frames=1, stride=1, size=28, short_side=28)\n"
        "(batch,) = pipeline.train_batches(split, settings, seed=0, batch=8, steps=1)\n"
        "print(batch['clip'].shape, 'tensorflow' in sys.modules)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert completed.stdout == "(8, 1, 28, 28, 3) False\n"


@pytest.mark.slow
def test_training_on_a_tfds_set_learns_its_classes(folder, tmp_path, capsys):
    config = tiny.load_config_file("fashion_mnist").get_config()
    config.data.folder = folder
    config.data.update(train_list="train[:80]", val_list="train[80:]")
    config.model.update(width=16, depths=(1, 1))
    config.augment.flip = 0.0  # the classes of these squares are their columns
    config.update(epochs=30.0, batch=16, log_every=50)
    config.eval.update(every_epochs=15.0, batch=16)
    assert train.train(config, str(tmp_path / "run")) == 0
    assert "80 videos of 10 classes" in capsys.readouterr().out
    [scores], step = scoring.score(
        config, tmp_path / "run", build.videos(config, "test"), which="last"
    )
    assert step == 150 and scores.tested.all()
    test = read_split("fashion_mnist", folder, "test")
    assert scores.labels.tolist() == [test.label(i) for i in range(40)]
    assert scores.metrics()["top1"] > 30  # by chance 10
