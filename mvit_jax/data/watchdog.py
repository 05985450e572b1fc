"""Timeouts for batch loading, in case disks, network file systems or worker processes hang.

A thread that hangs in a read cannot be interrupted. Therefore a separate thread loads the batches,
and the caller stops blocking on this thread after the timeout.
"""

import multiprocessing
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from mvit_jax.common.errors import HungError

_SLOT = struct.Struct("qq")  # number of the element plus 1, or 0 if free; index of its video


class ActiveReads:
    """A table of the videos being read by all threads of all loading processes.

    Each element in progress has its own slot, which is written without a lock: a stopped worker
    process could hold a lock for ever.

    Args:
      slots: number of slots, above the number of elements in progress at once.
      shared: True if worker processes write to the table, which then lies in shared memory.
    """

    def __init__(self, slots: int, shared: bool) -> None:
        self._slots = slots
        size = slots * _SLOT.size
        self._memory = SharedMemory(create=True, size=size) if shared else bytearray(size)

    @contextmanager
    def record(self, element: int, video: int) -> Iterator[None]:
        """Records that `video` is being read for `element` while the context is open."""
        offset = element % self._slots * _SLOT.size
        _SLOT.pack_into(self._bytes, offset, element + 1, video)
        try:
            yield
        finally:
            _SLOT.pack_into(self._bytes, offset, 0, 0)

    def oldest(self) -> int | None:
        """Returns the index of the video that blocks the next batch.

        This is the video of the first element being read; None if no element is being read.
        """
        slots = (_SLOT.unpack_from(self._bytes, i * _SLOT.size) for i in range(self._slots))
        return min((slot for slot in slots if slot[0] > 0), default=(0, None))[1]

    def close(self) -> None:
        if isinstance(self._memory, SharedMemory):
            self._memory.close()
            self._memory.unlink()

    @property
    def _bytes(self) -> Any:
        return self._memory.buf if isinstance(self._memory, SharedMemory) else self._memory


def record_read(
    reads: ActiveReads | None, element: int, video: int
) -> AbstractContextManager[None]:
    return nullcontext() if reads is None else reads.record(element, video)


@dataclass(frozen=True)
class Timeout:
    """A time limit for each batch, and the error raised when a batch exceeds the limit.

    Attributes:
      seconds: time limit of a batch.
      reads: table of the videos being read.
      name: function from the index of a video to its name in messages.
      earlier_processes: child processes started before the workers; `error` does not kill them.
    """

    seconds: float
    reads: ActiveReads
    name: Callable[[int], str]
    earlier_processes: frozenset[BaseProcess]

    def error(self) -> HungError:
        """Kills the worker processes and returns the error that names the blocking video."""
        video = self.reads.oldest()
        workers = set(multiprocessing.active_children()) - self.earlier_processes
        for worker in workers:
            worker.kill()  # a stopped process reacts to no other signal
        if video is not None:
            cause = f"{self.name(video)} is still being read (is its file system reachable?)"
        elif workers:
            cause = f"one of {len(workers)} loading processes is stopped or stuck"
        else:
            cause = "no video is being read, so the cause is unknown"
        return HungError(
            f"no batch of clips arrived on host {socket.gethostname()} within "
            f"data.timeout={self.seconds:g} s: {cause}; repair this and repeat the command, or "
            "raise data.timeout if loading is merely slow"
        )


def with_timeout(iterator: Iterator[Any], timeout: Timeout) -> Iterator[Any]:
    """Yields the elements of `iterator`, each requested only when the caller needs it.

    Raises:
      HungError: an element takes longer than `timeout.seconds`. The iterator then still hangs.
    """
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def serve() -> None:
        while requests.get():
            try:
                results.put((next(iterator), None))
            except BaseException as error:  # re-raised in the caller's thread
                results.put((None, error))
                return

    # A daemon thread does not block the interpreter's exit.
    threading.Thread(target=serve, name="batches", daemon=True).start()
    try:
        while True:
            requests.put(True)
            try:
                element, error = results.get(timeout=timeout.seconds)
            except queue.Empty:
                raise timeout.error() from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield element
    finally:
        requests.put(False)
