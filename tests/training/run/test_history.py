import contextlib
import json

import pytest
from etils import epath

from mvit_jax.training.run import history

TRAIN = {"loss": 1.0, "accuracy": 50.0, "grad_norm": 2.0, "learning_rate": 1e-3}


def write(folder, *lines):
    """Writes the lines of one start of the program: (kind, step, loss or top-1)."""
    with contextlib.closing(history.Writer(folder)) as writer:
        for kind, step, number in lines:
            values = {"train": TRAIN | {"loss": number}, "val": {"top1": number, "top5": 100.0}}
            writer.line(kind, step, values.get(kind, {}))


def losses(folder):
    return [(line["step"], line["loss"]) for line in history.read(folder).train]


def test_a_folder_without_a_history_file_has_an_empty_history(tmp_path):
    assert not history.read(tmp_path)
    assert history.read(tmp_path).seconds == 0


def test_a_start_from_an_earlier_step_discards_later_lines(tmp_path):
    """A kill at step 70, a checkpoint of step 30, a second start with another log interval."""
    write(tmp_path, ("start", 0, 0), ("train", 20, 5.0), ("train", 40, 4.0), ("val", 30, 10.0),
          ("val", 60, 20.0), ("train", 60, 3.0))  # fmt: skip
    write(tmp_path, ("start", 30, 0), ("train", 40, 3.9), ("train", 50, 3.5))
    run = history.read(tmp_path)
    assert losses(tmp_path) == [(20, 5.0), (40, 3.9), (50, 3.5)]
    assert [line["step"] for line in run.val] == [30]
    assert [line["step"] for line in run.starts] == [0, 30]


@pytest.mark.parametrize("cut", [1, 5, 20, 60, -2, -1])
def test_a_kill_in_the_middle_of_a_line_loses_that_line_alone(tmp_path, cut):
    write(tmp_path, ("start", 0, 0), ("train", 20, 5.0), ("train", 40, 4.0))
    path = tmp_path / history.NAME
    *whole, last, _ = path.read_text().split("\n")
    # A line that lacks only its line break is complete.
    expected = [(20, 5.0)] + ([(40, 4.0)] if cut == -1 else [])
    path.write_text("\n".join([*whole, last if cut == -1 else last[:cut]]))
    assert losses(tmp_path) == expected
    write(tmp_path, ("start", 40 if cut == -1 else 20, 0), ("train", 60, 3.0))
    assert losses(tmp_path) == [*expected, (60, 3.0)]
    assert len(history.read(tmp_path).starts) == 2


def test_invalid_lines_are_ignored(tmp_path):
    write(tmp_path, ("start", 0, 0), ("train", 20, 5.0))
    path = tmp_path / history.NAME
    strange = [
        b"\0\0\0", b"\xff\xfe", b"", b"[]", b"3", b'"train"', b"{}",
        b'{"kind": "train", "step": 30, "time": 1}', b'{"kind": "other", "step": 30, "time": 1}',
        json.dumps({"kind": "train", "step": "30", "time": 1} | TRAIN).encode(),
        json.dumps({"kind": "train", "step": 30, "time": None} | TRAIN).encode(),
    ]  # fmt: skip
    path.write_bytes(path.read_bytes() + b"\n".join(strange) + b"\n")
    assert losses(tmp_path) == [(20, 5.0)]


def test_training_time_excludes_pauses_between_starts(tmp_path):
    def line(kind, step, time):
        return json.dumps({"kind": kind, "step": step, "time": time} | TRAIN) + "\n"

    (tmp_path / history.NAME).write_text(
        line("start", 0, 1000.0) + line("train", 20, 1030.0) + line("train", 40, 1050.0)
        + line("start", 20, 9000.0) + line("train", 40, 9025.5)
    )  # fmt: skip
    assert history.read(tmp_path).seconds == 50 + 25.5


def test_every_line_is_flushed_to_disk(tmp_path):
    writer = history.Writer(tmp_path)
    writer.line("train", 20, TRAIN)
    assert losses(tmp_path) == [(20, 1.0)]
    writer.close()


def timed(kind, at, /, **spent):
    """Returns a line of the history with the seconds of some phases."""
    values = TRAIN if kind == "train" else {"top1": 1.0, "top5": 1.0} if kind == "val" else {}
    return {"kind": kind, "step": at, "time": 1000.0 + at} | values | {"spent": spent}


def read_spent(folder, *lines):
    (folder / history.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = history.read(folder)
    return run, {name: seconds for name, seconds in run.spent.items() if seconds}


def test_goodput_of_one_start_is_the_share_of_its_steps(tmp_path):
    run, spent = read_spent(
        tmp_path,
        timed("start", 0, start=8.0),
        timed("train", 20, start=2.0, compile=10.0, step=20.0, data=5.0),
        timed("train", 40, step=40.0, validation=4.0, rest=1.0),
        timed("end", 40, checkpoint=10.0),
    )
    assert spent == {
        "start": 10, "compile": 10, "step": 60, "data": 5, "validation": 4, "rest": 1,
        "checkpoint": 10,
    }  # fmt: skip
    assert run.goodput == 0.6
    sentence = history.goodput_sentence(run)
    assert sentence == (
        "goodput 60.0 %: this share of 100 s in 1 start went into training steps that were not "
        "repeated; other phases: start 10.0 %, "
        "compile 10.0 %, checkpoint 10.0 %, data 5.0 %, validation 4.0 %, rest 1.0 %"
    )


def test_steps_repeated_after_a_kill_count_once(tmp_path):
    """A checkpoint of step 30 and a kill after the line of step 60.

    Half of the steps 21 to 40 count, and none of the steps 41 to 60. Repeated steps count once.
    """
    run, spent = read_spent(
        tmp_path,
        timed("start", 0, start=1.0),
        timed("train", 20, step=10.0),
        timed("train", 40, step=10.0),
        timed("train", 60, step=10.0),
        timed("start", 30, start=2.0),
        timed("train", 40, step=5.0, compile=3.0),
        timed("train", 60, step=9.0),
        timed("end", 60, checkpoint=1.0),
    )
    steps = {"step": 10 + 5 + 5 + 9, "repeated": 5 + 10}
    assert spent == steps | {"start": 3, "compile": 3, "checkpoint": 1}
    assert run.goodput == 29 / 51


def test_a_second_kill_discards_steps_that_survived_the_first(tmp_path):
    """Starts at 0, 40 and 20: only the first 20 steps of the first start count."""
    run, spent = read_spent(
        tmp_path,
        timed("start", 0),
        timed("train", 50, step=50.0),
        timed("start", 40),
        timed("train", 60, step=20.0),
        timed("start", 20),
        timed("train", 100, step=80.0),
    )
    assert spent == {"step": 20 + 80, "repeated": 30 + 20}
    assert run.goodput == 100 / 150


def test_a_stop_between_two_lines_loses_no_time(tmp_path):
    """SIGTERM at step 47 saves a checkpoint; the last line has the time of seven steps."""
    _, spent = read_spent(
        tmp_path,
        timed("start", 0),
        timed("train", 40, step=40.0),
        timed("end", 47, step=7.0, checkpoint=1.0),
        timed("start", 47),
        timed("train", 60, step=13.0),
        timed("end", 60, step=0.5),
    )
    assert spent == {"step": 60.5, "checkpoint": 1}


def test_rolled_back_steps_do_not_count(tmp_path):
    """A rollback from step 50 to step 30: 40 of 60 steps count."""
    run, spent = read_spent(
        tmp_path,
        timed("start", 0),
        timed("train", 40, step=40.0),
        timed("rollback", 50, step=10.0, checkpoint=2.0) | {"to": 30},
        timed("train", 60, step=10.0),
    )
    assert spent == {"step": 30 + 10, "repeated": 10 + 10, "checkpoint": 2}
    assert run.goodput == 40 / 62 and [line["step"] for line in run.train] == [40, 60]


def test_a_history_without_times_has_no_goodput(tmp_path):
    write(tmp_path, ("start", 0, 0), ("train", 20, 1.5))
    run = history.read(tmp_path)
    assert run.spent == {} and run.goodput is None and history.goodput_sentence(run) is None
    # A newer program resumes the run: its valid seconds count.
    writer = history.Writer(tmp_path)
    writer.line("start", 20, {"spent": {"start": 1.0}})
    writer.line("train", 40, TRAIN | {"spent": {"step": 3.0, "unknown": 5.0, "data": "much"}})
    writer.close()
    assert history.read(tmp_path).goodput == 0.75


def test_a_history_in_a_bucket_keeps_the_lines_of_all_starts(tmp_path):
    write(epath.Path(tmp_path), ("start", 0, 0), ("train", 20, 5.0), ("train", 40, 4.0))
    path = tmp_path / history.NAME
    path.write_bytes(path.read_bytes() + b'{"kind": "tra')  # a line cut off by another program
    write(epath.Path(tmp_path), ("start", 40, 0), ("train", 60, 3.0), ("val", 60, 50.0))
    assert losses(tmp_path) == [(20, 5.0), (40, 4.0), (60, 3.0)]
    assert [line["step"] for line in history.read(tmp_path).starts] == [0, 40]
    run = history.read(epath.Path(tmp_path))
    assert run.train == history.read(tmp_path).train and len(run.val) == 1


def test_a_kill_loses_the_last_lines_of_a_history_in_a_bucket(tmp_path):
    writer = history.Writer(epath.Path(tmp_path))
    writer.line("start", 0, {})
    writer.line("train", 20, TRAIN)
    del writer  # without an end
    assert [line["step"] for line in history.read(tmp_path).starts] == [0]
    assert losses(tmp_path) == []


def test_writes_to_a_bucket_take_a_limited_share_of_the_time(tmp_path, monkeypatch):
    """A line each second for an hour; a write to the bucket takes one second."""
    clock = [0.0]
    monkeypatch.setattr(history.time, "monotonic", lambda: clock[0])
    path = epath.Path(tmp_path) / "text"
    write_bytes, writes = type(path).write_bytes, []

    def slow(path, content):  # one second
        clock[0] += 1.0
        writes.append(clock[0])
        write_bytes(path, content)

    monkeypatch.setattr(type(path), "write_bytes", slow)
    text = history.ObjectFile(path)
    for second in range(3600):
        clock[0] += 1.0
        text.write(f"{second}\n")
        text.flush()
    assert len(writes) / clock[0] <= text.SHARE * 1.05
    assert len(writes) > 60
    text.close()
    assert (tmp_path / "text").read_text() == "".join(f"{s}\n" for s in range(3600))
