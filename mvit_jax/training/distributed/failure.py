"""Failure handling of many processes: an error, a death or a silence in one ends all.

Every process watches the others by heartbeats in the key-value store of process 0.
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

# A process whose watcher is silent for so many beats is dead, or its machine is. JAX's own
# heartbeat (the time of `jax.distributed.initialize`) comes later. Alone it is as quick, but ends
# in 30 lines of a dump and by abort(), which is status 139 and not 134 where Python is process 1 of
# a container; and a collective that broke could not be told from an error that is yet to be heard.
BEAT_SECONDS = 2
SILENT_BEATS = 45
FAILED_BEATS = 3  # calls of process 0 that fail at once, after which it is taken for dead
# How long the others wait at the end for process 0, which may draw and write for minutes.
LAST_SECONDS = 3600
# How long process 0, through which all messages go, waits until its last one is heard, and then
# until those who heard it are gone: JAX aborts whoever still is there when process 0 ends.
PATIENCE_SECONDS = 10
LEAVING_SECONDS = 2

# What they tell each other by the key-value store of process 0.
_HERE, _ALIVE = (f"mvit_jax/{key}" for key in ("here", "alive"))
_ENDED, _HEARD, _DONE = (f"mvit_jax/{key}" for key in ("ended", "heard", "done"))
AGAIN = "the same command on all processes goes on from the last checkpoint"

LOST = 134
"""The exit status of those who lost another process, or waited for it in vain: to be started again.
It is that of abort(), by which JAX ends a process that has lost process 0."""


@contextmanager
def together() -> Generator[None, None, None]:
    """An exception in here ends all processes, with its reason and exit status 1, or `LOST`.

    The others would wait for this one in a collective operation. Nothing is unwound, for what is
    left to close may wait for the others in turn.
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
        _fail(UserError("stopped at the keyboard"))


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, UserError):
        end_with(str(error))
    if _peer_lost(error):
        # The peer's own last words, if it had any, come to the watcher, which then ends this one.
        silent = _silent()
        what = f"{' and '.join(silent)} has died, or its machine has"
        if not silent:
            _say("".join(traceback.format_exception(error)).rstrip())
            what = f"the connection to another process broke ({first_line(error)})"
        end_with(f"{what}: {AGAIN}", status=LOST, dead=len(silent))
    text = "".join(traceback.format_exception(error)).rstrip()
    end_with(f"{type(error).__name__}: {first_line(error)}", text)


def _peer_lost(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone."""
    signs = r"(?i)gloo|connection (closed|reset|refused)|heartbeat|socket closed|\bUNAVAILABLE\b"
    signs += r"|DEADLINE_EXCEEDED|nccl|barrier"
    chain: BaseException | None = error
    while chain is not None:
        # JAX's own collectives say it in a ValueError: "UNKNOWN: Gloo AllGather failed: ...".
        ours = isinstance(chain, UserError) or not isinstance(chain, ValueError | RuntimeError)
        if not ours and re.search(signs, str(chain)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _silent() -> list[str]:
    """The processes that do not live any more, by the beats of their watchers."""
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
    except jax.errors.JaxRuntimeError:  # all messages go through it
        return ["process 0"]


_ending = threading.Lock()  # whoever has it ends this process


def end_with(reason: str, text: str = "", status: int = 1, dead: int = 0) -> NoReturn:
    """Tells all processes why this one ends, prints that or `text`, and ends it; so many of the
    others are known to be dead."""
    if not _ending.acquire(blocking=False):
        time.sleep(2 * PATIENCE_SECONDS)  # the watcher is ending this process
        os._exit(status)
    _say(text or f"error: {reason}")
    client, mine, _ = coordination.service()
    words = {
        "process": mine, "host": socket.gethostname(), "reason": reason, "status": status,
        "dead": dead,
    }  # fmt: skip
    with suppress(jax.errors.JaxRuntimeError):  # another one was first, or nobody is there
        client.key_value_set(_ENDED, json.dumps(words))
    _leave(status, dead)


def _leave(status: int, dead: int) -> NoReturn:
    """Ends this process: process 0, through which all messages go, after all that live."""
    client, mine, count = coordination.service()
    if mine == 0:
        _wait_until_heard(client, count - 1 - dead)
    else:
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_HEARD}/{mine}", "", allow_overwrite=True)
    os._exit(status)


def _wait_until_heard(client: Any, others: int) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            heard = len(client.key_value_dir_get(_HEARD))
        except jax.errors.JaxRuntimeError:
            return
        if heard >= others:
            time.sleep(LEAVING_SECONDS if heard else 0)
            return
        time.sleep(0.1)


def start_watching() -> None:
    client, mine, _ = coordination.service()
    if mine == 0:
        client.key_value_set(_HERE, "")
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(finished,), daemon=True)

    def end() -> None:
        with suppress(jax.errors.JaxRuntimeError):
            if mine == 0:
                client.key_value_set(_DONE, "")
            else:  # it may take long for what it alone writes, and may fail in that
                client.blocking_key_value_get(_DONE, LAST_SECONDS * 1000)
        finished.set()
        watcher.join()  # a thread that is in C++ when Python ends would abort the process
        with suppress(jax.errors.JaxRuntimeError):  # which shall not be missed by process 0
            client.key_value_delete(f"{_ALIVE}/{mine}")

    atexit.register(end)  # later than JAX has registered its own end, so it comes before that
    watcher.start()


def _watch(finished: threading.Event) -> None:
    """Ends this process when another one has ended for a reason, or has fallen silent."""
    client, mine, _ = coordination.service()
    beats: dict[str, tuple[str, int]] = {}
    silent = 0.0
    for beat in itertools.count():
        if finished.is_set():
            return
        try:  # what is there comes at once, and has a time limit: the calls after it have none
            client.blocking_key_value_get(_HERE, BEAT_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            late = "DEADLINE_EXCEEDED" in str(error)
            silent += 1 if late else SILENT_BEATS / FAILED_BEATS  # a network may stutter
            if silent >= SILENT_BEATS and not finished.is_set():
                _without_first(late)
            finished.wait(0 if late else BEAT_SECONDS)
            continue
        silent = 0.0
        with suppress(jax.errors.JaxRuntimeError):  # mostly that nothing has ended this beat
            client.key_value_set(f"{_ALIVE}/{mine}", str(beat), allow_overwrite=True)
            if mine == 0:
                _check_beats(dict(client.key_value_dir_get(_ALIVE)), beats, beat)
            words = json.loads(client.blocking_key_value_get(_ENDED, BEAT_SECONDS * 1000))
            if not finished.is_set():
                _obey(words)
            return


def _without_first(late: bool) -> NoReturn:
    """Ends this process, which has lost process 0 and can tell nobody."""
    for_seconds = f" for {SILENT_BEATS * BEAT_SECONDS} s" if late else ""
    if _ending.acquire(blocking=False):
        _say(
            f"error: process 0 has not been heard of{for_seconds}, it died or its machine did: "
            f"{AGAIN}"
        )
    os._exit(LOST)


def _obey(words: dict[str, Any]) -> None:
    if not _ending.acquire(blocking=False):
        return  # this one ends for a reason of its own
    host = f" ({words['host']})" if words["host"] else ""
    _say(f"error: process {words['process']}{host} has ended the run: {words['reason']}")
    _leave(words["status"], words["dead"])


def _check_beats(now: dict[str, str], seen: dict[str, tuple[str, int]], beat: int) -> None:
    """Ends the run when a process has not been heard of for `SILENT_BEATS` beats of process 0; of
    its own beats and not of seconds, so that a job that is suspended as a whole may go on."""
    for name, value in now.items():
        if seen.get(name, ("", 0))[0] != value:
            seen[name] = (value, beat)
        elif beat - seen[name][1] >= SILENT_BEATS:
            end_with(
                f"process {name.rpartition('/')[2]} has not been heard of for "
                f"{SILENT_BEATS * BEAT_SECONDS} s, it died or its machine did: {AGAIN}",
                status=LOST,
                dead=1,
            )


def end_alone(sentence: str) -> NoReturn:
    _say(f"error: {sentence}")
    os._exit(LOST)  # their hosts may be on their way


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be left to read it, and the process ends all the same
        sys.stdout.flush()
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
