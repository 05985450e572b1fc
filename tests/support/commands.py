"""Command lines of the programs, run as forks of one process that has imported the libraries.

A fork prints and returns the same as `python -m mvit_jax.train`, and saves the seconds of the
imports (`warm.py`). It sees one simulated device. One test per program is `fresh`.
"""

import atexit
import contextlib
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import warm
from tests.support.environment import of_process


@functools.cache
def python() -> Path:
    """Returns the executable of this process's forks, which ends with it."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(warm.python())


def run(program: str, *flags: object, cwd: object = warm.ROOT) -> tuple[int, str]:
    """Returns exit status (negative: a signal) and stdout followed by stderr."""
    return _run(python(), warm.environment(), program, flags, cwd)


def fresh(program: str, *flags: object, cwd: object = warm.ROOT) -> tuple[int, str]:
    """Returns the same of an interpreter of its own."""
    return _run(sys.executable, of_process(1), program, flags, cwd)


def printed(code: str, *arguments: object, fork: bool = False, **options: Any) -> str:
    """Returns the output of Python code; asserts that the code succeeds."""
    executable, env = (python(), warm.environment()) if fork else (sys.executable, of_process(1))
    done = subprocess.run(
        [executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=600, **{"cwd": warm.ROOT, "env": env} | options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return done.stdout.strip()


def _run(executable, environment, program, flags, cwd) -> tuple[int, str]:
    done = subprocess.run(
        [executable, "-m", f"mvit_jax.{program}", *map(str, flags)], capture_output=True,
        text=True, timeout=300, cwd=str(cwd), env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
