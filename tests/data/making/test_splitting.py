"""Lists of class folders: stratified splits that cover every file once."""

import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.data.formats.video_list import read_video_list
from mvit_jax.data.making.splitting import write_lists
from tests.support.refusals import refused


@pytest.fixture
def folder(tmp_path):
    """Twenty videos of one class, ten images of another, and unrelated files."""
    for name, count, end in (("tennis", 20, ".mp4"), ("a b", 10, ".JPG")):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}{end}").touch()
    (tmp_path / "tennis" / "notes.txt").touch()
    (tmp_path / "readme.md").touch()
    return tmp_path


def test_every_file_is_in_exactly_one_list(folder):
    counts = write_lists(folder, val=0.1, test=0.2)
    assert counts == {"train.csv": 21, "val.csv": 3, "test.csv": 6}
    assert (folder / "labels.txt").read_text() == "a b\ntennis\n"
    paths = []
    for name, count in counts.items():
        videos = read_video_list(folder, name)
        assert len(videos) == count and videos.class_names == ("a b", "tennis")
        assert sum(videos.labels) * 3 == count * 2  # two of three are tennis, in each list
        for path, label in zip(videos.paths, videos.labels, strict=True):
            assert path.split("/")[-2] == videos.class_names[label]
        paths += videos.paths
    files = [str(f) for f in folder.rglob("*") if f.suffix in (".mp4", ".JPG")]
    assert sorted(paths) == sorted(files)


def test_lists_are_reproducible_and_never_overwritten(folder):
    write_lists(folder, val=0.1, test=0.2)
    before = (folder / "train.csv").read_text()
    write_lists(folder, val=0.1, test=0.2)
    assert (folder / "train.csv").read_text() == before
    with pytest.raises(UserError, match=r"train\.csv exists and differs"):
        write_lists(folder, val=0.1, test=0.2, seed=1)
    assert (folder / "train.csv").read_text() == before
    for list_file in folder.glob("*.csv"):
        list_file.unlink()
    write_lists(folder, val=0.1, test=0.2, seed=1)
    assert (folder / "train.csv").read_text() != before


def test_an_empty_split_writes_no_list(folder):
    counts = write_lists(folder, val=0.2, test=0.0)
    assert counts["test.csv"] == 0 and not (folder / "test.csv").exists()


@pytest.mark.parametrize(
    ("val", "test", "message"),
    [(0.5, 0.5, "leave a share for"), (-0.1, 0.1, "at least 0"), (0.05, 0.9, "too few")],
)
def test_impossible_shares_are_rejected(folder, val, test, message):
    for number in range(7):
        (folder / "a b" / f"{number}.JPG").unlink()
    with pytest.raises(UserError, match=message):
        write_lists(folder, val=val, test=test)
    assert not (folder / "labels.txt").exists()


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (("train", "val", "test"), ""),
        (("train", "valid"), "; add --config.data.val_list=valid"),
    ],
)
def test_a_split_tree_names_the_source_that_reads_it(tmp_path, names, flags):
    for name in names:
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "a.mp4").touch()
    expected = f"--config.data.source=folders --config.data.folder={tmp_path}, which needs no lists"
    with refused(f"{tmp_path} is split already", expected + flags):
        write_lists(tmp_path, val=0.1, test=0.1)


def test_a_class_may_be_called_train(folder):
    (folder / "tennis").rename(folder / "train")
    write_lists(folder, val=0.1, test=0.1)
    assert (folder / "labels.txt").read_text() == "a b\ntrain\n"


@pytest.mark.parametrize("name", ["tennis/caf\udce9.mp4", "tennis/two\nlines.mp4", " cat/0.mp4"])
def test_a_name_that_no_list_can_hold_is_an_error_before_any_list_is_written(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with refused(f"{str(folder / name)!r} cannot stand in a list", "(1 such files)"):
        write_lists(folder, val=0.1, test=0.1)
    assert not list(folder.glob("*.csv")) and not (folder / "labels.txt").exists()
