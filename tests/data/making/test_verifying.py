"""Checks of detection data sets; those of lists and shards are in `test_shards`."""

import shutil

import cv2
import numpy as np

from mvit_jax.data.formats.ava import read_ava
from mvit_jax.data.making.verifying import check_key_frames
from tests.support import commands
from tests.support.ava_folder import FLAGS, write_ava

CONFIG = [
    "--config=configs/moving_digits.py",
    *(f"--config.{key}={value}".replace(" ", "") for key, value in FLAGS.items()),
    "--config.augment.mixup=0", "--config.augment.cutmix=0",
]  # fmt: skip


def test_every_problem_of_key_frames_is_one_sentence(tmp_path):
    """Four videos of 125 frames from second 900 on, and key frames at seconds 902 and 903."""
    write_ava(tmp_path, frames=True)

    def report():
        clips = read_ava(
            tmp_path, "train.csv", boxes="boxes.csv", class_list="classes.pbtxt", train=True,
            max_missing=1.0,
        )  # fmt: skip
        return check_key_frames("train", clips, workers=2)

    good = report()
    assert (good.split, good.videos, good.problems) == ("train", 4, ())
    assert good.contents == (
        "8 key frames, 20 boxes, 3 in a key frame at most, short sides of 48 to 48 pixels"
    )
    (tmp_path / "frames/v0/v0_000040.png").unlink()
    with (tmp_path / "train.csv").open("a") as labels:
        labels.write("v1,0905,0.1,0.1,0.4,0.4,1,0\nv1,0904,0.1,0.1,0.4,0.4,1,0\n")
    small = cv2.imencode(".png", np.zeros((24, 32, 3), np.uint8))[1].tobytes()
    (tmp_path / "frames/v2/v2_000091.png").write_bytes(small)  # second 903
    shutil.rmtree(tmp_path / "frames/v3")
    gap, end, size, missing = report().problems
    assert gap.startswith(f"{tmp_path}/frames/v0 lacks 1 frame, the first is number 40, so that")
    assert "v1 has 125 frames at 30 per second" in end and "before 1 key frame" in end
    assert end.endswith("the first at second 905")
    assert "v2 cannot be decoded: its frames differ in size: v2_000061.png has 64x48" in size
    assert f"{tmp_path}/videos/v3 cannot be decoded: " in missing


def test_the_program_checks_the_lists_of_a_config(tmp_path):
    """Training boxes include the labelled ones, which the detected ones repeat."""
    write_ava(tmp_path, videos=2)
    status, output = commands.run("prepare", "check", tmp_path, *CONFIG)
    assert status == 0, output
    contents = "2 videos, 4 key frames, 10 boxes, 3 in a key frame at most, short sides of 48 to 48"
    first, second, *_ = output.splitlines()
    assert first == f"train: {contents} pixels, 0 problems"
    assert second == f"val: {contents} pixels, 0 problems"
    (tmp_path / "boxes.csv").write_text("v0,0902,0.1,0.1,1.4,0.4,1,0.95\n")
    status, output = commands.run("prepare", "check", tmp_path, *CONFIG, "--split=test")
    assert status == 1
    problem, summary, error = output.splitlines()
    assert problem.startswith(f"{tmp_path}/boxes.csv, line 1: x2 is 1.4, not from 0 to 1")
    assert summary == "test: 0 videos, 1 problems"
    assert error == f"error: {tmp_path} has 1 problems, listed above"
    for flags, words in ((CONFIG[:1], "--config is for detection"), (CONFIG, "has no list four")):
        status, output = commands.run("prepare", "check", tmp_path, *flags, "--split=four")
        assert status == 1 and words in output
