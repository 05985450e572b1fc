"""False positives and misses of a test, by hand."""

from pathlib import Path

import numpy as np
import pytest

from mvit_jax.analysis import example_boxes
from mvit_jax.data.formats.ava import read_ava
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.training.evaluation.boxes import BoxScores
from tests.support.ava_folder import write_ava


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = write_ava(tmp_path_factory.mktemp("ava"), videos=2)
    (folder / "excluded.csv").write_text("v1,0903\n")
    return read_ava(
        folder, "test.csv", boxes="boxes.csv", class_list="classes.pbtxt", train=False,
        excluded="excluded.csv",
    )  # fmt: skip


def test_mistakes_are_the_extreme_scores_of_each_key_frame(clips):
    labels = np.minimum(clips.key_frames.labels, 1)
    scores = np.where(labels > 0, 0.9, 0.1).astype(np.float64)
    evaluated = [(row, column) for row, column in np.argwhere(labels) if column != 1]
    missed = next(pair for pair in evaluated if pair[0] < clips.key_frames.rows(3).start)
    scores[missed] = 0.05
    scores[4, 2] = 0.8  # the box without label, at second 903 of the first video
    scores[:, 1] = 1.0  # class 2 is not evaluated
    tested = np.ones(len(clips), bool)
    sheet = example_boxes.make(BoxScores(clips, scores, tested), ClipSettings(2, 2, 32, 32))
    assert len(sheet["examples"]) == 4
    worst = sheet["false"][0]
    assert (worst["frame"], worst["class"], worst["score"]) == ("v0, second 903", "blue", 0.8)
    assert {pair["score"] for pair in sheet["false"][1:]} == {0.1}
    lowest = sheet["missed"][0]
    assert lowest["score"] == 0.05 and lowest["class"] == clips.class_names[missed[1]]
    # The excluded key frame is among the examples, but not among the mistakes.
    assert "v1, second 903" in {frame["frame"] for frame in sheet["examples"]}
    for kind in ("false", "missed"):
        assert "v1, second 903" not in {pair["frame"] for pair in sheet[kind]}


def test_a_label_without_a_box_has_no_score(clips):
    scores = np.full(clips.key_frames.labels.shape, 0.5)
    moved = clips.key_frames.box.copy()
    first = clips.truth.labels[0].argmax()
    moved[0] = [0.9, 0.9, 1.0, 1.0]
    frames = type(clips.key_frames)(**{**vars(clips.key_frames), "box": moved})
    other = type(clips)(**{
        name: getattr(clips, name) for name in clips.__dataclass_fields__
    } | {"key_frames": frames})  # fmt: skip
    sheet = example_boxes.make(
        BoxScores(other, scores, np.ones(len(other), bool)), ClipSettings(2, 2, 32, 32)
    )
    absent = [pair for pair in sheet["missed"] if pair["score"] is None]
    assert first != 1  # an evaluated class
    expected = [("v0, second 902", clips.class_names[first])]
    assert [(pair["frame"], pair["class"]) for pair in absent] == expected


def test_a_crowd_has_more_boxes_than_colours(clips, tmp_path):
    for name in ("classes.pbtxt", "test.csv"):
        (tmp_path / name).write_bytes((Path(clips.list_file).parent / name).read_bytes())
    (tmp_path / "videos").symlink_to(Path(clips.files[0]).parent)
    rows = [f"v0,902,0.{i:02d},0.1,0.{i + 5:02d},0.4,,0.95" for i in range(10, 40, 2)]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    crowd = read_ava(
        tmp_path, "test.csv", boxes="boxes.csv", class_list="classes.pbtxt", train=False
    )
    scores = BoxScores(crowd, np.full((15, 4), 0.5), np.ones(1, bool))
    sheet = example_boxes.make(scores, ClipSettings(2, 2, 32, 32))
    assert len(sheet["examples"][0]["boxes"]) == 15
