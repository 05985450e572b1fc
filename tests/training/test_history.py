import json

import pytest

from mvit_jax.training import history

TRAIN = {"loss": 1.0, "accuracy": 50.0, "grad_norm": 2.0, "learning_rate": 1e-3}


def write(folder, *lines):
    """Lines as one start of the program writes them: (kind, step, loss or top-1)."""
    writer = history.Writer(folder)
    for kind, step, number in lines:
        values = {
            "start": {},
            "train": TRAIN | {"loss": number},
            "val": {"top1": number, "top5": 100.0},
        }[kind]
        writer.line(kind, step, values)
    writer.close()


def losses(folder):
    return [(line["step"], line["loss"]) for line in history.read(folder).train]


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, ("start", 0, 0), ("train", 20, 1.5), ("train", 40, 1.25), ("val", 40, 70.0))
    told = history.read(tmp_path)
    assert told and len(told.starts) == 1
    assert losses(tmp_path) == [(20, 1.5), (40, 1.25)]
    assert [(line["step"], line["top1"]) for line in told.val] == [(40, 70.0)]
    assert told.train[0]["learning_rate"] == 1e-3


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
