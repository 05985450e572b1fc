"""Published lists and frame lists of Something-Something v2."""

import json

import numpy as np
import pytest

from mvit_jax.data.formats.ssv2 import read_ssv2
from tests.data import frames
from tests.support.refusals import refused

LABELS = {"Holding something": "1", "Showing something on top of something": "0", "Other": "2"}
TRAIN = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]",
     "placeholders": ["potato"]},
    {"id": "42326", "template": "Showing [something] on top of [something]"},
    {"id": "1", "template": "Holding [something]"},
]  # fmt: skip
VALIDATION = [{"id": "5", "template": "Other"}]


@pytest.fixture
def folder(tmp_path):
    for name, content in (("labels", LABELS), ("train", TRAIN), ("validation", VALIDATION)):
        file = tmp_path / f"something-something-v2-{name}.json"
        file.write_text(json.dumps(content))
    for video, count in (("78687", 5), ("42326", 9), ("5", 4)):
        frames.write(tmp_path / "frames", video, count)
    return tmp_path


def test_the_published_lists_name_folders_of_frames(folder):
    split = read_ssv2(folder, "something-something-v2-train.json", prefix="frames")
    assert split.class_names == ("Showing something on top of something", *("Holding something",
                                 "Other"))  # fmt: skip
    assert len(split) == 3
    labels = [split.label(i) for i in range(3)]
    assert labels == [1, 0, 1] and all(isinstance(label, int) for label in labels)
    assert split.label(1, np.arange(3)) == 0
    assert split.item(1) == str(folder / "frames/42326")
    with split.opened(1, 4) as video:
        assert video.num_frames == 9
        assert np.array_equal(video.frames([8])[0], frames.pixels("42326", 8))
    other = read_ssv2(folder, "something-something-v2-validation.json", prefix="frames")
    assert [other.label(0), other.class_names] == [2, split.class_names]


def test_the_file_names_of_later_releases_are_read(folder):
    (folder / "labels").mkdir()
    for name in ("labels", "train"):
        file = folder / f"something-something-v2-{name}.json"
        file.rename(folder / f"labels/{name}.json")
    split = read_ssv2(folder, "labels/train.json", prefix="frames")
    assert [split.label(i) for i in range(3)] == [1, 0, 1]
    assert split.item(0) == str(folder / "frames/78687")


def test_frame_lists_take_labels_from_the_published_lists(folder):
    rows = [frames.row("5", i) for i in range(4)] + [frames.row("78687", i) for i in range(2)]
    (folder / "val.csv").write_text(frames.text(*rows))
    split = read_ssv2(folder, "val.csv", prefix="frames")
    assert [split.label(0), split.label(1, np.arange(2))] == [2, 1]
    assert split.item(0) == str(folder / "frames/5")
    with split.opened(1, 4) as video:
        assert video.num_frames == 2  # as listed, though the folder has more
        assert np.array_equal(video.frames([1, 0])[0], frames.pixels("78687", 1))


LABELS_FILE, TRAIN_FILE = "something-something-v2-labels.json", "something-something-v2-train.json"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (LABELS_FILE, None, f"there is no {LABELS_FILE} in"),
        (LABELS_FILE, "{", "is not JSON (Expecting property name"),
        (LABELS_FILE, '["a"]', 'should map templates to numbers from 0 on, like {"Holding'),
        (LABELS_FILE, '{"a": "0", "b": "2"}', "should map templates to numbers from 0 on"),
        (LABELS_FILE, '{"a": "x"}', "should map templates to numbers from 0 on"),
        (TRAIN_FILE, None, f"there is no list {{0}}/{TRAIN_FILE}"),
        (TRAIN_FILE, b"\xff\xfe[", "is not JSON ("),
        (TRAIN_FILE, "{}", "should be a list of videos"),
        (TRAIN_FILE, "[]", "should be a list of videos"),
        (TRAIN_FILE, "[3]", "entry 0 of its list has no `id`"),
        (TRAIN_FILE, '[{"id": "7"}]', "video 7, has no template: videos of the data set's test"),
        (
            TRAIN_FILE,
            '[{"id": "7", "template": "Eating [something]"}]',
            "the template 'Eating something' of video 7 is not in the labels file",
        ),
    ],
)
def test_invalid_files_end_with_a_one_sentence_error(folder, name, content, expected):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(expected.replace("{0}", str(folder)), folder):
        read_ssv2(folder, TRAIN_FILE)


def test_a_listed_video_without_a_label_is_an_error(folder):
    (folder / "val.csv").write_text(frames.text(*(frames.row(name, 0) for name in ("5", "6", "7"))))
    with refused("val.csv have no label, like '6'"):
        read_ssv2(folder, "val.csv")
