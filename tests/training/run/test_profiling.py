"""Traces of training steps: the traced steps and the content of the file."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mvit_jax import train
from mvit_jax.training.run.profiling import Profile, window
from tests.support import tiny


def run(profile, *numbers):
    """Runs steps that compute something."""
    add = jax.jit(lambda x: x + 1)
    for number in numbers:
        with profile.step(number):
            assert (add(jnp.ones(3)) == 2).all()


@pytest.mark.parametrize(
    ("window", "start", "steps", "expected"),
    [
        ((10, 15), 0, 400, [10, 11, 12, 13, 14, 15]),
        ((10, 15), 100, 400, [110, 111, 112, 113, 114, 115]),  # a resumed run
        ((3, 3), 0, 400, [3]),
        ((1, 2), 0, 400, [1, 2]),  # an explicit window with the compilation
        ((10, 15), 0, 12, [7, 8, 9, 10, 11, 12]),  # runs that end earlier
        ((10, 15), 0, 4, [2, 3, 4]),
        ((10, 15), 396, 400, [398, 399, 400]),
        ((10, 15), 0, 1, [1]),
        (None, 0, 400, []),
    ],
)
def test_a_window_counts_from_the_first_step_and_ends_with_the_run(window, start, steps, expected):
    assert list(Profile("unused", window, start=start, steps=steps, log=print)._steps) == expected


def test_windows_are_parsed():
    assert window("10:15") == (10, 15) and window("7:7") == (7, 7)
    for text in ("10", "0:3", "5:3", "a:b", "", "1:2:3", "-1:2"):
        with pytest.raises(ValueError, match="is not a range of steps"):
            window(text)


def read_trace(folder):
    [file] = folder.glob("plugins/profile/*/*.xplane.pb")  # the path that TensorBoard reads
    return jax.profiler.ProfileData.from_file(str(file)), file.read_bytes()


def traced_steps(data):
    """Returns the numbers of the steps in a trace."""
    return sorted(
        int(dict(event.stats)["step_num"])
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )


@pytest.mark.slow
def test_a_run_writes_a_trace_with_names_of_steps_stages_and_blocks(digits, tmp_path, capsys):
    config = tiny.config(digits, **{"epochs": 1.0, "eval.every_epochs": 0.0})
    assert train.train(config, str(tmp_path / "run"), (10, 11)) == 0  # of 3 steps the last two
    data, content = read_trace(tmp_path / "run" / "profile")
    assert traced_steps(data) == [2, 3]
    blocks = (b"jvp(stage0/block0)/", b"transpose(jvp(stage1/block1))/")
    for name in (*blocks, b"/augment/", b"/jvp(loss)/", b"/optimizer/"):
        assert name in content, name
    lines = [line for line in capsys.readouterr().out.splitlines() if "traced" in line]
    assert len(lines) == 1
    assert re.search(r"traced steps 2 to 3 into .*run/profile: open it", lines[0])


def test_a_trace_is_written_if_the_run_is_interrupted(tmp_path, capsys):
    with (
        pytest.raises(KeyboardInterrupt),
        Profile(tmp_path, (1, 9), start=4, steps=100, log=print) as profile,
    ):
        run(profile, 5, 6)
        raise KeyboardInterrupt
    data, _ = read_trace(tmp_path / "profile")
    assert traced_steps(data) == [5, 6]
    assert "traced steps 5 to 6" in capsys.readouterr().out


def test_training_continues_without_a_trace_while_another_is_active(tmp_path, capsys):
    with (
        jax.profiler.trace(tmp_path / "other"),
        Profile(tmp_path, (1, 2), start=0, steps=9, log=print) as profile,
    ):
        run(profile, 1, 2)
    assert capsys.readouterr().out.count("no trace: ") == 1


def test_a_trace_of_a_run_in_a_bucket_is_copied_to_the_bucket(tmp_path):
    messages = []
    with Profile(epath.Path(tmp_path), (1, 2), start=0, steps=2, log=messages.append) as profile:
        run(profile, 1, 2)
    assert len(messages) == 1 and f"into {tmp_path}/profile" in messages[0]
    assert traced_steps(read_trace(tmp_path / "profile")[0]) == [1, 2]
    assert profile._here is not None and not Path(profile._here.name).exists()


def test_training_continues_if_a_trace_cannot_be_written(tmp_path, capsys):
    (tmp_path / "profile").write_text("in the way")
    with Profile(tmp_path, (1, 1), start=0, steps=9, log=print) as profile:
        run(profile, 1, 2)
    assert "could not be written" in capsys.readouterr().out
