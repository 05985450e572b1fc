"""`python` for shell commands: forks of one process that has imported the package's libraries.

    with warm.python() as executable:
        subprocess.run([executable, "-m", "mvit_jax.train", "--config=...", ...])

An import of `mvit_jax.train` takes 2 CPU seconds, a fork 0.02. The executable accepts `-m` and
`-c`; other command lines, and those with other JAX_* variables, get an interpreter of their own.
Forks share no flags, backends or settings: their parent imports no program and computes nothing.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

from tests.support.environment import COMPILER

ROOT = Path(__file__).parents[2]

# Isolated and without `site` (-IS): it starts in 15 ms.
CLIENT = """#!{python} -IS
import json, os, socket, sys
settings = {{k: v for k, v in os.environ.items() if k.startswith("JAX_")}}
if sys.argv[1:2] not in (["-m"], ["-c"]) or settings != {settings!r}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [request], [0, 1, 2])
server.shutdown(socket.SHUT_WR)
status = int(server.makefile().read() or 1)
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def environment() -> dict[str, str]:
    """Returns the environment of the forks: one CPU device, the compiler of the tests."""
    settings = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return settings | {"XLA_FLAGS": COMPILER, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


@contextlib.contextmanager
def python() -> Iterator[Path]:
    """Yields the path of the executable; the process behind it ends with the context."""
    with tempfile.TemporaryDirectory(prefix="warm_") as folder:
        executable, address, env = Path(folder, "python"), f"{folder}/socket", environment()
        settings = {k: v for k, v in env.items() if k.startswith("JAX_")}
        executable.write_text(
            CLIENT.format(python=sys.executable, address=address, settings=settings)
        )
        executable.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm", address], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            assert server.stdout and server.stdout.readline() == "ready\n"
            yield executable
        finally:
            server.terminate()
            server.wait(timeout=60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def programs() -> list[str]:
    package = ROOT / "mvit_jax"
    files = [p for p in package.glob("*.py") if "errors.run(main)" in p.read_text()]
    return sorted([p.stem for p in files] + [p.parent.name for p in package.glob("*/__main__.py")])


def libraries() -> list[str]:
    """Returns the names of all modules but programs, whose flags collide."""
    import mvit_jax

    names = {module.name for module in pkgutil.walk_packages(mvit_jax.__path__, "mvit_jax.")}
    commands = {f"mvit_jax.{program}{end}" for program in programs() for end in ("", ".__main__")}
    return sorted(names - commands)


def serve(address: str) -> None:
    """Imports the libraries, then forks for each connection; SIGTERM ends it."""
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401

    for name in libraries():
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy all pages
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    signal.signal(signal.SIGTERM, lambda *_: (reap(), sys.exit()))
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            listening.close()
            answer(connection)
        connection.close()
        reap()


def reap() -> None:
    """Reaps forks that have ended, so that their CPU seconds count."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(connection: socket.socket) -> None:
    """Runs the command in a fork, sends its exit status and exits."""
    head, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    with connection.makefile("rb") as rest:
        arguments, folder, env = json.loads(head + rest.read())
    child = os.fork()
    if child:
        for stream in (*streams, 0, 1, 2):
            os.close(stream)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(status).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = folder
    option, source, *flags = arguments
    sys.argv[:] = ["-c" if option == "-c" else source, *flags]
    status: object = 0
    try:
        if option == "-m":
            runpy.run_module(source, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(source, "<string>", "exec"), module.__dict__)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # Finalising all modules would take a second: exit without it.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
