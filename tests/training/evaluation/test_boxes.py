"""Scores of the boxes of a list: their order, the mAP, whole frames, and decode failures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.data.formats.ava import read_ava
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation.boxes import score_boxes
from mvit_jax.training.evaluation.protocol import Protocol
from tests.support.ava_folder import COLOURS, write_ava
from tests.support.refusals import refused

SETTINGS = ClipSettings(2, 2, 32, 32, sampling="key_frame", full_frame=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ava(tmp_path_factory.mktemp("ava"))


def opened(folder, boxes="boxes.csv", **options):
    return read_ava(
        folder, "test.csv", boxes=boxes, class_list="classes.pbtxt", train=False, **options
    )


def score(clips, settings=SETTINGS, predict=None, **protocol):
    return score_boxes(
        predict or by_colour, None, clips, settings, Protocol(batch=3, **protocol),
        mesh=sharding.make_mesh(devices=jax.devices()[:2]), loader=LoaderOptions(0),
    )  # fmt: skip


def by_colour(params, clip, boxes):
    """Returns the probability 1 / (1 + distance) for the colour in the middle of each box."""
    x, y = ((boxes[..., i] + boxes[..., i + 2]) / 2 for i in range(2))
    row, column = (jnp.clip(jnp.round(at).astype(int), 0) for at in (y, x))
    colour = clip[jnp.arange(len(clip))[:, None], 0, 0, row, column].astype(jnp.float32)
    colours = jnp.asarray([COLOURS[i] for i in range(1, 5)], jnp.float32)
    distance = jnp.abs(colour[:, :, None] - colours[None, None]).mean(-1)
    return 1 / (1 + distance)


def test_whole_frames_find_every_person(folder):
    """The probabilities follow from the pixels in the boxes, so a wrong order lowers the mAP."""
    shapes = []

    def predict(params, clip, boxes):
        shapes.append(clip.shape)
        return by_colour(params, clip, boxes)

    clips = opened(folder)
    scores = score(clips, predict=predict)
    assert {shape[-3:-1] for shape in shapes} == {(32, 42), (42, 32)} and len(shapes) == 2
    assert scores.tested.all() and not scores.failures
    listed = clips.key_frames.labels.any(1)
    predicted = scores.probabilities.argmax(1)[listed]
    np.testing.assert_array_equal(predicted, clips.key_frames.labels.argmax(1)[listed])
    metrics = scores.metrics()
    assert metrics["map"] == metrics["map_score_order"] == 100
    assert metrics["classes"] == ["red", "blue", "green"] and metrics["class_ids"] == [1, 3, 4]
    assert metrics["map_by_group"] == {"pose": 100} and metrics["videos"] == 8
    truth = clips.truth.labels[:, [0, 2, 3]]
    assert metrics["truth_per_class"] == truth.sum(0).tolist()
    assert metrics["counts"]["truth"] == truth.sum() and metrics["counts"]["images"] == 8


def test_labelled_boxes_with_their_labels_have_a_map_of_100(folder):
    clips = opened(folder, boxes=None)
    scores = score(clips, dataclasses.replace(SETTINGS, full_frame=False))
    scores.probabilities = clips.key_frames.labels.astype(np.float64)
    assert scores.metrics()["map"] == 100
    scores.probabilities = 1 - scores.probabilities
    assert scores.metrics()["map"] < 60


def test_excluded_key_frames_and_classes_without_boxes(folder):
    (folder / "excluded.csv").write_text("v0,0902\nv1,903\nnothing,0902\n")
    clips = opened(folder, excluded="excluded.csv")
    metrics = score(clips).metrics()
    assert metrics["counts"]["images"] == 6 and metrics["map"] == 100
    without = clips.truth.labels.copy()
    without[:, 0] = 0
    truth = dataclasses.replace(clips.truth, labels=without)
    scores = score(clips)
    scores.clips.__dict__["truth"] = truth
    metrics = scores.metrics()
    assert metrics["per_class"][0] is None and metrics["truth_per_class"][0] == 0


def test_key_frames_that_cannot_be_decoded_are_left_out(folder, tmp_path):
    (tmp_path / "v0.mp4").write_bytes(b"")
    clips = opened(folder)
    broken = dataclasses.replace(clips, files=(str(tmp_path / "v0.mp4"), *clips.files[1:]))
    scores = score(broken)
    assert scores.tested.tolist() == [False] * 2 + [True] * 6
    [sentence] = scores.failures
    assert "v0.mp4 at second 902 and 1 more key frames: " in sentence
    metrics = scores.metrics()
    assert metrics["map"] == 100
    evaluated = clips.truth.labels[4:, [0, 2, 3]]  # two boxes in each of two key frames
    assert metrics["counts"]["truth"] == evaluated.sum()
    with refused("2 of the 8 key frames of", "larger share than data.max_broken=0.2"):
        score(broken, max_broken=0.2)
    nothing = dataclasses.replace(clips, files=(str(tmp_path / "v0.mp4"),) * 4)
    with refused("none of the 8 key frames can be decoded"):
        score(nothing).metrics()


def test_key_frames_beyond_the_end_are_left_out(folder):
    """Seconds 902 and 903 of videos of 4 s that begin at second 0, or at second 898."""
    for first_second, tested in ((0, 0), (898, 4)):
        scores = score(opened(folder, first_second=first_second))
        assert scores.tested.sum() == tested
        assert "key frame is beyond the end of the video, second" in scores.failures[0]


def test_a_video_whose_frames_change_their_size_is_left_out(folder, tmp_path):
    for name in ("test.csv", "boxes.csv", "classes.pbtxt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    write_ava(tmp_path / "as_frames", videos=4, frames=True)
    (tmp_path / "frames").symlink_to(tmp_path / "as_frames" / "frames")
    stored = tmp_path / "as_frames" / "frames" / "v0"
    other = tmp_path / "as_frames" / "frames" / "v1" / "v1_000001.png"
    for path in sorted(stored.iterdir())[:20]:
        path.write_bytes(other.read_bytes())
    scores = score(opened(tmp_path))
    assert scores.tested.tolist() == [False] * 2 + [True] * 6
    assert "differ in size" in scores.failures[0]


def test_boxes_of_another_split_are_refused(folder, tmp_path):
    other = (
        (folder / "boxes.csv").read_text().replace(",0902,", ",0904,").replace(",0903,", ",0904,")
    )
    (folder / "later.csv").write_text(other)
    clips = opened(folder, boxes="later.csv")
    scores = score(clips, predict=by_colour)
    scores.tested[:] = True
    with refused("none of the tested key frames is in", "data.test_boxes"):
        scores.metrics()
