"""ImageNet by TFDS's own builder, from tars like its own, in both formats; and copies of others."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats import tfds as tfds_images
from mvit_jax.data.formats.tfds import read_split
from mvit_jax.data.making.tfds_convert import convert

SYNSETS = ("n01440764", "n15075141", "n01739381")  # labels 0, 999 and 60
VALIDATION = [3, 1, 4, 2]  # in the order of the tar, which is not that of the names


def jpeg(name):
    """An image made of its name alone."""
    rng = np.random.default_rng(list(name.encode()))
    image = rng.integers(0, 256, (10 + len(name) % 5, 15, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg")
    return file.getvalue()


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
def folders(tmp_path_factory):
    """ImageNet as TFDS prepares it from the tars, by format."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("imagenet")
    write_tars(root / "downloads/manual")
    config = tfds.download.DownloadConfig(manual_dir=root / "downloads/manual")
    for name in ("array_record", "tfrecord"):
        builder = tfds.builder("imagenet2012:5.1.0", data_dir=root / name, file_format=name)
        builder.download_and_prepare(download_config=config)
    return root


def contents(split):
    """File name -> label, and pixels as they are opened."""
    found = {}
    for index in range(len(split)):
        with split.opened(index, 1) as image:
            name = split._example(index)["file_name"].decode()
            found[name] = (split.label(index), image.frames([0])[0])
    return found


@pytest.mark.parametrize("in_memory", [True, False])
def test_imagenet_is_what_the_tars_hold(folders, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(tfds_images, "IN_MEMORY", 0)
    train = read_split("imagenet2012:5.1.0", str(folders / "array_record"), "train")
    assert isinstance(train.examples, list) == in_memory
    assert len(train.class_names) == 1000 and train.class_names[999] == "n15075141"
    found = contents(train)
    assert sorted(found) == sorted(f"{s}_{n}.JPEG" for s in SYNSETS for n in (7, 12, 9))
    for name, (label, pixels) in found.items():
        assert train.class_names[label] == name.split("_")[0]
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(jpeg(name)))))
    validation = read_split("imagenet2012", str(folders / "array_record"), "validation")
    # Image n of the real set, by its name, has the label of line n of TFDS's own list.
    lines = Path(sys.modules["tensorflow_datasets"].__path__[0], "datasets/imagenet2012")
    synsets = (lines / "validation_labels.txt").read_text().split()
    for name, (label, _) in contents(validation).items():
        assert validation.class_names[label] == synsets[int(name[15:23]) - 1]


def test_a_split_without_labels_is_refused(folders):
    with pytest.raises(UserError, match=r"5\.1\.0/test have no labels: name another split"):
        read_split("imagenet2012", str(folders / "array_record"), "test")


def test_tars_that_are_not_there_yet_are_asked_for(tmp_path):
    with pytest.raises(UserError) as error:
        read_split("imagenet2012", str(tmp_path), "train")
    assert f"with the files that TFDS asks for in {tmp_path}/downloads/manual" in str(error.value)


def test_the_command_that_a_tfrecord_set_asks_for_converts_it(folders, tmp_path):
    with pytest.raises(UserError) as error:
        read_split("imagenet2012:5.1.0", str(folders / "tfrecord"), "train")
    (command,) = re.findall(r"as tfrecord, which cannot .*: `(.*)` copies it", str(error.value))
    program, *arguments = shlex.split(command.replace("DIR", str(tmp_path / "copy")))
    assert program == "python" and "\n" not in str(error.value)
    subprocess.run([sys.executable, *arguments], check=True, timeout=100)
    for split in ("train", "validation"):
        ours = read_split("imagenet2012:5.1.0", str(tmp_path / "copy"), split)
        theirs = read_split("imagenet2012:5.1.0", str(folders / "array_record"), split)
        assert ours.class_names == theirs.class_names and len(ours) == len(theirs)
        assert list(ours.examples) == list(theirs.examples)
    info = [
        json.loads((folder / "imagenet2012/5.1.0/dataset_info.json").read_text())
        for folder in (tmp_path / "copy", folders / "array_record")
    ]
    assert info[0] == info[1]


@pytest.fixture
def records(tmp_path):
    """A set that TFDS has no code for, in two shards."""
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
    images = [np.full((4, 5, 3), level, np.uint8) for level in range(30)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="records",
        version="1.0.0",
        data_dir=tmp_path / "records",
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            "train": [(i, {"image": image, "label": i % 2}) for i, image in enumerate(images)]
        },
        file_format="tfrecord",
    )
    return str(tmp_path / "records")


def test_a_conversion_that_was_stopped_is_completed(records, tmp_path, monkeypatch):
    source = Path(records, "records/1.0.0")
    (shard,) = source.glob("*.tfrecord*")
    whole = shard.read_bytes()
    for cut in (5, 300):
        shard.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match="is cut off: prepare the set anew"):
            convert("records", records, str(tmp_path / "copy"))
        with pytest.raises(UserError, match="no data set"):
            read_split("records", str(tmp_path / "copy"), "train")
    shard.write_bytes(whole)
    convert("records", records, str(tmp_path / "copy"))
    split = read_split("records", str(tmp_path / "copy"), "train")
    assert split.class_names == ("a", "b") and len(split) == 30
    levels = []
    for index in range(30):
        with split.opened(index, 1) as image:
            levels.append(int(image.frames([0])[0, 0, 0, 0]))
        assert split.label(index) == levels[-1] % 2
    assert sorted(levels) == list(range(30))
    assert not [path for path in (tmp_path / "copy").rglob("*") if "incomplete" in path.name]
    with pytest.raises(UserError, match="is there already"):
        convert("records", records, str(tmp_path / "copy"))
    with pytest.raises(UserError, match="as array_record: only tfrecord can be converted"):
        convert("records", str(tmp_path / "copy"), str(tmp_path / "again"))


def test_shards_that_are_whole_are_not_written_again(folders, tmp_path):
    shutil.copytree(folders / "tfrecord", tmp_path / "in")
    (shard,) = (tmp_path / "in").rglob("*-train.tfrecord*")  # after that of the test split
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train.*is cut off"):
        convert("imagenet2012", str(tmp_path / "in"), str(tmp_path / "out"))
    (done,) = (tmp_path / "out").rglob("*-test.array_record-00000-of-00001")
    inode = done.stat().st_ino
    shard.write_bytes(whole)
    convert("imagenet2012", str(tmp_path / "in"), str(tmp_path / "out"))
    (done,) = (tmp_path / "out").rglob("*-test.array_record-00000-of-00001")
    assert done.stat().st_ino == inode and "incomplete" not in str(done)
    assert len(read_split("imagenet2012", str(tmp_path / "out"), "train")) == 9
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_folder_that_cannot_be_written_is_named(records, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"records/1\.0\.0 cannot be copied to .*file"):
        convert("records", records, str(tmp_path / "file"))
