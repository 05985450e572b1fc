"""Five hundred videos of which fifty are odd or broken, through training and test."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.training import build
from tests.data.bar_codes import write
from tests.data.media.test_video import audio_only, half_without_index
from tests.support import commands, scoring, tiny

pytestmark = pytest.mark.slow

VIDEOS, EACH = 500, 5


def noise(seed, frames=24, height=32, width=48):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return [np.roll(picture, shift, axis=1) for shift in range(frames)]


def flipped(folder):
    path = Path(write(folder / "flipped.mp4", noise(1)))
    data = bytearray(path.read_bytes())
    for index in np.random.default_rng(2).integers(0, len(data), 200):
        data[index] ^= 1 << int(index % 8)
    path.write_bytes(data)
    return path


def small_file(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


BROKEN = {
    "empty": small_file("empty.mp4", b""),
    "text": small_file("text.mp4", b"404 Not Found\n" * 100),
    "cut": half_without_index,
    "sound": audio_only,
    "missing": lambda folder: folder / "missing.mp4",
}
ODD = {
    "one": lambda folder: Path(write(folder / "one.mp4", noise(3, frames=1))),
    "size": lambda folder: Path(write(folder / "size.mp4", noise(4, height=38, width=86))),
    "turned": lambda folder: Path(write(folder / "turned.mp4", noise(5), rotation=90)),
    "uneven": lambda folder: Path(
        write(folder / "uneven.mp4", noise(6), times=[33 * n + 11 * (n % 3) for n in range(24)])
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A list in which every tenth video is odd, broken or has flipped bits."""
    folder = tmp_path_factory.mktemp("data")
    models = folder / "models"
    models.mkdir()
    good = [write(models / f"{i}.mp4", noise(10 + i)) for i in range(8)]
    special = [(kind, make(models)) for kind, make in (BROKEN | ODD | {"flipped": flipped}).items()]
    lines = []
    for number in range(VIDEOS):
        kind, source = "good", Path(good[number % 8])
        if number % 10 == 0:
            kind, source = special[number // 10 % len(special)]
        name = f"{kind}{number}.mp4"
        if source.exists():
            shutil.copy(source, folder / name)
        lines.append(f"{name} {number % 4}\n")
    for name in ("train.csv", "val.csv", "test.csv"):
        (folder / name).write_text("".join(lines))
    (folder / "labels.txt").write_text("a\nb\nc\nd\n")
    return folder


def names(kinds, files):
    return {name for name in files if re.sub(r"\d+\.mp4", "", name) in kinds}


def config(data, **changes):
    # 22 steps of 24 clips: every video at least once.
    recipe = {"epochs": 1.1, "batch": 24, "eval.batch": 24, "eval.every_epochs": 0.0}
    return tiny.config(data, **recipe, **changes)


def test_broken_videos_are_replaced_in_training_and_skipped_in_tests(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.train(config(data), str(run)) == 0
    log = capsys.readouterr().out
    reported = set(re.findall(r"(\w+\.mp4) cannot be decoded", log))
    assert len(names(BROKEN, reported)) == len(BROKEN) * EACH  # an epoch reads each video once
    assert reported == names([*BROKEN, "flipped"], reported)
    (count,) = re.findall(r"(\d+) of the 500 videos could not be decoded and were replaced", log)
    assert int(count) == len(reported)

    status, output = commands.run("evaluate", f"--workdir={run}")
    assert status == 0, output
    result = json.loads((run / "evaluation.json").read_text())
    left_out = {Path(sentence.split(": ")[0]).name for sentence in result["left_out"]}
    assert names(BROKEN, left_out) == names(BROKEN, reported)
    assert left_out == names([*BROKEN, "flipped"], left_out)
    assert result["videos"] == VIDEOS - len(left_out)
    assert str(result["videos"]) in output
    tested = (run / "videos.csv").read_text().splitlines()[1:]
    assert len(tested) == result["videos"]
    assert not {Path(line.split(",")[0]).name for line in tested} & left_out
    scores = np.load(run / "scores.npz")
    assert scores["tested"].sum() == result["videos"]
    right = scores["probabilities"].argmax(1) == scores["labels"]
    assert 100 * right[scores["tested"]].mean() == pytest.approx(result["top1"])


def test_too_many_broken_videos_end_the_run_with_a_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    strict = config(data, **{"data.max_broken": 0.02})
    with pytest.raises(UserError, match=r"listed files are missing|files are missing") as missing:
        train.train(config(data, **{"data.max_broken": 0.005}), str(run))
    assert "\n" not in str(missing.value)
    with pytest.raises(UserError, match=r"\d+ of \d+ clips were replaced .*max_broken=0\.02"):
        train.train(strict, str(run))
    saved = [int(child.name) for child in (run / "checkpoints").iterdir() if child.name.isdigit()]
    assert saved and 0 < max(saved) < 22
    with pytest.raises(UserError, match=r"of the 500 videos .*max_broken=0\.02"):
        scoring.score(strict, run, build.videos(strict, "test"), which="last")
    # With a higher limit the same command resumes.
    assert train.train(config(data), str(run)) == 0
