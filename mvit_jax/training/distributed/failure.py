"""Failure handling across processes: if one fails, crashes or sends no heartbeats, all end.

A watcher thread in each process writes heartbeats into the key-value store of the coordinator
(process 0). The watcher of process 0 checks the heartbeats. All watchers check that process 0
answers, and that no process has published an error.
"""

import atexit
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import first_line
from mvit_jax.training.distributed import coordination

# A process counts as lost after SILENT_BEATS beats without a heartbeat. JAX's own heartbeat has a
# longer timeout (`launch.connect`), because JAX ends a process with 30 lines of output and abort().
# The exit status is then 134, but 139 if Python is process 1 of a container. JAX also cannot
# distinguish a broken collective from an error that a peer is about to report.
BEAT_SECONDS = 2
SILENT_BEATS = 45
FAILED_BEATS = 3  # calls in a row that fail at once, after which process 0 counts as lost
# At exit, the other processes wait this long for process 0, which may write reports for minutes.
LAST_SECONDS = 3600
# JAX aborts every process that still runs when process 0 exits. So after an error, process 0 waits
# up to PATIENCE_SECONDS until the others have acknowledged it, and LEAVING_SECONDS for their exit.
PATIENCE_SECONDS = 10
LEAVING_SECONDS = 2

# Keys in the key-value store of process 0.
_HERE, _ALIVE = (f"mvit_jax/{key}" for key in ("here", "alive"))
_ENDED, _HEARD, _DONE = (f"mvit_jax/{key}" for key in ("ended", "heard", "done"))
AGAIN = "the same command on all processes resumes from the last checkpoint"

LOST = 134
"""The exit status of a process that has lost a peer or timed out on it; a restart may succeed.

The status of abort() is the same. JAX calls abort() in a process that has lost process 0."""


@contextmanager
def fail_together() -> Generator[None, None, None]:
    """Ends all processes if the block raises; the exit status is 1, or `LOST` for a lost peer.

    Otherwise the peers would block in a collective. The stack is not unwound, because closing the
    open contexts may block on the peers. With one process, the exception propagates.
    """
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        _fail(error)
    except KeyboardInterrupt:
        if not jax.distributed.is_initialized():
            raise
        _fail(UserError("interrupted by Ctrl-C"))


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, UserError):
        exit_all(str(error))
    if _peer_lost(error):
        # If the peer has published an error, the watcher ends this process during this check.
        silent = _silent_processes()
        what = f"{' and '.join(silent)} or its host has died"
        if not silent:
            _print("".join(traceback.format_exception(error)).rstrip())
            what = f"the connection to another process broke ({first_line(error)})"
        exit_all(f"{what}: {AGAIN}", status=LOST, dead=len(silent))
    text = "".join(traceback.format_exception(error)).rstrip()
    exit_all(f"{type(error).__name__}: {first_line(error)}", text)


def _peer_lost(error: BaseException) -> bool:
    """Returns True if a collective failed because a peer is gone."""
    signs = r"(?i)gloo|connection (closed|reset|refused)|heartbeat|socket closed|\bUNAVAILABLE\b"
    signs += r"|DEADLINE_EXCEEDED|nccl|barrier"
    chain: BaseException | None = error
    while chain is not None:
        # JAX's own collectives raise a ValueError: "UNKNOWN: Gloo AllGather failed: ...".
        ours = isinstance(chain, UserError) or not isinstance(chain, ValueError | RuntimeError)
        if not ours and re.search(signs, str(chain)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _silent_processes() -> list[str]:
    """Returns the processes whose heartbeats have stopped."""
    client, _, _ = coordination.service()
    try:
        before = dict(client.key_value_dir_get(_ALIVE))
        time.sleep(2.5 * BEAT_SECONDS)
        after = dict(client.key_value_dir_get(_ALIVE))
        return [
            f"process {name.rpartition('/')[2]}"
            for name, beat in before.items()
            if after.get(name) == beat
        ]
    except jax.errors.JaxRuntimeError:  # the key-value store of process 0 does not answer
        return ["process 0"]


_ending = threading.Lock()  # held by the thread that ends this process


def exit_all(reason: str, text: str = "", status: int = 1, dead: int = 0) -> NoReturn:
    """Publishes the reason to all processes, prints it, and exits this process.

    Args:
      reason: one sentence, without "error:".
      text: printed in place of the reason, such as a traceback.
      status: the exit status of all processes.
      dead: number of peers that have died and cannot acknowledge.
    """
    if not _ending.acquire(blocking=False):
        time.sleep(2 * PATIENCE_SECONDS)  # another thread already ends this process
        os._exit(status)
    _print(text or f"error: {reason}")
    client, process, _ = coordination.service()
    notice = {
        "process": process, "host": socket.gethostname(), "reason": reason, "status": status,
        "dead": dead,
    }  # fmt: skip
    # Raised if a peer has already set a notice, or process 0 has died.
    with suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(_ENDED, json.dumps(notice))
    _exit_process(status, dead)


def _exit_process(status: int, dead: int) -> NoReturn:
    """Exits this process; process 0, which hosts the key-value store, exits after its peers."""
    client, process, count = coordination.service()
    if process == 0:
        _wait_for_acknowledgements(client, count - 1 - dead)
    else:
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_HEARD}/{process}", "", allow_overwrite=True)
    os._exit(status)


def _wait_for_acknowledgements(client: Any, peers: int) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            acknowledged = len(client.key_value_dir_get(_HEARD))
        except jax.errors.JaxRuntimeError:
            return
        if acknowledged >= peers:
            time.sleep(LEAVING_SECONDS if acknowledged else 0)
            return
        time.sleep(0.1)


def start_watching() -> None:
    """Starts the watcher thread, which writes and checks heartbeats until the process exits."""
    client, process, _ = coordination.service()
    if process == 0:
        client.key_value_set(_HERE, "")
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(finished,), daemon=True)

    def end() -> None:
        with suppress(jax.errors.JaxRuntimeError):
            if process == 0:
                client.key_value_set(_DONE, "")
            else:  # process 0 may write files for long after the last step, and may still fail
                client.blocking_key_value_get(_DONE, LAST_SECONDS * 1000)
        finished.set()
        watcher.join()  # a thread inside C++ at interpreter exit would abort the process
        # Without this key, process 0 does not report this process as lost.
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_delete(f"{_ALIVE}/{process}")

    atexit.register(end)  # registered after JAX's own handler, so this one runs first
    watcher.start()


def _watch(finished: threading.Event) -> None:
    """Writes heartbeats, and ends this process if a peer has failed or does not answer."""
    client, process, _ = coordination.service()
    beats: dict[str, tuple[str, int]] = {}
    silent = 0.0
    for beat in itertools.count():
        if finished.is_set():
            return
        try:  # an existing key returns at once; unlike `key_value_set`, this call has a timeout
            client.blocking_key_value_get(_HERE, BEAT_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            late = "DEADLINE_EXCEEDED" in str(error)
            silent += 1 if late else SILENT_BEATS / FAILED_BEATS  # tolerates short network faults
            if silent >= SILENT_BEATS and not finished.is_set():
                _exit_coordinator_lost(late)
            finished.wait(0 if late else BEAT_SECONDS)
            continue
        silent = 0.0
        with suppress(jax.errors.JaxRuntimeError):  # usually a timeout: no process has failed
            client.key_value_set(f"{_ALIVE}/{process}", str(beat), allow_overwrite=True)
            if process == 0:
                _check_beats(dict(client.key_value_dir_get(_ALIVE)), beats, beat)
            notice = json.loads(client.blocking_key_value_get(_ENDED, BEAT_SECONDS * 1000))
            if not finished.is_set():
                _exit_on_peer_failure(notice)
            return


def _exit_coordinator_lost(late: bool) -> NoReturn:
    """Exits with `LOST`: process 0 does not answer, so peers cannot be notified."""
    for_seconds = f" for {SILENT_BEATS * BEAT_SECONDS} s" if late else ""
    if _ending.acquire(blocking=False):
        _print(
            f"error: process 0 has not answered{for_seconds}, so it or its host has died: {AGAIN}"
        )
    os._exit(LOST)


def _exit_on_peer_failure(notice: dict[str, Any]) -> None:
    if not _ending.acquire(blocking=False):
        return  # this process already ends for another reason
    host = f" ({notice['host']})" if notice["host"] else ""
    _print(f"error: process {notice['process']}{host} has ended the run: {notice['reason']}")
    _exit_process(notice["status"], notice["dead"])


def _check_beats(now: dict[str, str], seen: dict[str, tuple[str, int]], beat: int) -> None:
    """Ends the run if a process has sent no heartbeat for `SILENT_BEATS` beats of process 0.

    The limit counts beats of process 0, not seconds. So a job can continue after all its processes
    were suspended.
    """
    for name, value in now.items():
        if seen.get(name, ("", 0))[0] != value:
            seen[name] = (value, beat)
        elif beat - seen[name][1] >= SILENT_BEATS:
            exit_all(
                f"process {name.rpartition('/')[2]} has sent no heartbeat for "
                f"{SILENT_BEATS * BEAT_SECONDS} s, so it or its host has died: {AGAIN}",
                status=LOST,
                dead=1,
            )


def exit_alone(sentence: str) -> NoReturn:
    """Prints an error and exits with `LOST`, without notifying the peers."""
    _print(f"error: {sentence}")
    os._exit(LOST)  # not 1, as a restart may succeed: the other hosts may only be late


def _print(text: str) -> None:
    with suppress(OSError):  # a closed pipe must not prevent the exit
        sys.stdout.flush()
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
