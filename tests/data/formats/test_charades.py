"""Labels of Charades against the union over frames, computed frame by frame."""

import numpy as np
import pytest

from mvit_jax.data.formats.charades import read_charades
from tests.data import frames
from tests.support.refusals import refused

# Video -> labels of each frame.
LABELS = {
    "46GP8": [[], [92], [92, 147], [147, 0], [], [156]],
    "YSKX3": [[3]] * 5,
    "NONE1": [[], []],
}


@pytest.fixture
def folder(tmp_path):
    rows = [
        frames.row(video, i, ",".join(map(str, of_frame)))
        for video, of_frames in LABELS.items()
        for i, of_frame in enumerate(of_frames)
    ]
    (tmp_path / "train.csv").write_text(frames.text(*rows))
    return tmp_path


def union(of_frames):
    vector = np.zeros(157, np.uint8)
    for labels in of_frames:
        vector[labels] = 1
    return vector


def test_labels_are_the_union_over_frames(folder):
    split = read_charades(folder, "train.csv")
    assert len(split) == 3 and len(split.class_names) == 157
    assert split.class_names[:2] == ("c000", "c001") and split.class_names[-1] == "c156"
    for index, (video, of_frames) in enumerate(LABELS.items()):
        whole = split.label(index)
        assert whole.dtype == np.uint8 and np.array_equal(whole, union(of_frames))
        for first in range(len(of_frames)):
            for last in range(first, len(of_frames)):
                # Includes the labels of frames between the clip's frames.
                clip = np.array([first, last])
                expected = union(of_frames[first : last + 1])
                assert np.array_equal(split.label(index, clip), expected), (video, clip)
        whole[:] = 9  # belongs to the caller
        assert np.array_equal(split.label(index), union(of_frames))


def test_frames_are_read_from_the_listed_files(folder):
    frames.write(folder / "rgb", "YSKX3", 5)
    for prefix in ("rgb", str(folder / "rgb")):
        split = read_charades(folder, "train.csv", prefix=prefix)
        assert split.item(1) == str(folder / "rgb/YSKX3")
        with split.opened(1, 4) as video:
            assert video.num_frames == 5
            assert np.array_equal(video.frames([4, 1])[0], frames.pixels("YSKX3", 4))


def test_labels_txt_names_the_classes(folder):
    (folder / "labels.txt").write_text("\n".join(f"doing {i}" for i in range(160)))
    split = read_charades(folder, "train.csv")
    assert split.class_names[3] == "doing 3" and split.label(0).shape == (160,)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("157", "video YSKX3 has a frame with the label 157, which should be from 0 to 156"),
        ("-1", "the label -1, which should be from 0 to 156, as there are 157 classes"),
        ("c004", "video YSKX3 has a frame with the labels '\"c004\"', which should be comma"),
    ],
)
def test_invalid_labels_end_with_a_one_sentence_error(tmp_path, labels, expected):
    rows = [("YSKX3", 0, "3"), ("YSKX3", 1, labels), ("LAST1", 0, "1")]
    (tmp_path / "train.csv").write_text(frames.text(*(frames.row(*row) for row in rows)))
    with refused(expected, tmp_path / "train.csv"):
        read_charades(tmp_path, "train.csv")
