"""kill -9 at random moments, start again, end with the same parameters, bit for bit."""

import random
import signal
import time

import numpy as np
import pytest

from mvit_jax.training.checkpoints import Checkpoints
from mvit_jax.training.processes import LOST
from tests import group
from tests.group import final_state

pytestmark = pytest.mark.slow
# One that is killed before they have met is waited for, otherwise for five minutes.
TRAIN = (
    "from mvit_jax import errors, train\n"
    "from mvit_jax.training import peers\n"
    "peers.START_SECONDS = 60\n"
    "errors.run(train.main)"
)
# Saves in the background at every third step, and validates, so that some kills fall into these.
COMMAND = (
    "-c", TRAIN, *group.TRAIN[2:], "--config.checkpoint.every=3", "--config.eval.every_epochs=4",
    "--config.model.drop_path=0.3", "--config.optim.ema=0.9",
)  # fmt: skip
# Of one process with two devices, and of two with one each: kills, and epochs that outlast them.
KILLS = {1: 14, 2: 7}
EPOCHS = {1: 24, 2: 14}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def uninterrupted(request, digits, tmp_path_factory):
    processes = request.param
    folder = tmp_path_factory.mktemp("whole")
    done = group.finish(start(processes, digits, folder), 300)
    assert all(d.status == 0 for d in done), done
    return processes, final_state(folder), best(folder)


def start(processes, digits, folder, **environment):
    flags = [f"--config.epochs={EPOCHS[processes]}", f"--config.data.folder={digits}"]
    program = [*COMMAND, *flags, f"--workdir={folder}"]
    return group.start(program, processes, 2 // processes, **environment)


def best(folder):
    checkpoints = Checkpoints(folder)
    return checkpoints.step("best"), checkpoints.best_top1


def test_killed_at_random_moments_ends_with_the_same_parameters(digits, tmp_path, uninterrupted):
    """A kill comes some time after a start: mostly among steps, sometimes before the first one. Of
    two processes one is killed, after which the other has to end as well, or both are."""
    processes, whole, whole_best = uninterrupted
    draw = random.Random(processes)
    seen = []
    for kill in range(KILLS[processes]):
        # What the first run has compiled is loaded; a kill shall cut no entry of that cache short.
        writes_none = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
        started = start(processes, digits, tmp_path, **writes_none)
        if kill % 5 == 4:
            time.sleep(draw.uniform(0, 6))
        else:
            seen.append(group.wait_for(started[0], "step ", lines=draw.randrange(1, 4)))
            time.sleep(draw.uniform(0, 0.6))
        victims = draw.choice([[0], [processes - 1], range(processes)])
        for victim in victims:
            assert started[victim].poll() is None, "the run was over: nothing was killed"
            started[victim].kill()
        done = group.finish(started)
        # Who was not killed has lost another, which a scheduler can tell from an error.
        survivors = [d for i, d in enumerate(done) if i not in victims]
        assert all(d.status in (LOST, -signal.SIGABRT) for d in survivors), survivors
    done = group.finish(start(processes, digits, tmp_path), 300)
    assert all(d.status == 0 for d in done), done[0].err
    assert "(resumed)" in done[0].out
    ours = final_state(tmp_path)
    assert ours.keys() == whole.keys() and len(ours) > 100
    for name, value in whole.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert best(tmp_path) == whole_best  # no validation was lost either
    # The steps after which it was killed went on.
    numbers = [int(line.split()[1].split("/")[0]) for line in seen]
    assert numbers[-1] > numbers[0], numbers
