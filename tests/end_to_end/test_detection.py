"""Whole runs of action detection: resumed, in one and two processes, tested, reported."""

import csv
import json
import shutil
import signal

import numpy as np
import pytest

import mvit_jax
from mvit_jax import train
from mvit_jax.data import detection
from mvit_jax.data.formats.ava import read_ava
from mvit_jax.data.sampling import ClipSettings
from mvit_jax.training.run import history
from tests.end_to_end.test_processes import assert_alike, run
from tests.support import ava_folder, commands, group, tiny
from tests.support.group import final_state

RECIPE = tiny.RECIPE | ava_folder.FLAGS | {"optim.name": "sgd", "optim.lr": 0.1, "epochs": 9.0}
FLAGS = [f"--config.{k}={v}".replace(" ", "") for k, v in (tiny.SMALL | RECIPE).items()]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ava_folder.write_ava(tmp_path_factory.mktemp("ava"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Folder of an uninterrupted run of 9 steps, tested once."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert train.train(tiny.config(folder, **RECIPE), str(workdir)) == 0
    status, out = commands.run("evaluate", f"--workdir={workdir}")
    assert status == 0, out
    return workdir


@pytest.mark.nightly
def test_one_process_resumes_a_run_of_two_with_equal_results(folder, trained, tmp_path):
    workdir = tmp_path / "two"
    program = ["-m", "mvit_jax.train", "--config=configs/moving_digits.py", *FLAGS]
    program += [f"--config.data.folder={folder}", f"--workdir={workdir}"]
    two = group.start(program, 2, 1)
    group.lines_until(two[0], "step 2/")
    two[1].send_signal(signal.SIGTERM)
    assert [d.status for d in group.finish(two)] == [128 + signal.SIGTERM] * 2
    run(program, 1, 2)
    theirs = history.read(trained).val
    assert [v["step"] for v in history.read(workdir).val] == [v["step"] for v in theirs]
    for ours, other in zip(history.read(workdir).val, theirs, strict=True):
        assert ours["map"] == pytest.approx(other["map"], abs=1e-6)
    assert_alike(final_state(workdir), final_state(trained))


def test_two_processes_measure_the_same_map(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("evaluation.json", "detections.csv", "report.html"):
        (tmp_path / "run" / name).unlink()
    run(["-m", "mvit_jax.evaluate", f"--workdir={tmp_path / 'run'}"], 2, 2)
    ours, theirs = (
        json.loads((parent / "evaluation.json").read_text())
        for parent in (tmp_path / "run", trained)
    )
    assert ours["map"] == pytest.approx(theirs["map"], abs=1e-9)
    assert ours["counts"] == theirs["counts"] and ours["classes"] == ["red", "blue", "green"]


def test_the_detections_file_has_every_box_and_evaluated_class(trained):
    with (trained / "detections.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == (16 + 4) * 3 and {row[6] for row in rows} == {"1", "3", "4"}
    scores = np.load(trained / "boxes.npz")
    for number, row in enumerate(rows):
        box, column = number // 3, int(row[6]) - 1
        assert row[0] == scores["video"][box] and int(row[1]) == scores["second"][box]
        np.testing.assert_allclose(np.array(row[2:6], np.float64), scores["boxes"][box], atol=5e-4)
        assert float(row[7]) == pytest.approx(float(scores["probabilities"][box, column]), abs=5e-5)


def test_a_loaded_run_scores_boxes_as_the_test_does(folder, trained):
    loaded, scores = mvit_jax.load_run(trained), np.load(trained / "boxes.npz")
    clips = read_ava(folder, "test.csv", boxes="boxes.csv", class_list="classes.pbtxt", train=False)
    settings = ClipSettings(4, 2, 32, 32, sampling="key_frame")
    tested = detection.load_test_clip(clips, 1, settings)
    clip = (tested["clip"][0] / 255 - 0.45) / 0.225
    ours = loaded(clip[None].astype(np.float32), tested["boxes"][None])
    np.testing.assert_allclose(ours[0], scores["probabilities"][2:5], atol=1e-5)
    assert loaded.class_names == ("red", "action 2", "blue", "green")


def test_the_report_shows_precisions_key_frames_and_mistakes(trained):
    page = (trained / "report.html").read_text()
    results = json.loads((trained / "evaluation.json").read_text())
    assert f'<dd id="map">{results["map"]:.1f} %</dd>' in page
    sheet = json.loads((trained / "clips.json").read_text())
    assert [frame["frame"] for frame in sheet["examples"]][:2] == [
        "v0, second 902",
        "v0, second 903",
    ]
    for frame in sheet["examples"]:
        assert frame["frame"] in page and frame["picture"] in page
    # The boxes without label are false positives of some class; every label has a matching box.
    assert len(sheet["false"]) == 8 and all(pair["score"] for pair in sheet["missed"])
    assert "validation mAP is" in page and "False positives" in page


def test_shuffled_frames_and_whole_frames_are_tests_of_their_own(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for flag in ("--shuffle_frames", "--full_frame"):
        status, out = commands.run("evaluate", f"--workdir={tmp_path / 'run'}", flag)
        assert status == 0, out
    assert {path.name for path in (tmp_path / "run").glob("evaluation*")} == {
        "evaluation.json", "evaluation_shuffled.json", "evaluation_full.json"
    }  # fmt: skip
    assert "whole frame" in out and "shuffled" in out
    # The pictures stand still, so the order of their frames has no effect.
    shuffled = json.loads((tmp_path / "run" / "evaluation_shuffled.json").read_text())
    assert shuffled["map"] == json.loads((trained / "evaluation.json").read_text())["map"]
