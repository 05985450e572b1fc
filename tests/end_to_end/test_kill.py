"""kill -9 at random moments, start again, end with the same parameters, bit for bit."""

import random
import signal
import time

import pytest

from mvit_jax.training.distributed.failure import LOST
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import group, tiny
from tests.support.marks import nightly, slow

# One that is killed before they have met is waited for, otherwise for five minutes.
TRAIN = group.program("coordination.START_SECONDS = 60")
# Saves in the background at every second step, and validates, so that some kills fall into these.
COMMAND = (*TRAIN, "--config=configs/moving_digits.py", *tiny.RECIPE_FLAGS)


# Processes, devices of each, kills, and epochs that outlast them.
CASES = [
    slow((1, 1, 3, 10), id="3 of one process"),
    nightly((1, 2, 14, 24), id="14 of one process"),
    nightly((2, 1, 7, 14), id="7 of two processes"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(case, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = group.finish(start(case, digits, folder), 300)
    assert all(d.status == 0 for d in done), done
    return folder


def start(case, digits, folder, **environment):
    processes, devices, _, epochs = case
    flags = [f"--config.epochs={epochs}", f"--config.data.folder={digits}"]
    program = [*COMMAND, *flags, f"--workdir={folder}"]
    return group.start(program, processes, devices, **environment)


def best(folder):
    checkpoints = Checkpoints(folder)
    return checkpoints.step("best"), checkpoints.best_top1


def test_killed_at_random_moments_ends_with_the_same_parameters(
    case, digits, tmp_path, uninterrupted
):
    """A kill comes some time after a start: mostly among steps, sometimes before the first one. Of
    two processes one is killed, after which the other has to end as well, or both are."""
    processes, _, kills, epochs = case
    draw = random.Random(processes)
    lines = (1, 4) if kills > 3 else (2, 4)  # a short run has to have saved before each kill
    seen = []
    for kill in range(kills):
        # What the first run has compiled is loaded; a kill shall cut no entry of that cache short.
        writes_none = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
        started = start(case, digits, tmp_path, **writes_none)
        if kill % 5 == 4:
            time.sleep(draw.uniform(0, 6))
        else:
            seen.append(group.wait_for(started[0], "step ", lines=draw.randrange(*lines)))
            time.sleep(draw.uniform(0, epochs / 40))
        victims = draw.choice([[0], [processes - 1], range(processes)])
        for victim in victims:
            assert started[victim].poll() is None, "the run was over: nothing was killed"
            started[victim].kill()
        done = group.finish(started)
        # Who was not killed has lost another, which a scheduler can tell from an error.
        survivors = [d for i, d in enumerate(done) if i not in victims]
        assert all(d.status in (LOST, -signal.SIGABRT) for d in survivors), survivors
    done = group.finish(start(case, digits, tmp_path), 300)
    assert all(d.status == 0 for d in done), done[0].err
    assert "(resumed)" in done[0].out
    group.assert_same_state(tmp_path, uninterrupted)
    assert best(tmp_path) == best(uninterrupted)  # no validation was lost either
    # The steps after which it was killed went on.
    numbers = [int(line.split()[1].split("/")[0]) for line in seen]
    assert numbers[-1] > numbers[0], numbers
