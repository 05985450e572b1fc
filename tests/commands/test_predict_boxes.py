"""The predict program with models of action detection."""

import json

import pytest

from mvit_jax.data.media.video import Video
from tests.predict import detection_run, small
from tests.support import commands, onnx_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a run, a video and the boxes of its persons."""
    folder = tmp_path_factory.mktemp("detection")
    (folder / "run").mkdir()
    detection_run.make_run(folder / "run")
    detection_run.wide_video(folder / "yard.mp4")
    (folder / "boxes.csv").write_text(
        "yard,0901,0.1,0.2,0.5,0.9,,0.9\nyard,0902,0.12,0.2,0.52,0.9,,0.9\n"
        "yard,0902,0.6,0.1,0.9,0.9,,0.8\n"
    )
    onnx_files.detr(folder / "person.onnx", [(0.1, 0.1, 0.6, 0.9)], [0], [0.7])
    return folder


def test_boxes_of_a_csv_file_are_scored_and_drawn(folder, tmp_path):
    status, output = commands.run(
        "predict", folder / "yard.mp4", f"--workdir={folder / 'run'}", "--first_second=900",
        f"--boxes={folder / 'boxes.csv'}", f"--pictures={tmp_path}", "--top=2", "--min_score=0",
        f"--json={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert status == 0, output
    [file] = json.loads((tmp_path / "out.json").read_text())["files"]
    assert [frame["second"] for frame in file["key_frames"]] == [1, 2]
    assert [[box["track"] for box in frame["boxes"]] for frame in file["key_frames"]] == [
        [0],
        [0, 1],
    ]
    header, _, *lines = output.splitlines()
    assert header.split() == ["file", "person", "time", "class", "probability"]
    assert "0:01.0 - 0:02.0" in lines[0] and "0:02.0 " in lines[2] and lines[1].startswith(" ")
    for person, rows in zip(file["persons"], (lines[:2], lines[2:4]), strict=True):
        for entry, row in zip(person["classes"], rows, strict=True):
            assert row.endswith(f"{entry['probability']:.2f}") and entry["class"] in row
    assert lines[-1] == f"wrote {tmp_path}/yard_boxes.png, {tmp_path}/yard_boxes.mp4"
    with Video(tmp_path / "yard_boxes.mp4") as video:
        assert video.num_frames == 49  # half a second before second 1 to half a second after 2


@pytest.mark.slow
def test_a_detector_finds_the_persons_of_each_second(folder, tmp_path):
    status, output = commands.run(
        "predict", folder / "yard.mp4", f"--workdir={folder / 'run'}",
        f"--detector={folder / 'person.onnx'}", f"--json={tmp_path / 'out.json'}",
    )  # fmt: skip
    assert status == 0, output
    [file] = json.loads((tmp_path / "out.json").read_text())["files"]
    assert [frame["second"] for frame in file["key_frames"]] == [0.5, 1.5, 2.5, 3.5]
    assert {box["track"] for frame in file["key_frames"] for box in frame["boxes"]} == {0}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give either --boxes=FILE.csv, with lines"),
        (["--boxes=boxes.csv", "--detector=person.onnx"], "give either --boxes=FILE.csv"),
        (["--boxes=gone.csv"], "there is no file gone.csv"),
        (["--detector=gone.onnx"], "there is no detector gone.onnx"),
        (["--boxes=boxes.csv", "--clips=2"], "--clips is not for models of action detection"),
        (["--boxes=boxes.csv"], "the seconds 901 to 902, but the video lasts from 0 to 4.0"),
        (
            ["--boxes=boxes.csv", "--first_second=900", "--min_person=0.95"],
            "no boxes of score 0.95",
        ),
    ],
)
def test_flags_that_do_not_match_are_refused(folder, flags, sentence):
    status, output = commands.run(
        "predict", "yard.mp4", f"--workdir={folder / 'run'}", *flags, cwd=folder
    )
    assert status == 1 and sentence in output and "Traceback" not in output
    assert output.startswith(("error: ", "yard.mp4: ")) and output.count("\n") == 1


def test_a_model_of_whole_videos_takes_no_boxes(digits):
    run = small.shared_run(digits)[0]
    status, output = commands.run("predict", "a.mp4", f"--workdir={run}", "--boxes=a.csv")
    assert status == 1
    assert output.startswith("error: --boxes requires a model of action detection, but this one")
