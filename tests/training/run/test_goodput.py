"""Phases of wall time, goodput of a run, and advice on slow input."""

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
    """Stand-in for the thread that waits for steps: a test sets their end."""

    ended: float | None = None

    def watch(self, arrays):
        self.ended = None

    def last(self):
        return self.ended

    def close(self):
        pass


def spans(clock):
    timer = goodput.Spans(clock)
    timer._ends = ends = Ends()
    return timer, ends


def spent(timer):
    return {phase: seconds for phase, seconds in timer.lap().items() if seconds}


def test_a_nested_phase_is_not_counted_in_the_outer_phase():
    clock = Clock()
    timer, _ = spans(clock)
    clock.sleep(5)
    with timer.measure("checkpoint"):
        clock.sleep(1)
        with timer.measure("step"):
            clock.sleep(2)
        clock.sleep(4)
    clock.sleep(3)
    assert spent(timer) == {"start": 8, "checkpoint": 5, "step": 2}
    clock.sleep(1)
    assert spent(timer) == {"start": 1}


def test_phases_add_up_to_the_wall_time():
    clock, draw = Clock(), random.Random(0)
    timer, ends = spans(clock)
    whole = 0.0

    def nest(depth):
        for _ in range(draw.randrange(3)):
            clock.sleep(draw.randrange(8) / 4)
            if depth < 5:
                try:
                    with timer.measure(draw.choice(list(goodput.PHASES))):
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
    for _ in timer.measure_waits(batches()):
        nest(0)
        ends.ended = draw.choice([None, clock.now - 1, clock.now + 1])
        if draw.random() < 0.3:
            whole += sum(timer.lap().values())
    assert whole + sum(timer.lap().values()) == clock.now - began > 30


@pytest.mark.parametrize(
    ("ends_after", "expected"),
    [
        (None, {"step": 4}),  # still running when the batch arrives
        (0, {"data": 4}),  # it ended before
        (3, {"step": 3, "data": 1}),
    ],
)
def test_only_waits_after_the_end_of_a_step_count_as_data(ends_after, expected):
    clock = Clock()
    timer, ends = spans(clock)

    def batches():
        clock.sleep(2)
        yield "first"
        if ends_after is not None:
            ends.ended = clock.now + ends_after
        clock.sleep(4)
        yield "second"

    batches_in_time = timer.measure_waits(batches())
    assert next(batches_in_time) == "first"
    assert spent(timer) == {"start": 2}
    timer.register_step("a step")
    assert next(batches_in_time) == "second"
    assert spent(timer) == expected
    clock.sleep(1)
    assert next(batches_in_time, None) is None
    assert spent(timer) == {"rest": 1}


def test_the_end_of_a_step_is_recorded_in_the_background():
    timer = goodput.Spans()
    gates = [threading.Event(), threading.Event()]
    for gate in gates:
        computed = SimpleNamespace(block_until_ready=lambda gate=gate: gate.wait(20))
        timer.register_step({"loss": (computed, jnp.zeros(()))})
        time.sleep(0.05)
        assert timer._ends.last() is None
        before = time.monotonic()
        gate.set()
        while timer._ends.last() is None and time.monotonic() < before + 10:
            time.sleep(0.001)
        ended = timer._ends.last()
        assert ended is not None and before <= ended <= time.monotonic()
    timer.close()


METRICS = {
    name: (jnp.float32(2.0), jnp.float32(2.0))
    for name in ("loss", "accuracy", "grad_norm", "param_norm")
} | {"broken": (jnp.float32(0), jnp.float32(8))}


def train(folder, steps, *, wait, work, watch=None):
    """Runs a loop that sleeps `wait` seconds for each batch and `work` seconds for each step.

    Returns the seconds up to the last line of the history.
    """
    began = time.monotonic()
    timer = goodput.Spans()
    laps, lap, end = [], timer.lap, [began]
    timer.lap = lambda: (lap(), laps.append(time.monotonic()))[0]

    class Steps(Ends):
        def watch(self, arrays):
            end[0] = time.monotonic() + work

        def last(self):
            return end[0] if end[0] <= time.monotonic() else None

    timer._ends = Steps()

    def batches():
        for number in range(steps):
            if wait or number == 0:  # not even for 0 s, which lets other programs run
                time.sleep(wait if number else 0.05)
            yield number

    log = metrics.Logbook(folder, start=0, steps=steps, batch=8, every=5, spans=timer, watch=watch)
    log.begin({"classes": 3})
    for done, _ in enumerate(timer.measure_waits(batches()), start=1):
        with timer.measure("compile" if done == 1 else "step"):  # as long as reading the metrics
            time.sleep(max(end[0] - time.monotonic(), 0))
        log.step(done, METRICS, 0.5)
    log.close()
    return laps[-1] - began


@pytest.mark.parametrize(
    ("wait", "work", "data_share"),
    [
        (0.1, 0.0, 1.0),
        pytest.param(0.0, 0.1, 0.0, marks=pytest.mark.slow),
        (0.05, 0.1, 0.0),
        pytest.param(0.3, 0.1, 2 / 3, marks=pytest.mark.slow),
    ],
)
def test_slow_clips_and_slow_steps_are_distinguished(tmp_path, wait, work, data_share):
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


def test_tensorboard_has_the_share_and_the_seconds_of_each_phase(tmp_path):
    train(tmp_path, 10, wait=0.01, work=0.01)
    scalars = read_scalars(tmp_path)
    lines = {line["step"]: line for line in read_lines(tmp_path) if line["kind"] == "train"}
    phases = ("start", "compile", "step", "data", "checkpoint", "validation", "rest")
    assert tuple(goodput.PHASES) == phases
    for phase in phases:
        for name, key in (("time_share", "share"), ("time_per_step", "per_step")):
            values = scalars[f"{name}/{phase}"]
            assert values.keys() == lines.keys() == {5, 10}
            for step, value in values.items():
                assert value == pytest.approx(lines[step][key][phase], abs=1e-6)


def seconds(data, step, **phases):
    return dict.fromkeys(goodput.PHASES, 0.0) | {"data": data, "step": step} | phases


def advice(threads=4, processes=0, **changes):
    settings = {"packed": False, "randaugment": False, "cores": 16}
    return goodput.advice(threads, processes, **settings | changes)


def watch(**changes):
    load = {"threads": 4, "processes": 0, "packed": False, "randaugment": False, "cores": 16}
    return goodput.InputWatch(**load | changes)


def test_the_first_interval_and_short_waits_log_nothing():
    bottleneck = watch()
    for phases in (seconds(9.0, 1.0), seconds(1.9, 8.1), seconds(0.0, 0.0, validation=5.0)):
        assert bottleneck.sentence(phases) is None


def test_a_bottleneck_is_logged_again_only_if_it_is_much_worse():
    bottleneck = watch()
    bottleneck.sentence(seconds(0.0, 1.0))
    shares = (0.3, 0.35, 0.3, 0.45, 0.55, 0.6)
    messages = [bottleneck.sentence(seconds(share, 1 - share)) for share in shares]
    assert [message is not None for message in messages] == [True, False, False, False, True, False]
    # A validation in the interval does not hide the bottleneck.
    assert bottleneck.sentence(seconds(9.0, 1.0, validation=1000.0)) is not None
    assert "30 % of the time" in str(messages[0]) and "55 % of the time" in str(messages[4])
    assert "raise data.processes from 0 to 4 (this host has 16 cores)" in str(messages[0])


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
def test_the_advice_depends_on_the_number_of_free_cores(threads, processes, cores, words):
    text = advice(threads, processes, cores=cores)
    assert words in text
    # The advised number of processes fits the cores.
    if "raise data.processes" in text:
        raised = int(text.split(" to ")[1].split()[0])
        assert max(threads, 1) * raised <= cores and raised > processes


def test_the_advice_omits_settings_already_in_use():
    text = advice(2, packed=True, cores=2)
    assert "pack" not in text and "randaugment" not in text and "raise data.repeats" in text
    assert "make augment.randaugment weaker" in advice(2, randaugment=True, cores=2)


@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_slow_input_is_logged(tmp_path, capsys, wait):
    train(tmp_path, 20, wait=wait, work=0.02, watch=watch(threads=2, cores=2))
    output = capsys.readouterr().out
    assert output.count("the input is the bottleneck") == (1 if wait else 0)
    assert ("2 cores, and data.threads=2" in output) == bool(wait)


TWO = """
import jax
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import goodput
seconds = dict.fromkeys(goodput.PHASES, 0.0)
seconds |= {"data": (0.5, 4.0)[jax.process_index()], "step": (9.0, 6.0)[jax.process_index()]}
with jax.set_mesh(sharding.make_mesh()):
    combined, slowest = goodput.reduce_over_processes(seconds)
watch = goodput.InputWatch(threads=0, processes=0, packed=True, randaugment=False, cores=7)
watch.sentence(combined, slowest)
print(combined["data"], combined["step"], slowest, watch.sentence(combined, slowest))
"""


@pytest.mark.slow
def test_the_slowest_of_two_processes_determines_the_bottleneck():
    """The other process waits for the slowest in the step, which needs both."""
    both = group.finish(group.start(group.together(TWO), 2, 1), 120)
    lines = [done.out.splitlines()[-1] for done in both]
    sentence = (
        "the input is the bottleneck: {} % of the time of the last steps was spent waiting for "
        "clips in process 1 of 2; raise data.threads from 0 to 7 (this host has 7 cores)"
    )
    assert lines[0] == "4.0 5.5 1 " + sentence.format(42)
    assert lines[1] == "4.0 6.0 1 " + sentence.format(40)
