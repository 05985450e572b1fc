"""Tables of class names beside the files of a folder."""

import pytest

from mvit_jax.data.source import open_source
from tests.support.refusals import refused


@pytest.fixture
def folder(tmp_path):
    for name in ("train/a.mp4", "train/b, c.mp4", "train/d.mp4", "val/e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "train/labels.csv").write_text('a.mp4,run; jump\n"b, c.mp4",walk\n\nd.mp4,\n')
    (tmp_path / "val/labels.csv").write_text("e.mp4,run\n")
    return tmp_path


def read(folder, name):
    return open_source(folder, name, source="folders", multi_label=True)


def test_the_table_gives_files_and_sets_of_classes(folder):
    videos = read(folder, "train.csv")
    assert videos.class_names == ("jump", "run", "walk")
    assert [videos.label(i).tolist() for i in range(3)] == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert videos.item(1) == f"{folder}/train/b, c.mp4"
    validation = read(folder, "val.csv")
    assert validation.class_names == videos.class_names
    assert validation.label(0).tolist() == [0, 1, 0]
    (folder / "labels.txt").write_text("walk\nsit\nrun\njump\n")
    assert read(folder, "train").label(0).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (None, "there is no table {0}/val/labels.csv: with data.multi_label it should hold"),
        ("e.mp4,run,jump\n", "labels.csv, line 1: 'e.mp4,run,jump' should be a file and its"),
        ("e.mp4,run\ne.mp4,sit\n", "labels.csv, line 2: {0}/train/labels.csv has no class 'sit'"),
        ("f.mp4,run\n", "labels.csv, line 1: there is no file {0}/val/f.mp4"),
        ("\n", "labels.csv lists no files"),
        ("file,classes\ne.mp4,run\n", "labels.csv, line 1 looks like a header: remove it"),
    ],
)
def test_bad_tables_raise(folder, table, sentence):
    (folder / "val/labels.csv").unlink()
    if table is not None:
        (folder / "val/labels.csv").write_text(table)
    with refused(sentence.format(folder)):
        read(folder, "val.csv")


@pytest.mark.parametrize("header", ["file,classes", "\nvideo,a;b"])
def test_a_header_of_the_training_table_names_no_classes(folder, header):
    (folder / "train/labels.csv").write_text(f"{header}\na.mp4,run\n")
    with refused("train/labels.csv, line", "looks like a header: remove it"):
        read(folder, "val.csv")


def test_lines_of_one_file_add_up(folder, capsys):
    (folder / "train/labels.csv").write_text("a.mp4,run\nd.mp4,\n./a.mp4,jump\nd.mp4,run\n")
    videos = read(folder, "train.csv")
    assert videos.paths == (f"{folder}/train/a.mp4", f"{folder}/train/d.mp4")
    assert videos.labels.tolist() == [[1, 1], [0, 1]]  # jump, run
    table = f"{folder}/train/labels.csv"
    assert capsys.readouterr().err == (
        f"note: {table} does not list 1 videos or images beside it, for example "
        f"{folder}/train/b, c.mp4, which are left out\n"
    )


def test_files_beside_the_table_that_it_does_not_list_are_counted(folder, capsys):
    for name in (
        "._g.mp4",
        ".cache/h.mp4",
        "readme.md",
        "deeper/i.GIF",
        "deeper/j.jpg",
        "no/k.mp4",
    ):
        (folder / "val" / name).parent.mkdir(exist_ok=True)
        (folder / "val" / name).touch()
    (folder / "val/labels.csv").write_text("e.mp4,run\ndeeper/j.jpg,walk\n")
    assert len(read(folder, "val.csv")) == 2
    err = capsys.readouterr().err
    assert "does not list 1 videos or images beside" in err and f"{folder}/val/deeper/i.GIF" in err
