"""Runs killed at random moments, which resume to bit-identical parameters."""

import random
import signal
import time

import pytest

from mvit_jax.training.distributed.failure import LOST
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import group, tiny
from tests.support.marks import nightly, slow

# Survivors of a kill before the processes have connected would block for five minutes.
TRAIN = group.program("coordination.START_SECONDS = 60")
# Saves in the background at every second step, and validates, so that some kills fall into these.
COMMAND = (*TRAIN, "--config=configs/moving_digits.py", *tiny.RECIPE_FLAGS)


def best(folder):
    checkpoints = Checkpoints(folder)
    return checkpoints.step("best"), checkpoints.best_top1


@pytest.mark.parametrize(
    ("processes", "devices", "kills", "epochs"),  # devices of each, epochs that outlast the kills
    [
        slow(1, 1, 3, 10, id="3 of one process"),
        nightly(1, 2, 14, 24, id="14 of one process"),
        nightly(2, 1, 7, 14, id="7 of two processes"),
    ],
)
def test_a_run_killed_at_random_moments_ends_with_the_same_parameters(
    processes, devices, kills, epochs, digits, tmp_path
):
    """Kills come mostly between steps, sometimes before the first one.

    Of two processes one is killed, and the other has to exit, or both are.
    """
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    program = [*COMMAND, f"--config.epochs={epochs}", f"--config.data.folder={digits}"]

    def start(folder, **environment):
        return group.start([*program, f"--workdir={folder}"], processes, devices, **environment)

    done = group.finish(start(whole), 300)
    assert all(d.status == 0 for d in done), done
    draw = random.Random(processes)
    lines = (1, 4) if kills > 3 else (2, 4)  # a short run has to have saved before each kill
    seen = []
    for kill in range(kills):
        # Programs come from the first run's cache; a kill must not truncate its entries.
        writes_none = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
        started = start(folder, **writes_none)
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
        # Survivors exit with the status of a lost peer, which schedulers distinguish from errors.
        survivors = [d for i, d in enumerate(done) if i not in victims]
        assert all(d.status in (LOST, -signal.SIGABRT) for d in survivors), survivors
    done = group.finish(start(folder), 300)
    assert all(d.status == 0 for d in done), done[0].err
    assert "(resumed)" in done[0].out
    group.assert_same_state(folder, whole)
    assert best(folder) == best(whole)  # no validation was lost either
    # Later kills come at later steps.
    numbers = [int(line.split()[1].split("/")[0]) for line in seen]
    assert numbers[-1] > numbers[0], numbers
