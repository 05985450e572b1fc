"""Persons of videos: csv files, key frames, and scores against the model on frames cut by hand."""

import functools

import cv2
import jax
import numpy as np
import pytest

from mvit_jax.analysis import box_drawing
from mvit_jax.common.errors import UserError
from mvit_jax.data.media.video import Video
from mvit_jax.models.functional import functional
from mvit_jax.predict import box_figures
from mvit_jax.predict.boxes import (
    BoxPrediction,
    BoxPredictor,
    KeyFrame,
    ScoredFrame,
    Shown,
    described,
    detect,
    is_detection,
    read_boxes,
)
from mvit_jax.predict.detector import PersonDetector
from mvit_jax.training import build
from tests.predict.detection_run import NAMES, make_run, wide_video
from tests.predict.small import write_video
from tests.support import onnx_files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, *make_run(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return wide_video(tmp_path_factory.mktemp("v") / "yard.mp4")


def lines(file, *rows):
    file.write_text("\n".join(rows) + "\n")
    return file


def test_scores_are_those_of_the_clip_around_the_key_frame(run, wide):
    folder, config, params = run
    assert is_detection(folder)
    boxes = [np.array([(0.1, 0.2, 0.5, 0.9), (0.6, 0.0, 1.0, 1.0)]), np.zeros((0, 4)),
             np.tile([0.25, 0.25, 0.75, 0.75], (5, 1))]  # fmt: skip
    frames = [KeyFrame(t, b, np.ones(len(b))) for t, b in zip((1.0, 2.0, 3.9), boxes, strict=True)]
    steps = []
    prediction = BoxPredictor(folder).predict(
        wide, lambda video, progress: frames, progress=lambda *done: steps.append(done)
    )
    assert prediction.seconds == 4.0 and steps == [(1, 3), (2, 3), (3, 3)]
    assert [f.probabilities.shape for f in prediction.frames] == [(2, 3), (0, 3), (5, 3)]

    # Four frames, two apart at 30 per second: 26, 28, 30, 32 around frame 30 = second 1.
    model = functional(build.model_config(config, 3))
    with Video(wide) as video:
        numbers = [int(np.floor(n / 30 * 24 + 0.01)) for n in (26, 28, 30, 32)]
        shown = [cv2.resize(image, (42, 32)) for image in video.frames(numbers)]
    # The reference code rounds 42.7 down, and scales both axes of boxes by the long side.
    clip = (np.stack(shown)[None] / 255 - np.array(config.data.mean)) / np.array(config.data.std)
    pixels = np.clip(boxes[0] * [64, 48, 64, 48], 0, [63, 47, 63, 47]) * (42 / 64)
    pixels = np.minimum(pixels, [41, 31, 41, 31])
    apply = jax.jit(model.apply)
    logits = apply(params, clip.astype(np.float32), pixels[None].astype(np.float32))[0]
    expected = 1 / (1 + np.exp(-np.asarray(logits[0])))
    np.testing.assert_allclose(prediction.frames[0].probabilities, expected, atol=1e-4)
    assert np.ptp(expected) > 0.05


def test_a_csv_file_has_the_persons_of_a_video_at_its_seconds(tmp_path, wide):
    rows = [
        "yard,0902,0.1,0.2,0.5,0.9,12,0.9", "yard,902,0.1,0.2,0.5,0.9,80,0.9",
        "yard,0902,0.6,0.2,0.9,0.9,,0.4", "other,0999,0.1,0.2,0.5,0.9,,0.95",
        "yard,0901,0.0,0.0,1.0,1.0,-1,0.7",
    ]  # fmt: skip
    file = lines(tmp_path / "boxes.csv", *rows)
    with Video(wide) as video:
        read = functools.partial(read_boxes, file, video, first_second=900)
        first, second = read(min_score=0.5)
        assert (first.seconds, second.seconds) == (1, 2)
        np.testing.assert_array_equal(second.boxes, [(0.1, 0.2, 0.5, 0.9)])
        assert len(read(min_score=0.3)[1].boxes) == 2
        with pytest.raises(UserError, match=r"at the seconds 901 to 902, but .* from 0 to 4\.0"):
            read_boxes(file, video, min_score=0.5)
        # Labels, whose last column is the number of a person.
        labels = lines(
            tmp_path / "labels.csv",
            "yard,0002,0.1,0.2,0.5,0.9,12,0",
            "yard,0002,0.1,0.2,0.5,0.9,80,7",
        )
        [frame] = read_boxes(labels, video, min_score=0.5)
        assert frame.persons.tolist() == [1] and frame.seconds == 2
        other = lines(tmp_path / "other.csv", "porch,0002,0.1,0.2,0.5,0.9,,0.9")
        with pytest.raises(UserError, match=r"no boxes of yard, only of 1 video \(porch\)"):
            read_boxes(other, video, min_score=0.5)


def test_a_detector_sees_the_middle_of_each_second(tmp_path):
    """The score of the only person is the brightness of a frame."""
    bright = np.repeat(np.linspace(60, 250, 7), 12).astype(np.uint8)  # half a second each
    pixels = np.broadcast_to(bright[:, None, None, None], (84, 48, 64, 3))
    path = write_video(tmp_path / "a.mp4", np.ascontiguousarray(pixels), rate=24)
    file = onnx_files.detr(tmp_path / "d.onnx", [(0, 0, 1, 1)], [0], [None], [(1, 32, 32)])
    with Video(path) as video:
        frames = detect(PersonDetector(file, 0.5), video)
    assert [frame.seconds for frame in frames] == [0.5, 1.5, 2.5]
    assert [len(frame.boxes) for frame in frames] == [0, 1, 1]
    np.testing.assert_allclose(
        [frame.persons[0] * 255 for frame in frames[1:]], bright[[36, 60]], atol=4
    )


def scored(seconds, boxes, tracks, probabilities):
    return ScoredFrame(
        seconds, np.array(boxes, float).reshape(-1, 4), np.ones(len(tracks)), np.array(tracks, int),
        np.array(probabilities, float).reshape(-1, 3),
    )  # fmt: skip


PREDICTION = BoxPrediction(
    (
        scored(1.0, [(0, 0, 0.2, 0.5), (0.5, 0, 0.7, 0.5)], [0, 1],
               [(0.9, 0.1, 0.4), (0.1, 0.2, 0.2)]),
        scored(2.0, [(0.2, 0, 0.4, 0.5)], [0], [(0.7, 0.1, 0.2)]),
        scored(3.9, [], [], []),
    ),
    4.0,
)  # fmt: skip


def test_a_prediction_is_described_by_frame_and_by_person():
    described_ = described(PREDICTION, NAMES, Shown(top=2, min_score=0.3))
    first = described_["key_frames"][0]["boxes"][0]
    assert first["box"] == [0, 0, 0.2, 0.5] and first["track"] == 0
    assert [c["class"] for c in first["classes"]] == ["stand", "talk to (a person)"]
    longest, other = described_["persons"]
    assert (longest["track"], longest["start"], longest["end"]) == (0, 1.0, 2.0)
    assert longest["classes"] == [
        {"class": "stand", "probability": pytest.approx(0.8)},
        {"class": "talk to (a person)", "probability": pytest.approx(0.3)},
    ]
    # No class of the other person reaches the smallest score: the best one remains.
    assert [c["class"] for c in other["classes"]] == ["walk"]


def test_figures_have_the_frames_near_key_frames_and_boxes_that_move(wide, tmp_path):
    shown = Shown(top=1, min_score=0.3)
    frames, fps = box_figures.moving(wide, PREDICTION, NAMES, shown)
    frames = list(frames)
    # Half a second before 1 to half a second after 2, and from 3.4 on: at 24 per second.
    assert fps == 24 and len(frames) == (60 - 12 + 1) + (96 - 82)
    assert frames[0].shape == (48 * 8, 64 * 8, 3)
    colour = box_drawing.colour_of(0)

    def left(frame):
        edge = (frame[150:180] == colour).all(-1).mean(0)
        return int(np.flatnonzero(edge == 1)[0]) / frame.shape[1]

    # Key frames are frames 24 and 48, numbers 12 and 36 here; between them the box moves evenly.
    np.testing.assert_allclose([left(frames[i]) for i in (0, 12, 18, 24, 36)],
                               [0, 0, 0.05, 0.1, 0.2], atol=0.01)  # fmt: skip
    written = box_figures.write(wide, PREDICTION, NAMES, shown, tmp_path / "yard")
    assert [path.name for path in written] == ["yard_boxes.png", "yard_boxes.mp4"]
    with Video(written[1]) as video:
        assert video.num_frames == len(frames)
    nobody = BoxPrediction(PREDICTION.frames[2:], 4.0)
    written = box_figures.write(wide, nobody, NAMES, shown, tmp_path / "empty")
    assert [path.name for path in written] == ["empty_boxes.png"]
