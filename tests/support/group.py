"""Several processes of one program on this machine, as on the hosts of a pod."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mvit_jax import train
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.support import tiny
from tests.support.environment import of_process

TRAIN = ("-m", "mvit_jax.train", "--config=configs/moving_digits.py", *tiny.FLAGS)


@dataclass
class Done:
    """Output and exit status of a process (negative: the signal that ended it)."""

    status: int
    out: str
    err: str


def start(
    program: Sequence[str], processes: int, devices: int, *,
    each: Sequence[Sequence[str]] = (), **environment: str,
) -> list[subprocess.Popen[str]]:  # fmt: skip
    """Starts `processes` of a program with `devices` each; `each` has flags of each process."""
    env = of_process(devices) | environment
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = []
    for i in range(processes):
        flags = list(each[i]) if each else []
        if processes > 1:
            flags += [
                f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}",
                f"--process_id={i}",
            ]  # fmt: skip
        command = [sys.executable, *program, *flags]
        started.append(subprocess.Popen(command, cwd=tiny.ROOT, env=env, text=True, **pipes))
    return started


def program(before: str, main: str = "train.main") -> list[str]:
    """Returns a program that runs `main` after `before`, which may change constants."""
    code = (
        "import os, sys, time\n"
        "from mvit_jax import train\n"
        "from mvit_jax.common import errors\n"
        "from mvit_jax.training.distributed import coordination, failure, launch\n"
        f"{before}\nerrors.run({main})"
    )
    return ["-c", code]


def together(work: str, before: str = "") -> list[str]:
    """Returns a program whose processes join each other and do `work`."""
    start = "def main(argv):\n    launch.start()\n    with failure.fail_together():\n"
    return program(f"{before}\n{start}{textwrap.indent(work, ' ' * 8)}", "main")


def finish(started: Sequence[subprocess.Popen[str]], timeout: float = 600) -> list[Done]:
    """Waits for all processes; kills those that exceed the timeout."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Done(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(process: subprocess.Popen[str], beginning: str, lines: int = 1) -> str:
    """Waits until a process has printed `lines` lines that begin so; returns the last one."""
    return lines_until(process, beginning, lines)[-1] + "\n"


def lines_until(process: subprocess.Popen[str], beginning: str, lines: int = 1) -> list[str]:
    """Returns all lines that a process prints up to the line that `wait_for` returns."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line.rstrip("\n"))
        lines -= line.startswith(beginning)
        if lines == 0:
            return printed
    raise AssertionError(f"ended before {beginning!r}: {process.communicate()[1]}")


def final_state(folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of the last checkpoint by path, from any number of processes."""
    checkpoints = Checkpoints(folder)
    step = checkpoints.step()
    assert step is not None
    items = {k: v for k, v in checkpoints.last.item_metadata(step).items() if v is not None}
    like = {k: jax.tree.map(lambda x: np.empty(x.shape, x.dtype), v) for k, v in items.items()}
    restore_args = {k: ocp.args.StandardRestore(v) for k, v in like.items()}
    tree = checkpoints.last.restore(step, args=ocp.args.Composite(**restore_args))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree.items()))
    }


def assert_same_state(folder: Path, other: Path) -> None:
    """Asserts that the last checkpoints of two runs are equal bit for bit."""
    ours, theirs = final_state(folder), final_state(other)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@contextlib.contextmanager
def at_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Has a training run in this process call `act` after it has logged step `number`."""

    class Acting(train.Logbook):
        def step(self, step, *args):
            super().step(step, *args)
            if step == number:
                act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Logbook", Acting)
        yield


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
