"""The split of wall time adds up, and blames the input only for what the devices waited for."""

import json
import random
import threading
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from mvit_jax.training.run import goodput, metrics
from tests.support import group
from tests.support.events import read_scalars


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Ends:
    """In place of the thread that waits for steps: they end when they are told to."""

    ended: float | None = None

    def watch(self, arrays):
        self.ended = None

    def last(self):
        return self.ended

    def close(self):
        pass


def spans(clock):
    made = goodput.Spans(clock)
    made._ends = ends = Ends()
    return made, ends


def spent(made):
    return {phase: seconds for phase, seconds in made.lap().items() if seconds}


def test_a_phase_inside_another_is_at_its_expense():
    clock = Clock()
    made, _ = spans(clock)
    clock.sleep(5)
    with made.measure("checkpoint"):
        clock.sleep(1)
        with made.measure("step"):
            clock.sleep(2)
        clock.sleep(4)
    clock.sleep(3)
    assert spent(made) == {"start": 8, "checkpoint": 5, "step": 2}
    clock.sleep(1)
    assert spent(made) == {"start": 1}


def test_whatever_is_measured_adds_up_to_the_wall_time():
    clock, draw = Clock(), random.Random(0)
    made, ends = spans(clock)
    whole = 0.0

    def nest(depth):
        for _ in range(draw.randrange(3)):
            clock.sleep(draw.randrange(8) / 4)
            if depth < 5:
                try:
                    with made.measure(draw.choice(list(goodput.PHASES))):
                        nest(depth + 1)
                        if draw.random() < 0.2:
                            raise KeyError
                except KeyError:
                    pass

    def batches():
        for number in range(20):
            clock.sleep(draw.randrange(8) / 4)
            yield number

    began = clock.now
    for _ in made.waiting(batches()):
        nest(0)
        ends.ended = draw.choice([None, clock.now - 1, clock.now + 1])
        if draw.random() < 0.3:
            whole += sum(made.lap().values())
    assert whole + sum(made.lap().values()) == clock.now - began > 30


@pytest.mark.parametrize(
    ("ends_after", "expected"),
    [
        (None, {"step": 4}),  # still under way when the batch came
        (0, {"data": 4}),  # it had ended before
        (3, {"step": 3, "data": 1}),
    ],
)
def test_only_the_wait_that_the_step_does_not_fill_is_for_data(ends_after, expected):
    clock = Clock()
    made, ends = spans(clock)

    def batches():
        clock.sleep(2)
        yield "first"
        if ends_after is not None:
            ends.ended = clock.now + ends_after
        clock.sleep(4)
        yield "second"

    given = made.waiting(batches())
    assert next(given) == "first"
    assert spent(made) == {"start": 2}
    made.sent("a step")
    assert next(given) == "second"
    assert spent(made) == expected
    clock.sleep(1)
    assert next(given, None) is None
    assert spent(made) == {"rest": 1}


def test_the_end_of_a_step_is_noticed_while_the_host_does_other_things():
    made = goodput.Spans()
    gates = [threading.Event(), threading.Event()]
    for gate in gates:
        computed = SimpleNamespace(block_until_ready=lambda gate=gate: gate.wait(20))
        made.sent({"loss": (computed, jnp.zeros(()))})
        time.sleep(0.05)
        assert made._ends.last() is None
        before = time.monotonic()
        gate.set()
        while made._ends.last() is None and time.monotonic() < before + 10:
            time.sleep(0.001)
        ended = made._ends.last()
        assert ended is not None and before <= ended <= time.monotonic()
    made.close()


METRICS = {
    name: (jnp.float32(2.0), jnp.float32(2.0))
    for name in ("loss", "accuracy", "grad_norm", "param_norm")
} | {"broken": (jnp.float32(0), jnp.float32(8))}


def train(folder, steps, *, wait, work, watch=None):
    """A loop like the training program's, with clips that come `wait` seconds after they are
    wanted and steps that take `work`, both really slept. Returns its seconds, to the last line."""
    began = time.monotonic()
    made = goodput.Spans()
    laps, lap, there = [], made.lap, [began]
    made.lap = lambda: (lap(), laps.append(time.monotonic()))[0]

    class Steps(Ends):
        def watch(self, arrays):
            there[0] = time.monotonic() + work

        def last(self):
            return there[0] if there[0] <= time.monotonic() else None

    made._ends = Steps()

    def batches():
        for number in range(steps):
            if wait or number == 0:  # not even for 0 s, which lets other programs run
                time.sleep(wait if number else 0.05)
            yield number

    log = metrics.Logbook(folder, start=0, steps=steps, batch=8, every=5, spans=made, watch=watch)
    log.begin({"classes": 3})
    for done, _ in enumerate(made.waiting(batches()), start=1):
        with made.measure("compile" if done == 1 else "step"):  # as reading the step before does
            time.sleep(max(there[0] - time.monotonic(), 0))
        log.step(done, METRICS, 0.5)
    log.close()
    return laps[-1] - began


@pytest.mark.parametrize(
    ("wait", "work", "data_share"),
    [(0.1, 0.0, 1.0), (0.0, 0.1, 0.0), (0.05, 0.25, 0.0), (0.3, 0.1, 2 / 3)],
)
def test_slow_clips_and_slow_steps_are_told_apart(tmp_path, wait, work, data_share):
    wall = train(tmp_path, 10, wait=wait, work=work)
    lines = read_lines(tmp_path)
    assert [line["kind"] for line in lines] == ["start", "train", "train", "end"]
    whole = sum(sum(line["spent"].values()) for line in lines)
    assert whole == pytest.approx(wall, rel=0.02, abs=0.02)
    second = lines[2]
    assert second["spent"]["start"] == second["spent"]["compile"] == 0
    assert sum(second["share"].values()) == pytest.approx(1, abs=1e-4)
    used = second["spent"]["data"] + second["spent"]["step"]
    assert second["spent"]["data"] / used == pytest.approx(data_share, abs=0.2)
    assert second["per_step"]["data"] == pytest.approx(second["spent"]["data"] / 5, abs=1e-5)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_the_scalars_by_their_names(tmp_path):
    train(tmp_path, 10, wait=0.01, work=0.01)
    scalars = read_scalars(tmp_path)
    lines = {line["step"]: line for line in read_lines(tmp_path) if line["kind"] == "train"}
    phases = ("start", "compile", "step", "data", "checkpoint", "validation", "rest")
    assert tuple(goodput.PHASES) == phases
    for phase in phases:
        for name, key in (("time_share", "share"), ("time_per_step", "per_step")):
            found = scalars[f"{name}/{phase}"]
            assert found.keys() == lines.keys() == {5, 10}
            for step, value in found.items():
                assert value == pytest.approx(lines[step][key][phase], abs=1e-6)


def seconds(data, step, **others):
    return dict.fromkeys(goodput.PHASES, 0.0) | {"data": data, "step": step} | others


def advice(threads=4, processes=0, **changes):
    known = {"packed": False, "randaugment": False, "cores": 16}
    return goodput.advice(threads, processes, **known | changes)


def watch(**changes):
    load = {"threads": 4, "processes": 0, "packed": False, "randaugment": False, "cores": 16}
    return goodput.InputWatch(**load | changes)


def test_the_first_interval_and_small_waits_say_nothing():
    made = watch()
    for given in (seconds(9.0, 1.0), seconds(1.9, 8.1), seconds(0.0, 0.0, validation=5.0)):
        assert made.sentence(given) is None


def test_a_bottleneck_is_told_once_and_again_when_it_is_much_worse():
    made = watch()
    made.sentence(seconds(0.0, 1.0))
    said = [made.sentence(seconds(share, 1 - share)) for share in (0.3, 0.35, 0.3, 0.45, 0.55, 0.6)]
    assert [s is not None for s in said] == [True, False, False, False, True, False]
    # A validation within the interval hides nothing.
    assert made.sentence(seconds(9.0, 1.0, validation=1000.0)) is not None
    assert "30 % of the time" in str(said[0]) and "55 % of the time" in str(said[4])
    assert "raise data.processes from 0 to 4 (this host has 16 cores)" in str(said[0])


@pytest.mark.parametrize(
    ("threads", "processes", "cores", "words"),
    [
        (4, 0, 112, "raise data.processes from 0 to 28"),
        (4, 2, 16, "raise data.processes from 2 to 4"),
        (4, 0, 6, "raise data.threads from 4 to 6"),
        (3, 2, 8, "raise data.threads from 3 to 4"),
        (0, 0, 8, "raise data.threads from 0 to 8"),
        (0, 2, 8, "raise data.processes from 2 to 8"),
        (2, 0, 2, "with data.processes=0 keep them busy: pack the videos by `python -m"),
        (8, 4, 16, "this host has 16 cores, and data.threads=8"),
        (1, 0, 1, "this host has 1 core, and"),
    ],
)
def test_the_knob_depends_on_the_cores_that_are_left(threads, processes, cores, words):
    said = advice(threads, processes, cores=cores)
    assert words in said
    # What it advises is not advised again.
    if "raise data.processes" in said:
        raised = int(said.split(" to ")[1].split()[0])
        assert max(threads, 1) * raised <= cores and raised > processes


def test_only_what_is_left_to_do_is_advised():
    said = advice(2, packed=True, cores=2)
    assert "pack" not in said and "randaugment" not in said and "raise data.repeats" in said
    assert "make augment.randaugment weaker" in advice(2, randaugment=True, cores=2)


@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_the_log_says_that_the_input_is_slow(tmp_path, capsys, wait):
    train(tmp_path, 20, wait=wait, work=0.02, watch=watch(threads=2, cores=2))
    said = capsys.readouterr().out
    assert said.count("the input is the bottleneck") == (1 if wait else 0)
    assert ("2 cores, and data.threads=2" in said) == bool(wait)


TWO = """
import jax
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import goodput
seconds = dict.fromkeys(goodput.PHASES, 0.0)
seconds |= {"data": (0.5, 4.0)[jax.process_index()], "step": (9.0, 6.0)[jax.process_index()]}
with jax.set_mesh(sharding.make_mesh()):
    told, slowest = goodput.over_processes(seconds)
watch = goodput.InputWatch(threads=0, processes=0, packed=True, randaugment=False, cores=7)
watch.sentence(told, slowest)
print(told["data"], told["step"], slowest, watch.sentence(told, slowest))
"""


@pytest.mark.slow
def test_of_two_processes_the_one_that_waits_longest_counts():
    """The other one waits for it in the step, which needs both."""
    both = group.finish(group.start(group.together(TWO), 2, 1), 120)
    said = [done.out.splitlines()[-1] for done in both]
    sentence = (
        "the input is the bottleneck: {} % of the time of the last steps went into waiting for "
        "clips by process 1 of 2; raise data.threads from 0 to 7 (this host has 7 cores)"
    )
    assert said[0] == "4.0 5.5 1 " + sentence.format(42)
    assert said[1] == "4.0 6.0 1 " + sentence.format(40)
