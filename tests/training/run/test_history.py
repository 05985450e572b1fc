import contextlib
import json

import pytest
from etils import epath

from mvit_jax.training.run import history

TRAIN = {"loss": 1.0, "accuracy": 50.0, "grad_norm": 2.0, "learning_rate": 1e-3}


def write(folder, *lines):
    """Lines as one start of the program writes them: (kind, step, loss or top-1)."""
    with contextlib.closing(history.Writer(folder)) as writer:
        for kind, step, number in lines:
            values = {"train": TRAIN | {"loss": number}, "val": {"top1": number, "top5": 100.0}}
            writer.line(kind, step, values.get(kind, {}))


def losses(folder):
    return [(line["step"], line["loss"]) for line in history.read(folder).train]


def test_a_folder_without_a_history_has_an_empty_one(tmp_path):
    assert not history.read(tmp_path)
    assert history.read(tmp_path).seconds == 0


def test_a_start_from_an_earlier_step_takes_back_what_was_after_it(tmp_path):
    """Killed at 70 with a checkpoint of 30; done again with another log interval up to 55."""
    write(tmp_path, ("start", 0, 0), ("train", 20, 5.0), ("train", 40, 4.0), ("val", 30, 10.0),
          ("val", 60, 20.0), ("train", 60, 3.0))  # fmt: skip
    write(tmp_path, ("start", 30, 0), ("train", 40, 3.9), ("train", 50, 3.5))
    told = history.read(tmp_path)
    assert losses(tmp_path) == [(20, 5.0), (40, 3.9), (50, 3.5)]
    assert [line["step"] for line in told.val] == [30]
    assert [line["step"] for line in told.starts] == [0, 30]


@pytest.mark.parametrize("cut", [1, 5, 20, 60, -2, -1])
def test_a_kill_in_the_middle_of_a_line_costs_that_line_alone(tmp_path, cut):
    write(tmp_path, ("start", 0, 0), ("train", 20, 5.0), ("train", 40, 4.0))
    path = tmp_path / history.NAME
    *whole, last, _ = path.read_text().split("\n")
    # The whole line without its end is no torn one.
    kept = [(20, 5.0)] + ([(40, 4.0)] if cut == -1 else [])
    path.write_text("\n".join([*whole, last if cut == -1 else last[:cut]]))
    assert losses(tmp_path) == kept
    write(tmp_path, ("start", 40 if cut == -1 else 20, 0), ("train", 60, 3.0))
    assert losses(tmp_path) == [*kept, (60, 3.0)]
    assert len(history.read(tmp_path).starts) == 2


def test_lines_that_are_no_entries_are_passed_over(tmp_path):
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


def test_the_time_trained_is_that_of_all_starts_without_the_pauses(tmp_path):
    def line(kind, step, time):
        return json.dumps({"kind": kind, "step": step, "time": time} | TRAIN) + "\n"

    (tmp_path / history.NAME).write_text(
        line("start", 0, 1000.0) + line("train", 20, 1030.0) + line("train", 40, 1050.0)
        + line("start", 20, 9000.0) + line("train", 40, 9025.5)
    )  # fmt: skip
    assert history.read(tmp_path).seconds == 50 + 25.5


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = history.Writer(tmp_path)
    writer.line("train", 20, TRAIN)
    assert losses(tmp_path) == [(20, 1.0)]
    writer.close()


def timed(kind, at, /, **spent):
    """A line as a start writes it, with the seconds of some phases."""
    values = TRAIN if kind == "train" else {"top1": 1.0, "top5": 1.0} if kind == "val" else {}
    return {"kind": kind, "step": at, "time": 1000.0 + at} | values | {"spent": spent}


def account(folder, *lines):
    (folder / history.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = history.read(folder)
    return told, {name: seconds for name, seconds in told.spent.items() if seconds}


def test_goodput_of_one_start_is_the_share_of_its_steps(tmp_path):
    told, spent = account(
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
    assert told.goodput == 0.6
    said = history.goodput_sentence(told)
    assert said == (
        "goodput 60.0 % of 100 s in 1 start went into steps that count; start 10.0 %, "
        "compile 10.0 %, checkpoint 10.0 %, data 5.0 %, validation 4.0 %, rest 1.0 %"
    )


def test_steps_that_a_kill_makes_a_later_start_repeat_do_not_count(tmp_path):
    """Saved at 30, killed after the line of step 60: of the steps 21 to 40 half count, of 41 to 60
    none; those that are done again count once."""
    told, spent = account(
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
    assert told.goodput == 29 / 51


def test_a_kill_can_take_back_what_an_earlier_kill_had_left(tmp_path):
    """Starts at 0, 40 and 20: of the first start only the steps up to 20 count in the end."""
    told, spent = account(
        tmp_path,
        timed("start", 0),
        timed("train", 50, step=50.0),
        timed("start", 40),
        timed("train", 60, step=20.0),
        timed("start", 20),
        timed("train", 100, step=80.0),
    )
    assert spent == {"step": 20 + 80, "repeated": 30 + 20}
    assert told.goodput == 100 / 150


def test_a_stop_between_two_lines_loses_nothing(tmp_path):
    """SIGTERM at step 47 saves there, and the last line tells of the seven steps."""
    _, spent = account(
        tmp_path,
        timed("start", 0),
        timed("train", 40, step=40.0),
        timed("end", 47, step=7.0, checkpoint=1.0),
        timed("start", 47),
        timed("train", 60, step=13.0),
        timed("end", 60, step=0.5),
    )
    assert spent == {"step": 60.5, "checkpoint": 1}


def test_steps_that_a_rollback_undid_do_not_count(tmp_path):
    """At step 50 the weights went back to those of step 30: of 60 steps 40 are in them."""
    told, spent = account(
        tmp_path,
        timed("start", 0),
        timed("train", 40, step=40.0),
        timed("rollback", 50, step=10.0, checkpoint=2.0) | {"to": 30},
        timed("train", 60, step=10.0),
    )
    assert spent == {"step": 30 + 10, "repeated": 10 + 10, "checkpoint": 2}
    assert told.goodput == 40 / 62 and [line["step"] for line in told.train] == [40, 60]


def test_a_history_without_times_has_no_goodput(tmp_path):
    write(tmp_path, ("start", 0, 0), ("train", 20, 1.5))
    told = history.read(tmp_path)
    assert told.spent == {} and told.goodput is None and history.goodput_sentence(told) is None
    # Of a run that goes on with a newer program, what is known counts.
    writer = history.Writer(tmp_path)
    writer.line("start", 20, {"spent": {"start": 1.0}})
    writer.line("train", 40, TRAIN | {"spent": {"step": 3.0, "unknown": 5.0, "data": "much"}})
    writer.close()
    assert history.read(tmp_path).goodput == 0.75


def test_in_a_bucket_old_lines_stay_and_a_normal_end_loses_none(tmp_path):
    write(epath.Path(tmp_path), ("start", 0, 0), ("train", 20, 5.0), ("train", 40, 4.0))
    path = tmp_path / history.NAME
    path.write_bytes(path.read_bytes() + b'{"kind": "tra')  # as another program may leave it
    write(epath.Path(tmp_path), ("start", 40, 0), ("train", 60, 3.0), ("val", 60, 50.0))
    assert losses(tmp_path) == [(20, 5.0), (40, 4.0), (60, 3.0)]
    assert [line["step"] for line in history.read(tmp_path).starts] == [0, 40]
    told = history.read(epath.Path(tmp_path))
    assert told.train == history.read(tmp_path).train and len(told.val) == 1


def test_in_a_bucket_a_kill_costs_the_last_lines(tmp_path):
    writer = history.Writer(epath.Path(tmp_path))
    writer.line("start", 0, {})
    writer.line("train", 20, TRAIN)
    del writer  # without an end
    assert [line["step"] for line in history.read(tmp_path).starts] == [0]
    assert losses(tmp_path) == []


def test_in_a_bucket_little_time_goes_into_writing(tmp_path, monkeypatch):
    """A line each second for an hour: a write may not come sooner than its share allows."""
    clock = [0.0]
    monkeypatch.setattr(history.time, "monotonic", lambda: clock[0])
    path = epath.Path(tmp_path) / "text"
    write_bytes, writes = type(path).write_bytes, []

    def slow(path, content):  # a second
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
