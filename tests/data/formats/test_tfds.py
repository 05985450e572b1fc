"""Images that TFDS has prepared against the files that they were prepared from."""

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
from mvit_jax.data.video import DecodeError, why_broken
from mvit_jax.training import build
from tests.data.making import idx
from tests.data.stored import stills, store
from tests.support import scoring, tiny
from tests.support.refusals import refused

# ImageNet's.
SYNSETS = ("n01440764", "n15075141", "n01739381")  # labels 0, 999 and 60
VALIDATION = [3, 1, 4, 2]  # in the order of the tar, which is not that of the names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set of the form of Fashion-MNIST, prepared by TFDS."""
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        idx.instead_of_the_real_ones(patch, idx.write(files))
        fashion_mnist.prepare(str(folder), str(files))
    return str(folder)


def pixels(split, index):
    with split.opened(index, 1) as frames:
        return frames.frames([0])[0]


@pytest.mark.parametrize(("name", "part"), [("train", "train"), ("test", "t10k")])
@pytest.mark.parametrize("in_memory", [True, False])
def test_elements_are_those_of_the_files(folder, monkeypatch, name, part, in_memory):
    if not in_memory:
        monkeypatch.setattr(tfds_images, "IN_MEMORY", 0)
    split = read_split("fashion_mnist:3.0.1", folder, name)
    assert idx.elements(split) == idx.expected(part)
    assert split.class_names[0] == "T-shirt/top" and split.class_names[9] == "Ankle boot"
    assert len(split.class_names) == 10
    assert split.item(3) == f"fashion_mnist/3.0.1/{name}/3"
    again = [pixels(split, index) for index in (5, 5)]
    assert np.array_equal(*again)
    assert (split.decoded is not None) == in_memory


def test_parts_of_a_split_make_up_the_whole(folder):
    parts = [read_split("fashion_mnist", folder, name) for name in ("train[:70]", "train[70:]")]
    assert [len(part) for part in parts] == [70, 26]
    assert sorted(idx.elements(parts[0]) + idx.elements(parts[1])) == idx.expected("train")
    assert parts[1].list_file == "fashion_mnist/3.0.1/train[70:]"


def jpeg(name):
    """An image made of its name alone."""
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
        (jpeg("a"), 4, "it is an image, and the model takes clips of 4 frames"),
    ],
)
def test_what_does_not_do_is_told(image, clip_frames, reason):
    split = tfds_images.TfdsSplit([{"image": image, "label": 0}], ("a",), "levels/1.0.0/train", {})
    with (
        refused(f"levels/1.0.0/train/0 cannot be decoded: {reason}", by=DecodeError),
        split.opened(0, clip_frames),
    ):
        pass


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_record_costs_its_images_alone(folder, tmp_path, monkeypatch, in_memory):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (path,) = copy.glob("*/*/*-test.array_record*")
    whole = read_split("fashion_mnist", folder, "test")
    content = bytearray(path.read_bytes())
    # Records are stored one after the other and noise does not compress, so of the file's used
    # part this is the middle of one image.
    place = content.index(whole.examples[7]["image"][200:260])
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    if in_memory:  # the set is read as a whole or not at all
        with refused("hash mismatch ", "prepare the set again"):
            read_split("fashion_mnist", str(copy), "test")
        return
    monkeypatch.setattr(tfds_images, "IN_MEMORY", 0)
    split = read_split("fashion_mnist", str(copy), "test")
    settings = pipeline.ClipSettings(frames=1, stride=1, size=28, short_side=28)
    (batch,) = pipeline.test_batches(split, settings, clips=1, crops=1, batch=40)
    assert np.flatnonzero(~batch["valid"]).tolist() == [7]
    assert "hash mismatch" in str(why_broken(split.opened(7, 1)))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("fashion_mnist", "val", "Unknown split 'val'. Should be one of ['train', 'test']): name"),
        ("fashion_mnist", "train[5", "'train[5'"),
        ("fashion_mnist", "train[:97]", "Requested slice [:97] incompatible with 96 examples): "),
        ("fashion_mnist", "train[5:5]", "cannot be read (it is empty): name another one"),
        ("fashion_minst", "train", "no data set data.tfds=fashion_minst (Dataset fashion_minst no"),
        ("fashion_mnist:9.9.9", "train", "at version 9.9.9, only: 3.0.1): check the name"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(folder, name, split, message):
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
def test_a_set_that_is_not_prepared_names_what_does_that(tmp_path, name, message):
    with refused(message.format(tmp_path)):
        read_split(name, str(tmp_path), "train")
    assert not list(tmp_path.iterdir())


def test_sets_of_other_formats_and_features_are_refused(tmp_path):
    from tensorflow_datasets import features

    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    good, grey = {"image": image, "label": 1}, np.zeros((4, 5, 1), np.float32)
    floats = stills(shape=grey.shape, dtype=np.float32)
    store(tmp_path, "records", stills(), good, file_format="tfrecord")
    store(tmp_path, "sizes", stills(), good, good, good)
    store(tmp_path, "floats", floats, {"image": grey, "label": 1})
    store(tmp_path, "texts", {"text": features.Text()}, {"text": "hello"})
    for name, parts in (
        ("records", ["as tfrecord, which has no random access: `python"]),
        ("floats", ["other features ", "float32"]),
        ("texts", ["other features ", "'text': Text"]),
    ):
        with refused(*parts):
            read_split(name, str(tmp_path), "train")
    # A set that TFDS has no code for, whose images may be of any size, in colour.
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
    """Folder of each format -> ImageNet as TFDS prepares it from tars like its own."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("imagenet")
    write_tars(root / "downloads/manual")
    config = tfds.download.DownloadConfig(manual_dir=root / "downloads/manual")
    for name in ("array_record", "tfrecord"):
        builder = tfds.builder("imagenet2012:5.1.0", data_dir=root / name, file_format=name)
        builder.download_and_prepare(download_config=config)
    return root


def test_a_split_without_labels_is_refused(imagenet):
    with refused("5.1.0/test have no labels: name another split"):
        read_split("imagenet2012", str(imagenet / "array_record"), "test")


def test_the_command_that_a_tfrecord_set_asks_for_prepares_it_anew(imagenet, tmp_path):
    with pytest.raises(UserError) as error:
        read_split("imagenet2012:5.1.0", str(imagenet / "tfrecord"), "train")
    (command,) = re.findall(r"as tfrecord, which has .*: `(.*)` prepares it", str(error.value))
    program, *arguments = shlex.split(command.replace("DIR", str(tmp_path / "anew")))
    assert program == "python" and "\n" not in str(error.value)
    # Where TFDS asks for the tars.
    (imagenet / "tfrecord/downloads/manual").symlink_to(imagenet / "downloads/manual")
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    for split in ("train", "validation"):
        ours = read_split("imagenet2012:5.1.0", str(tmp_path / "anew"), split)
        theirs = read_split("imagenet2012:5.1.0", str(imagenet / "array_record"), split)
        assert ours.class_names == theirs.class_names and len(ours) == len(theirs)
        assert list(ours.examples) == list(theirs.examples)


def test_reading_needs_no_tensorflow(folder):
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(8, 1, 28, 28, 3) False\n"


@pytest.mark.slow
def test_a_model_learns_it_by_the_programs(folder, tmp_path, capsys):
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
