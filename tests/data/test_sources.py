"""Lists of videos: what is read, and the sentence that each mistake gets."""

import os
from pathlib import Path

import numpy as np
import pytest

from mvit_jax.data.lists import read_video_list
from mvit_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos" / "with space").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "with space/c d.mp4"):
        (tmp_path / "videos" / name).touch()
    return tmp_path


def write_list(folder, *lines, labels=None):
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    if labels is not None:
        (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    return folder


def test_reads_paths_labels_and_class_names(folder):
    outside = folder / "outside.mp4"
    outside.touch()
    write_list(
        folder,
        "videos/a.mp4 2",
        "",
        "videos/with space/c d.mp4   0",
        f"  {outside}\t1  ",
        labels=["juggling balls", "yoga", "bowling"],
    )
    videos = read_video_list(folder, "train.csv")
    assert len(videos) == 3
    assert videos.paths == (
        str(folder / "videos/a.mp4"),
        str(folder / "videos/with space/c d.mp4"),
        str(outside),
    )
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in videos.paths)
    assert videos.labels.dtype == np.int32
    assert videos.labels.tolist() == [2, 0, 1]
    assert videos.class_names == ("juggling balls", "yoga", "bowling")
    assert videos.list_file == str(folder / "train.csv")


def test_classes_are_numbered_where_they_have_no_names(folder):
    write_list(folder, "videos/a.mp4 0", "videos/b.mp4 2")
    assert read_video_list(folder, "train.csv").class_names == ("0", "1", "2")
    assert read_video_list(folder, "train.csv", num_classes=4).class_names == ("0", "1", "2", "3")


def test_a_relative_folder_gives_absolute_paths(folder, monkeypatch):
    write_list(folder, "videos/a.mp4 0")
    monkeypatch.chdir(folder.parent)
    assert read_video_list(folder.name, "train.csv").paths == (str(folder / "videos/a.mp4"),)


def test_a_byte_order_mark_is_not_part_of_the_first_path(folder):
    (folder / "train.csv").write_bytes(b"\xef\xbb\xbfvideos/a.mp4 0\r\nvideos/b.mp4 1\r\n")
    assert read_video_list(folder, "train.csv").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("lines", "labels", "num_classes", "expected"),
    [
        (["videos/a.mp4 0", "", "videos/b.mp4"], None, None, ["train.csv, line 3", "label"]),
        (["videos/a.mp4 zero"], None, None, ["train.csv, line 1", "'zero'", "whole number"]),
        (["videos/a.mp4 1.0"], None, None, ["train.csv, line 1", "'1.0'", "whole number"]),
        (["videos/a.mp4"], None, None, ["train.csv, line 1", "white space"]),
        (["videos/a.mp4 0", "videos/b.mp4 2"], ["x", "y"], None, ["line 2", "label 2", "0 to 1"]),
        (["videos/a.mp4 3"], None, 3, ["line 1", "label 3", "0 to 2"]),
        (["videos/a.mp4 -1"], None, None, ["line 1", "label -1"]),
        (["videos/a.mp4 0"], ["x", "y"], 3, ["labels.txt", "2 classes", "3 classes"]),
        (["", "  "], None, None, ["train.csv", "no videos"]),
        (
            ["videos/a.mp4 0", "videos/lost.mp4 1", "gone/b.mp4 1"],
            None,
            None,
            ["line 2", "videos/lost.mp4", "2 of the 3"],
        ),
    ],
)
def test_mistakes_in_a_list_are_told_with_file_and_line(
    folder, lines, labels, num_classes, expected
):
    write_list(folder, *lines, labels=labels)
    with pytest.raises(UserError) as error:
        read_video_list(folder, "train.csv", num_classes)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_a_missing_folder_tells_how_to_make_the_default_data(tmp_path):
    with pytest.raises(UserError) as error:
        read_video_list(tmp_path / "nowhere", "train.csv")
    message = str(error.value)
    assert f"python -m mvit_jax.prepare moving_digits --out={tmp_path / 'nowhere'}" in message


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no list .*val\.csv"):
        read_video_list(tmp_path, "val.csv")


def test_a_list_that_is_not_text_is_a_mistake_too(folder):
    (folder / "train.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"train\.csv is not UTF-8"):
        read_video_list(folder, "train.csv")


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    """One look per folder, not per file: network disks make a question per file slow."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(50):
            (tmp_path / name / f"{number}.mp4").touch()
    write_list(tmp_path, *(f"{name}/{number}.mp4 0" for number in range(50) for name in "ab"))
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    assert len(read_video_list(tmp_path, "train.csv")) == 100
    assert sorted(listed) == [str(tmp_path / "a"), str(tmp_path / "b")]
