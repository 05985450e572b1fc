"""Class folders, numbered as in torchvision's ImageFolder, and error messages."""

from pathlib import Path

import pytest

from mvit_jax.data.formats.class_folders import read_class_folders
from tests.support.refusals import refused


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.fixture
def folder(tmp_path):
    return fill(
        tmp_path,
        "train/yoga/b.mp4", "train/yoga/a.mp4", "train/archery/10.JPEG", "train/archery/2.jpeg",
        "train/Zumba/x.webm", "val/yoga/c.mp4", "val/archery/d.MKV",
    )  # fmt: skip


def elements(videos, root):
    return [
        (str(Path(videos.item(i)).relative_to(root)), videos.label(i)) for i in range(len(videos))
    ]


def test_classes_are_the_sorted_folder_names(folder, capsys):
    videos = read_class_folders(folder, "train", "train")
    # The order of ImageFolder: Python's, capitals first.
    assert videos.class_names == ("Zumba", "archery", "yoga")
    assert elements(videos, folder) == [
        ("train/Zumba/x.webm", 0),
        ("train/archery/10.JPEG", 1),
        ("train/archery/2.jpeg", 1),
        ("train/yoga/a.mp4", 2),
        ("train/yoga/b.mp4", 2),
    ]
    assert videos.list_file == str(folder / "train")
    assert capsys.readouterr().err == ""


def test_a_validation_folder_has_the_labels_of_the_training_folder(folder):
    videos = read_class_folders(folder, "val", "train")
    assert videos.class_names == ("Zumba", "archery", "yoga")
    assert elements(videos, folder) == [("val/archery/d.MKV", 1), ("val/yoga/c.mp4", 2)]


def test_a_validation_folder_alone_defines_its_classes(folder):
    videos = read_class_folders(folder, "val", "no_such_folder")
    assert videos.class_names == ("archery", "yoga")


def test_labels_txt_orders_the_classes(folder):
    (folder / "labels.txt").write_text("yoga\narchery\nbowling\nZumba\n")
    for name, labels in (("train", [0, 0, 1, 1, 3]), ("val", [0, 1])):
        videos = read_class_folders(folder, name, "train")
        assert videos.class_names == ("yoga", "archery", "bowling", "Zumba")
        assert [videos.label(i) for i in range(len(videos))] == labels


def test_other_files_are_skipped_and_counted(folder, capsys):
    fill(folder, "train/yoga/notes.txt", "train/yoga/c.mp4.part", "train/yoga/.d.mp4")
    fill(folder, "train/archery/deeper/e.mp4", "train/readme.md", "train/.cache/f.mp4")
    assert len(read_class_folders(folder, "train", "train")) == 5
    assert capsys.readouterr().err == (
        f"note: {folder}/train holds 3 files or folders that are neither videos nor images by "
        f"their names, for example {folder}/train/archery/deeper, which are left out\n"
    )


@pytest.mark.parametrize(
    ("more", "name", "expected"),
    [
        ((), "test", "there is no folder {0}/test: it should hold a folder"),
        (("test/a.jpg",), "test", "{0}/test holds no folders: make one for each class"),
        (
            ("val/curling/a.mp4",),
            "val",
            "'curling', but {0}/train has no such class (1 such folder",
        ),
        (("train/x/a.txt",), "train", "{0}/train/x holds neither videos nor images"),
    ],
)
def test_invalid_folders_end_with_a_one_sentence_error(folder, more, name, expected):
    fill(folder, *more)
    with refused(expected.format(folder)):
        read_class_folders(folder, name, "train")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("yoga\narchery\nzumba\n", "'Zumba', but {0}/labels.txt has no such class (1 such folder"),
        ("yoga\narchery\nyoga\n", "{0}/labels.txt names the class 'yoga' twice"),
        ("\n", "{0}/labels.txt is empty"),
    ],
)
def test_invalid_class_names_end_with_a_one_sentence_error(folder, names, expected):
    (folder / "labels.txt").write_text(names)
    with refused(expected.format(folder)):
        read_class_folders(folder, "train", "train")
