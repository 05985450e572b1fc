"""Host-level coordination of processes: broadcasts, consistency checks, and shared files."""

import json
import socket
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath

# Time limit for a start: minutes may pass until all hosts of a large slice run the command.
START_SECONDS = 300

# Time until a file on a shared disk is visible on the other hosts.
SHARED_SECONDS = 60

_calls: Counter[str] = Counter()  # calls of `broadcast`, by name of the value


def is_process_0() -> bool:
    """Returns True in process 0, which prints and writes for all."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints in process 0 only, for text that all processes have."""
    if is_process_0():
        print(text, flush=True)


@contextmanager
def process_0_first(what: str, written: AnyPath) -> Generator[None, None, None]:
    """Runs the block in process 0 first, and in others when its file `written` is visible there."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if not is_process_0():
        multihost_utils.sync_global_devices(what)
    wait_for_file(written)
    yield
    if is_process_0():
        multihost_utils.sync_global_devices(what)


def broadcast(what: str, value: Any) -> Any:
    """Returns the `value` of process 0, which must be serialisable as JSON.

    All processes must call this in the same order. The name `what` may be used repeatedly.
    """
    if jax.process_count() == 1:
        return value
    client, process, _ = service()
    key = f"mvit_jax/broadcast/{what}/{_calls[what]}"
    _calls[what] += 1
    if process == 0:
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, START_SECONDS * 1000))


def check_equal(what: str, values: Mapping[str, Any]) -> None:
    """Checks that `values` equal those of process 0; a mismatch may deadlock in a collective.

    Args:
      what: the name of the values in messages.
      values: the values by the name that a user sets, such as a config key.

    Raises:
      UserError: a value differs.
    """
    here = {name: repr(value) for name, value in values.items()}
    expected = broadcast(what, here)
    differing = [
        f"{name} is {here.get(name)}, and {expected.get(name)} in process 0"
        for name in sorted(here.keys() | expected.keys())
        if here.get(name) != expected.get(name)
    ]
    if differing:
        raise UserError(
            f"{socket.gethostname()} has another {what} than process 0: "
            f"{'; '.join(differing[:5])}; use the same {what} for all processes"
        )


def wait_for_file(path: AnyPath) -> None:
    """Blocks until a file that process 0 has written is visible in this process.

    Raises:
      UserError: the file is not visible after `SHARED_SECONDS`. Network file systems may cache the
        old state of a folder for about that time.
    """
    until = time.monotonic() + SHARED_SECONDS
    while not (is_process_0() or path.exists()):
        if time.monotonic() > until:
            raise UserError(
                f"{path}, which process 0 has written, is not visible on {socket.gethostname()}: "
                "use a folder that all hosts share"
            )
        time.sleep(0.5)


def service() -> tuple[Any, int, int]:
    """Returns JAX's coordination client, the index of this process, and the number of processes.

    JAX has no public access to the client's key-value store. The two numbers are available before
    the devices are initialised.
    """
    from jax._src.distributed import global_state

    return global_state.client, global_state.process_id, global_state.num_processes
