"""Command lines of the programs, run by one interpreter per program that has imported it once.

    status, output = run("train", "--config=configs/moving_digits.py", "--config.batch=0")

Each command line gets a fork of that interpreter: fresh flags, fresh settings of JAX, no backend
yet. A fork prints and returns the same as `python -m mvit_jax.train`, down to `--help`, and saves
the seconds of the imports. It sees one simulated device. It does not run the import itself anew:
one test per program starts a real interpreter (`fresh`).
"""

import atexit
import functools
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.environment import of_process

ROOT = Path(__file__).parent.parent


def run(program: str, *flags: object, cwd: object = ROOT, timeout: float = 300) -> tuple[int, str]:
    """Returns exit status (negative: a signal) and stdout followed by stderr."""
    server = _server(program)
    assert server.stdin and server.stdout
    timer = threading.Timer(timeout, _end, [program])
    timer.start()
    try:
        server.stdin.write(json.dumps([[str(flag) for flag in flags], str(cwd)]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    finally:
        timer.cancel()
    if not answer:
        _end(program)
        raise TimeoutError(f"{program} {flags} gave no answer within {timeout:g} s, or died")
    status, output = json.loads(answer)
    return status, output


def fresh(program: str, *flags: object, cwd: object = ROOT) -> tuple[int, str]:
    """Returns the same of an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"mvit_jax.{program}", *map(str, flags)], capture_output=True,
        text=True, timeout=300, cwd=str(cwd), env=of_process(1),
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@functools.cache
def _server(program: str) -> subprocess.Popen[str]:
    """Starts the interpreter of a program, in a process group of its own."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.commands", program], cwd=ROOT, env=of_process(1), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    atexit.register(_kill, server)
    return server


def _end(program: str) -> None:
    _kill(_server(program))
    _server.cache_clear()  # the others start anew as well


def _kill(server: subprocess.Popen[str]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, 9)
    server.wait()


def _serve(main: Any) -> None:
    """Stands in for `errors.run`; returns, or raises SystemExit, in the forks alone."""
    path, answers = sys.argv[0], os.fdopen(os.dup(1), "w")
    gc.collect()
    gc.freeze()  # no fork looks through what it shares
    for line in sys.stdin:
        flags, cwd = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                null = os.open(os.devnull, os.O_RDONLY)
                for source, target in ((null, 0), (out.fileno(), 1), (err.fileno(), 2)):
                    os.dup2(source, target)
                os.chdir(cwd)
                sys.argv[:] = [path, *flags]  # config_flags looks there too
                errors_run(main)
                return
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
        print(json.dumps([status, "".join(texts)]), file=answers, flush=True)


if __name__ == "__main__":
    from mvit_jax import errors

    errors_run, errors.run = errors.run, _serve
    runpy.run_module(f"mvit_jax.{sys.argv[1]}", run_name="__main__", alter_sys=True)
