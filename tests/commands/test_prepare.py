"""`python -m mvit_jax.prepare` as a program: output, exit status, and interrupted runs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mvit_jax.data.making import moving_digits
from tests.data.making.test_moving_digits import contents
from tests.support import commands
from tests.support.tiny import ROOT

COUNTS = ("--train_videos=16", "--val_videos=8", "--test_videos=8")


def start(*args, **options):
    command = [sys.executable, "-m", "mvit_jax.prepare", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, **options)


def test_a_data_set_is_written_with_progress_in_plain_lines(tmp_path):
    flags = ["moving_digits", f"--out={tmp_path / 'set'}", *COUNTS]
    status, output = commands.fresh("prepare", *flags)
    assert status == 0, output
    message, *lines = output.splitlines()
    assert message == f"moving_digits is in {tmp_path / 'set'}"
    assert len(lines) == 10 and lines[-1] == "moving_digits: 32 of 32 videos"
    assert "\r" not in output
    assert len((tmp_path / "set" / "train.csv").read_text().splitlines()) == 16
    assert commands.run("prepare", *flags) == (0, f"{message}\n")
    status, output = commands.run("prepare", *flags, "--seed=1")
    assert status == 1 and output.count("\n") == 1
    assert output.startswith("error: ") and "seed=0, not seed=1" in output


@pytest.mark.slow
def test_a_killed_run_leaves_complete_files_and_resumes(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    counts = ("--train_videos=64", "--val_videos=8", "--test_videos=8")
    process = start("moving_digits", f"--out={killed}", *counts, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(killed.glob("videos/*/*.mp4"))) < 5:
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = contents(killed)
    assert "labels.txt" not in left and "train.csv" not in left

    moving_digits.prepare(whole, train_videos=64, val_videos=8, test_videos=8)
    expected = contents(whole)
    finals = {name: content for name, content in left.items() if "/." not in f"/{name}"}
    assert finals.items() <= expected.items()
    assert commands.run("prepare", "moving_digits", f"--out={killed}", *counts)[0] == 0
    assert contents(killed) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out=there"], "give one of moving_digits, moving_scenes"),
        (["videos", "--out=there"], "give --csv=FILE"),
        (["videos", "--csv=there.csv"], "give --out=DIR"),
        (["videos", "--csv=there.csv", "--out=there"], "there is no list "),
        (["videos", "--csv=there.csv", "--out=there", "--gop=0"], "gop=0"),
        (["videos", "--csv=there.csv", "--out=there", "--", "runner"], "'runner' is not a flag"),
        (["moving_digits", "--out=there", "--crf=3"], "--crf applies only to videos: leave it out"),
        (
            ["moving_digits", "--out=there", "--workers=3"],
            "--workers applies only to videos and check",
        ),
        (["check"], "give its folder, as in prepare check DIR"),
        (["check", "there"], "there is no data folder"),
        (["check", "configs"], "neither manifests of shards nor lists"),
        (["moving_pictures", "--out=there"], "'moving_pictures' is not a data set or task"),
        (["moving_digits", "twice", "--out=there"], "'moving_digits twice' is not a data set"),
        (["moving_digits"], "give --out=DIR"),
        (["moving_digits", "--out="], "give --out=DIR"),
        (["moving_digits", "--out=gs://bucket/x"], "gs://bucket/x is not a local path"),
        (["fashion_mnist"], "give --out=DIR"),
        (["fashion_mnist", "--out=there", "--files=nowhere"], "there is no file nowhere/train-"),
        (["fashion_mnist", "--out=there", "--seed=1"], "--seed applies only to moving_digits"),
        (["lists", "--out=there"], "there is no folder there"),
        (["lists", "--out=configs"], "holds 0 folders with videos"),
        (["lists", "--out=there", "--val=0.6", "--test=0.5"], "leave a share for training"),
        (["moving_digits", "--out=there", "--files=x"], "--files applies only to fashion_mnist"),
    ],
)
def test_bad_flags_end_with_a_one_sentence_error(args, message):
    status, output = commands.run("prepare", *args)
    assert status == 1
    assert output.startswith("error: ") and message in output
    assert output.count("\n") == 1
    assert not (ROOT / "there").exists()


def test_lists_are_written_for_folders_of_classes(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(10):
            (tmp_path / name / f"{number}.mp4").touch()
    status, output = commands.run("prepare", "lists", f"--out={tmp_path}", "--val=0.2")
    assert status == 0, output
    counts = f"14 files in train.csv, 4 files in val.csv, 2 files in test.csv, in {tmp_path}"
    assert output.strip().endswith(counts)
    assert (tmp_path / "labels.txt").read_text() == "cats\ndogs\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve small videos of random noise, one of them broken, and their list."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for number in range(12):
        frames = rng.integers(0, 256, (100, 128, 128), dtype=np.uint8)
        (folder / f"{number}.mp4").write_bytes(moving_digits.encode(frames))
    (folder / "7.mp4").write_text("404 Not Found")
    lines = "".join(f"{number}.mp4 {number % 3}\n" for number in range(12))
    (folder / "train.csv").write_text(lines)
    (folder / "labels.txt").write_text("a\nb\nc\n")
    return folder


def packing(videos, out, workers):
    csv = f"--csv={videos / 'train.csv'}"
    return ["videos", "--shards=12", csv, f"--out={out}", f"--workers={workers}"]


@pytest.mark.parametrize(
    "kills",
    [pytest.param((2,), marks=pytest.mark.slow), pytest.param((2, 5), marks=pytest.mark.nightly)],
)
def test_packing_resumes_after_kills_with_equal_bytes(kills, videos, tmp_path):
    """One worker, and two workers with all of their processes killed: equal bytes."""
    one, killed = tmp_path / "one", tmp_path / "killed"
    process = start(*packing(videos, one, 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = (stream.decode() for stream in process.communicate(timeout=300))
    assert process.returncode == 0, err
    assert "left out 7.mp4: it is not a video" in err
    assert out.splitlines() == [f"11 of 12 videos are in 12 shards in {one}"]
    assert "train: 12 of 12 videos" in err and "WARNING" not in err

    for done in kills:
        process = start(
            *packing(videos, killed, 2), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and len(list(killed.glob("*.array_record"))) < done:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = contents(killed)
        whole = {name: left[name] for name in left if name.endswith(".array_record")}
        assert done <= len(whole) < 12 and whole.items() <= contents(one).items()
    # A kill may hit while the note of a finished shard is being written.
    (killed / "..train-00000-of-00012.array_record.json.738").touch()
    status, output = commands.fresh("prepare", *packing(videos, killed, 2))
    assert status == 0, output
    assert contents(killed) == contents(one)

    status, output = commands.run("prepare", "check", killed)
    assert status == 0 and output.startswith("train: 11 videos, 0 problems\n")
    (killed / "train-00003-of-00012.array_record").unlink()
    status, output = commands.run("prepare", "check", killed, "--split=train")
    assert status == 1 and "00003-of-00012.array_record, which" in output
    assert output.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_an_error(videos, tmp_path):
    process = start(*packing(videos, tmp_path, 2), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".*.progress")):
        time.sleep(0.002)
    tasks = pathlib.Path(f"/proc/{process.pid}/task").iterdir()
    workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: a worker died (return code -9)")


def test_a_dead_worker_ends_the_run_while_beam_blocks():
    """Also in the background job of a shell script, which ignores SIGINT."""
    code = """if True:
        import signal, threading, time
        from mvit_jax.data.making import packing

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        started = threading.Event()

        def worker():
            started.wait()
            raise RuntimeError("Worker subprocess exited with return code -9")

        with packing._dead_workers(patience=3):
            threading.Thread(target=worker).start()
            while True:
                try:
                    started.set()
                    while True:  # a signal just before a sleep would not end it
                        time.sleep(0.05)
                except KeyboardInterrupt:
                    print("interrupted", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stdout == "interrupted\n"
    assert done.stderr.startswith("error: a worker died (return code -9)")
