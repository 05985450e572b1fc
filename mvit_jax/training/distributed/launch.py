"""Many processes that train or test as one: how they find each other, and how they end together.

JAX's multi-controller runtime runs the same program in every process, with the devices of all as
one mesh. Without flags and outside of a cluster there is one process, and nothing here does
anything. Programs import this module for its flags, call `start` before anything else that touches
JAX, and do their work within `together`.
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
from absl import flags

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import first_line
from mvit_jax.training.distributed import cluster, coordination, device_table

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT on which process 0 listens; found in clusters.",
    allow_override=True,
)  # fmt: skip
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes run this command; 1 looks for no others.",
    allow_override=True,
)  # fmt: skip
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", allow_override=True
)
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "The GPUs of this machine that this process uses, like 0,1.",
    allow_override=True,
)  # fmt: skip

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
_HERE, _ALIVE, _DEVICES = (f"mvit_jax/{key}" for key in ("here", "alive", "devices"))
_ENDED, _HEARD, _DONE = (f"mvit_jax/{key}" for key in ("ended", "heard", "done"))
_AGAIN = "the same command on all processes goes on from the last checkpoint"

LOST = 134
"""The exit status of those who lost another process, or waited for it in vain: to be started again.
It is that of abort(), by which JAX ends a process that has lost process 0."""


def start() -> None:
    """Joins the other processes of this command, as its flags or the cluster say; see `connect`."""
    ids = _LOCAL_DEVICE_IDS.value
    try:
        devices = None if ids is None else [int(i) for i in ids]
    except ValueError:
        raise UserError(
            f"--local_device_ids={','.join(ids or [])} must be numbers like 0,1"
        ) from None
    connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, devices)


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: list[int] | None = None,
) -> None:
    """Joins the processes of a run, before anything else uses JAX; prints which devices they have.

    What is not given is found by JAX on Cloud TPUs and under SLURM, Open MPI and Kubernetes. A
    process that belongs to no such cluster, or is alone in it, starts as the only one.

    Args:
      coordinator: HOST:PORT on which process 0 listens, and all others reach it.
      num_processes: how many there are; 1 looks for no others.
      process_id: which of them this one is, from 0.
      local_device_ids: GPUs that this one uses; None for all it sees, or as SLURM deals them.

    Raises:
      UserError: what is given contradicts itself, or does not suffice.
    """
    given = (coordinator, num_processes, process_id)
    if num_processes == 1 or (given == (None,) * 3 and cluster.alone(os.environ)):
        return
    if jax.distributed.is_initialized():
        return
    cluster.check(*given)
    if local_device_ids is None and given == (None,) * 3:
        local_device_ids = cluster.slurm_devices(os.environ)
    # JAX ends a process that waits for others in vain by abort() and a C++ stack dump: this ends
    # it before, with a sentence.
    watchdog = threading.Timer(coordination.START_SECONDS, _nobody_came, (given,))
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids,
            initialization_timeout=coordination.START_SECONDS + 60,
            heartbeat_timeout_seconds=BEAT_SECONDS * SILENT_BEATS + 60,
            shutdown_timeout_seconds=LAST_SECONDS,
        )  # fmt: skip
        watchdog.cancel()
        if not jax.distributed.is_initialized():
            return
        _start_watching()
        with together():
            _introduce()
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        _no_cluster(error, given)
    finally:
        watchdog.cancel()


def _no_cluster(error: Exception, given: tuple[Any, ...]) -> None:
    """Returns where no cluster was found and nobody asked for one."""
    message = " ".join(str(error).split())
    found_none = isinstance(error, ValueError) and "should be defined" in message
    if found_none and given == (None,) * 3 and "JOB_COMPLETION_INDEX" not in os.environ:
        return
    if found_none or "must be defined" in message:
        what = (
            "this pod of an indexed job cannot find the others without the package kubernetes "
            "(pip install 'jax[k8s]')"
            if given == (None,) * 3
            else "this machine is in no cluster that tells the rest"
        )
        raise UserError(
            f"{what}: give --coordinator=HOST:PORT, --num_processes and --process_id together, or "
            "--num_processes=1 for one process alone"
        ) from None
    if "start RPC server" in message or "in use" in message:
        raise UserError(
            f"process 0 cannot listen at {given[0] or 'the port that was found'}: another program "
            "does, perhaps an earlier start of this one; end that, or name a free port in "
            "--coordinator of all processes"
        ) from error
    raise UserError(
        f"the processes of this run could not be brought together ({message[:300]}): mend that, "
        "give --coordinator=HOST:PORT, --num_processes and --process_id, or --num_processes=1 for "
        "one process alone"
    ) from error


def _nobody_came(given: tuple[Any, ...]) -> NoReturn:
    """Ends this process, which has waited for the others in vain."""
    from jax._src.distributed import global_state  # what was detected is nowhere else

    coordinator = global_state.coordinator_address or given[0]
    _, mine, count = coordination.service()
    seconds = coordination.START_SECONDS
    what = (
        f"process {mine} of {count} has waited {seconds} s for the others at {coordinator}"
        if coordinator
        else f"the cluster has not told within {seconds} s who the other processes are"
    )
    _last_words(
        f"{what}: start the same command on all of them, with the address of process 0 and a port "
        "that it may open in --coordinator (--num_processes=1 is for one process alone)"
    )


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
        _end_with(str(error))
    if _peer_lost(error):
        # The peer's own last words, if it had any, come to the watcher, which then ends this one.
        silent = _silent()
        what = f"{' and '.join(silent)} has died, or its machine has"
        if not silent:
            _say("".join(traceback.format_exception(error)).rstrip())
            what = f"the connection to another process broke ({first_line(error)})"
        _end_with(f"{what}: {_AGAIN}", status=LOST, dead=len(silent))
    text = "".join(traceback.format_exception(error)).rstrip()
    _end_with(f"{type(error).__name__}: {first_line(error)}", text)


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


def _end_with(reason: str, text: str = "", status: int = 1, dead: int = 0) -> NoReturn:
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


def _start_watching() -> None:
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
            f"{_AGAIN}"
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
            _end_with(
                f"process {name.rpartition('/')[2]} has not been heard of for "
                f"{SILENT_BEATS * BEAT_SECONDS} s, it died or its machine did: {_AGAIN}",
                status=LOST,
                dead=1,
            )


def _introduce() -> None:
    """Prints the devices of all processes."""
    client, mine, count = coordination.service()
    try:
        row = device_table.row(os.environ)
    except RuntimeError as error:
        raise UserError(
            f"process {mine} on {socket.gethostname()} cannot use its devices, or some process "
            f"sees none ({first_line(error)}): check what the scheduler gives "
            "each, and --local_device_ids"
        ) from error
    client.key_value_set(f"{_DEVICES}/{mine}", json.dumps(row))
    if mine > 0:
        return
    rows = [_devices_of(i, client) for i in range(count)]
    print(device_table.describe(rows), flush=True)
    for sentence in device_table.suspicions(rows):
        print(f"warning: {sentence}", flush=True)


def _devices_of(process: int, client: Any) -> dict[str, Any]:
    try:
        key = f"{_DEVICES}/{process}"
        return json.loads(client.blocking_key_value_get(key, coordination.START_SECONDS * 1000))
    except jax.errors.JaxRuntimeError:
        reason = (
            f"process {process} has not started its devices within {coordination.START_SECONDS} s: "
            f"see whether something else holds them; {_AGAIN}"
        )
        _end_with(reason, status=LOST)


def _last_words(sentence: str) -> NoReturn:
    _say(f"error: {sentence}")
    os._exit(LOST)  # their hosts may be on their way


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be left to read it, and the process ends all the same
        sys.stdout.flush()
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
