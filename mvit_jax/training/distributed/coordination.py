"""What the processes of a run tell each other, besides what passes between their devices."""

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

# All hosts of a large slice may take minutes until they run the command.
START_SECONDS = 300

# How long a file on a shared disk may take to be seen by other hosts.
SHARED_SECONDS = 60

_calls: Counter[str] = Counter()  # of `from_first`, by what they ask for


def first() -> bool:
    """Whether this process is the one that talks, and writes what all have."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints what all processes find alike, once."""
    if first():
        print(text, flush=True)


@contextmanager
def first_then_others(what: str, written: AnyPath) -> Generator[None, None, None]:
    """Lets process 0 through alone, and the others when they see the file that it has `written`."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if not first():
        multihost_utils.sync_global_devices(what)
    wait_for_file(written)
    yield
    if first():
        multihost_utils.sync_global_devices(what)


def from_first(what: str, value: Any) -> Any:
    """The value that process 0 has, of those that JSON knows. All must call this, and in the same
    order; `what` may come again."""
    if jax.process_count() == 1:
        return value
    client, mine, _ = service()
    key = f"mvit_jax/first/{what}/{_calls[what]}"
    _calls[what] += 1
    if mine == 0:
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, START_SECONDS * 1000))


def same_everywhere(what: str, values: Mapping[str, Any]) -> None:
    """Compares what decides how processes go on together with what process 0 has: those who differ
    would wait for each other for ever.

    Args:
      what: a word for it, in messages.
      values: by the names under which a user knows them.

    Raises:
      UserError: this process differs.
    """
    ours = {name: repr(value) for name, value in values.items()}
    theirs = from_first(what, ours)
    differing = [
        f"{name} is {ours.get(name)} here and {theirs.get(name)} there"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise UserError(
            f"{socket.gethostname()} has another {what} than process 0: "
            f"{'; '.join(differing[:5])}; give all processes the same"
        )


def wait_for_file(path: AnyPath) -> None:
    """Returns when this process sees a file that process 0 has written.

    Raises:
      UserError: after a minute, for which network file systems may believe what they saw before.
    """
    until = time.monotonic() + SHARED_SECONDS
    while not (first() or path.exists()):
        if time.monotonic() > until:
            raise UserError(
                f"{socket.gethostname()} does not see {path}, which process 0 has written: name a "
                "folder that all hosts share"
            )
        time.sleep(0.5)


def service() -> tuple[Any, int, int]:
    """The client of the coordination service, whose store of keys and values JAX has in no public
    module; this process, and how many there are, also where devices cannot be asked."""
    from jax._src.distributed import global_state

    return global_state.client, global_state.process_id, global_state.num_processes
