"""Lists of videos: paths, labels, class names, and error messages."""

import csv
import os

import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.media.images import DecodeError
from tests.support.refusals import refused


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


def test_a_list_gives_paths_labels_and_class_names(folder):
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
    assert videos.paths == (
        str(folder / "videos/a.mp4"),
        str(folder / "videos/with space/c d.mp4"),
        str(outside),
    )
    assert videos.labels.dtype == np.int32
    assert videos.labels.tolist() == [2, 0, 1]
    assert videos.class_names == ("juggling balls", "yoga", "bowling")
    assert videos.list_file == str(folder / "train.csv")


def test_unnamed_classes_are_numbered(folder):
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


COMMA, XY = {"separator": ","}, {"labels": ["x", "y"]}


@pytest.mark.parametrize(
    ("lines", "options", "expected"),
    [
        (["a.mp4 0", "", "b.mp4"], {}, "train.csv, line 3: 'b.mp4' should be a path and a label w"),
        (["a.mp4"], {}, "line 1: 'a.mp4' should be a path and a label with white space between"),
        (["a.mp4 0", "path x"], {}, "train.csv, line 2: the label 'x' is not a whole number"),
        (["a.mp4 1.0"], {}, "train.csv, line 1: the label '1.0' is not a whole number"),
        (["a.mp4 0", "b.mp4 2"], XY, "train.csv, line 2: the label 2 should be from 0 to 1, as"),
        (["a.mp4 3"], {"num_classes": 3}, "train.csv, line 1: the label 3 should be from 0 to 2"),
        (["a.mp4 -1"], {}, "train.csv, line 1: the label -1 should be from 0"),
        ([f"b.mp4 {10**30}"], XY, f"line 1: the label {10**30} should be from 0 to 1"),
        (["a.mp4 0"], XY | {"num_classes": 3}, "labels.txt names 2 classes, but 3 classes"),
        (["a.mp4 0"], {"labels": [""]}, "labels.txt is empty: write the names"),
        (["", "  "], {}, "train.csv lists no videos"),
        (["videos/a.mp4 0", "c 1", "b.mp4 1"], {}, "line 2: there is no file {0}/c (2 of the 3"),
        (["path label", "a.mp4 0"], {}, "train.csv, line 1 looks like a header: remove it"),
        (["path,label", "a.mp4,0"], COMMA, "train.csv, line 1 looks like a header: remove it"),
        (["path,label", "a.mp4,0"], {}, "line 1 looks like a header: remove it, and the"),
        (["a.mp4,0", "b.mp4,1"], {}, "line 1: the separator seems to be ',': set data.separator"),
        (["with space/c d.mp4;1"], {}, "train.csv, line 1: the separator seems to be ';'"),
        (["a.mp4 0", "b.mp4 1"], COMMA, "line 1: the separator seems to be white space: leave"),
        (["a.mp4\t0"], {"separator": " "}, "line 1: the separator seems to be white space"),
        (["a.mp4,0", "b.mp4"], COMMA, "line 2: 'b.mp4' should be a path and a label with ',' betw"),
        # Each line could be a path and a label; the missing files show that the separator is wrong.
        (["a.mp4, 0", "b.mp4, 1"], {}, "2 of the 2 listed files are missing); the separator seems"),
    ],
)
def test_errors_in_a_list_name_the_file_and_the_line(folder, lines, options, expected):
    options = dict(options)
    write_list(folder, *lines, labels=options.pop("labels", None))
    with refused(folder, expected.format(folder)):
        read_video_list(folder, "train.csv", **options)


@pytest.mark.parametrize("separator", [",", ", ", " , ", "\t", "|"])
def test_the_separator_is_configurable(folder, separator):
    write_list(folder, f"videos/with space/c d.mp4{separator}1", f"videos/b.mp4{separator}0")
    videos = read_video_list(folder, "train.csv", separator=separator.strip(" "))
    assert videos.paths == (
        str(folder / "videos/with space/c d.mp4"),
        str(folder / "videos/b.mp4"),
    )
    assert [videos.label(0), videos.label(1)] == videos.labels.tolist() == [1, 0]


def test_fields_may_be_quoted(folder):
    """As pandas writes paths that hold the separator or quotes."""
    (folder / 'say "a".mp4').touch()
    rows = [("videos/with space/c d.mp4", 0), ("videos/b.mp4", 1), ('say "a".mp4', 0)]
    for separator, quoting in ((" ", csv.QUOTE_MINIMAL), (",", csv.QUOTE_ALL)):
        with (folder / "train.csv").open("w", newline="") as file:
            csv.writer(file, delimiter=separator, quoting=quoting).writerows(rows)
        videos = read_video_list(folder, "train.csv", separator=separator)
        assert videos.paths == tuple(str(folder / name) for name, _ in rows)
        assert videos.labels.tolist() == [0, 1, 0]


def test_a_blank_line_among_class_names_is_an_error(folder):
    write_list(folder, "videos/a.mp4 0", labels=["x", "", "z"])
    with refused(f"{folder}/labels.txt, line 2 is blank"):
        read_video_list(folder, "train.csv")
    (folder / "labels.txt").write_text("x\r\nz \r\n\r\n")
    assert read_video_list(folder, "train.csv").class_names == ("x", "z")


def test_files_that_are_listed_again_are_counted(folder, capsys):
    a, b = "videos/a.mp4", "videos/b.mp4"
    write_list(folder, f"{a} 0", "", f"{b} 1", f"{a} 0", f"{folder / b} 0")
    assert len(read_video_list(folder, "train.csv")) == 4
    assert capsys.readouterr().err == (
        f"note: {folder}/train.csv names 2 files again, 1 of them with another label, for example "
        f"{folder / b} in the lines 3 and 5\n"
    )


def test_a_prefix_is_prepended_to_relative_paths(folder):
    write_list(folder, "a.mp4 0", "with space/c d.mp4 1", f"{folder}/videos/b.mp4 2")
    expected = tuple(str(folder / "videos" / x) for x in ("a.mp4", "with space/c d.mp4", "b.mp4"))
    for prefix in ("videos", "videos/", str(folder / "videos")):
        assert read_video_list(folder, "train.csv", prefix=prefix).paths == expected


def test_few_missing_files_are_logged_and_many_are_an_error(folder, capsys):
    write_list(folder, "videos/a.mp4 0", "", "videos/gone.mp4 1", "videos/b.mp4 0", "x/y.mp4 1")
    videos = read_video_list(folder, "train.csv", max_missing=0.6)
    assert len(videos) == 4 and videos.label(1) == 1
    assert capsys.readouterr().err == (
        f"note: {folder}/train.csv, line 3: there is no file {folder}/videos/gone.mp4 "
        "(2 of the 4 listed files are missing)\n"
    )
    for limit in (0.0, 0.5):
        with pytest.raises(UserError, match="2 of the 4 listed files are missing"):
            read_video_list(folder, "train.csv", max_missing=limit)
    with pytest.raises(DecodeError, match="there is no such file"), videos.opened(1, 1):
        pass


def test_paths_may_contain_unicode_line_separators(folder):
    name = "a\u2028b\x85.mp4"
    (folder / name).touch()
    write_list(folder, f"{name} 0")
    assert read_video_list(folder, "train.csv").paths == (str(folder / name),)


def test_a_missing_or_binary_list_is_rejected(tmp_path):
    with refused(f"there is no list {tmp_path}/train.csv"):
        read_video_list(tmp_path, "train.csv")
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00\x01")
    with refused("train.csv is not UTF-8"):
        read_video_list(tmp_path, "train.csv")


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    """Folders are listed instead of querying every file, which is slow on network disks."""
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


@pytest.mark.parametrize("separator", [None, ","])
def test_multi_label_lists_have_any_number_of_labels_per_line(folder, separator):
    between, comma = ("   ", ",") if separator is None else (",", ";")
    labels = ((3, 0), (), (1,), (0, 2, 2))
    names = ("a.mp4", "b.mp4", "with space/c d.mp4", "a.mp4")
    texts = [comma.join(map(str, numbers)) or '""' for numbers in labels]
    write_list(folder, *(f"{n}{between}{t}" for n, t in zip(names, texts, strict=True)))
    options = {"prefix": "videos", "separator": separator, "multi_label": True}
    videos = read_video_list(folder, "train.csv", **options)
    expected = [[int(c in numbers) for c in range(4)] for numbers in labels]
    assert [videos.label(i).tolist() for i in range(4)] == expected
    assert videos.labels.dtype == np.uint8 and len(videos.class_names) == 4
    assert [path.removeprefix(f"{folder}/videos/") for path in videos.paths] == list(names)
    write_list(folder, f'a.mp4{between}""')
    assert read_video_list(folder, "train.csv", **options).labels.tolist() == [[0]]


@pytest.mark.parametrize("separator", [",", " ", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_quoted_labels_may_hold_the_separator(folder, separator, quoting):
    (folder / "videos/x, y.mp4").touch()
    rows = [("videos/a.mp4", "0,1"), ("videos/x, y.mp4", "1, 2"), ("videos/b.mp4", "2")]
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=separator, quoting=quoting).writerows(rows)
    videos = read_video_list(folder, "train.csv", separator=separator, multi_label=True)
    assert videos.paths == tuple(str(folder / name) for name, _ in rows)
    assert videos.labels.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    with refused("line 1: '0,1' is not one label: set data.multi_label=True"):
        read_video_list(folder, "train.csv", separator=separator)


@pytest.mark.parametrize(
    ("line", "multi_label", "sentence"),
    [
        ("videos/a.mp4 0,x", True, "line 2: the labels '0,x' are not whole numbers, like '4,17'"),
        ("videos/a.mp4 0,5", True, "line 2: the label 5 should be from 0 to 1"),
        ("videos/a.mp4 0,1", False, "line 2: '0,1' is not one label: set data.multi_label=True"),
        ("videos/gone.mp4 0,1", True, "line 2: there is no file"),
    ],
)
def test_bad_lines_of_multi_label_lists_raise(folder, line, multi_label, sentence):
    write_list(folder, "videos/b.mp4 1", line, labels=["a", "b"])
    with refused(sentence):
        read_video_list(folder, "train.csv", multi_label=multi_label)
