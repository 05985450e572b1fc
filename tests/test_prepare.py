"""`python -m mvit_jax.prepare` as people run it: in a process of its own."""

import os
import pathlib
import pty
import subprocess
import sys
import termios
import time

import pytest

from mvit_jax.data import moving_digits

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = ("--train_videos=16", "--val_videos=8", "--test_videos=8")


def command(*args):
    return [sys.executable, "-m", "mvit_jax.prepare", *map(str, args)]


def run(*args):
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=120)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_data_set_is_made_with_progress_in_plain_lines(tmp_path):
    result = run("moving_digits", f"--out={tmp_path / 'set'}", *COUNTS)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "set") in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 10 and lines[-1] == "moving_digits: 32 of 32 videos"
    assert "\r" not in result.stderr
    assert len((tmp_path / "set" / "train.csv").read_text().splitlines()) == 16

    again = run("moving_digits", f"--out={tmp_path / 'set'}", *COUNTS)
    assert again.returncode == 0 and again.stderr == ""

    other = run("moving_digits", f"--out={tmp_path / 'set'}", "--seed=1", *COUNTS)
    assert other.returncode == 1
    assert other.stderr.startswith("error: ") and "seed=0, not seed=1" in other.stderr
    assert "Traceback" not in other.stderr


def test_on_a_terminal_progress_is_a_bar(tmp_path):
    terminal, process_side = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(
        command("moving_digits", f"--out={tmp_path / 'set'}", *COUNTS),
        cwd=ROOT,
        stderr=process_side,
    )
    os.close(process_side)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux ends a terminal that nobody writes to
        pass
    assert process.wait(timeout=60) == 0
    assert b"32/32" in shown and b"\r" in shown


def test_a_killed_run_leaves_whole_files_and_is_gone_on_with(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    counts = ("--train_videos=64", "--val_videos=8", "--test_videos=8")
    process = subprocess.Popen(
        command("moving_digits", f"--out={killed}", *counts), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(killed.glob("videos/*/*.mp4"))) < 5:
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = contents(killed)
    assert "labels.txt" not in left and "train.csv" not in left

    moving_digits.prepare(whole, train_videos=64, val_videos=8, test_videos=8)
    expected = contents(whole)
    finals = {name: content for name, content in left.items() if not name.endswith(".part")}
    assert finals.items() <= expected.items()
    assert run("moving_digits", f"--out={killed}", *counts).returncode == 0
    assert contents(killed) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out=there"], "give one of moving_digits, fashion_mnist"),
        (["moving_pictures", "--out=there"], "'moving_pictures' is not the name of a data set"),
        (["moving_digits", "twice", "--out=there"], "'moving_digits twice' is not the name"),
        (["moving_digits"], "give --out=DIR"),
        (["moving_digits", "--out="], "give --out=DIR"),
        (["fashion_mnist"], "give --out=DIR"),
        (["fashion_mnist", "--out=there", "--files=nowhere"], "there is no file nowhere/train-"),
        (["fashion_mnist", "--out=there", "--seed=1"], "--seed is for moving_digits: leave it out"),
        (["moving_digits", "--out=there", "--files=x"], "--files is for fashion_mnist: leave it"),
    ],
)
def test_bad_input_ends_with_one_sentence(args, message):
    result = run(*args)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (ROOT / "there").exists()


def test_help_tells_usage_and_flags():
    text = run("--help").stdout
    assert "python -m mvit_jax.prepare moving_digits --out=DIR" in text
    for flag in ("--out", "--seed", "--train_videos", "--val_videos", "--test_videos", "--files"):
        assert flag + ":" in text
