"""Ends a wait for clips that never come: a disk, a network file system or a worker that hangs.

Nothing can interrupt a thread that hangs in a read, so batches are asked for in a thread of their
own, and the caller stops waiting for it.
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

_SLOT = struct.Struct("qq")  # number of the element plus 1, or 0 for none; index of its video


class Board:
    """What is being read now, by all threads of all processes that load.

    Worker processes may be stopped at any moment, so each element that is under way has a place of
    its own, which is overwritten and never locked.

    Args:
      slots: more than elements are ever under way.
      shared: whether other processes write on it; this board is then sent to them.
    """

    def __init__(self, slots: int, shared: bool) -> None:
        self._slots = slots
        size = slots * _SLOT.size
        self._memory = SharedMemory(create=True, size=size) if shared else bytearray(size)

    @contextmanager
    def note(self, element: int, video: int) -> Iterator[None]:
        """Says that `video` is read, for `element` of the batches."""
        place = element % self._slots * _SLOT.size
        _SLOT.pack_into(self._bytes, place, element + 1, video)
        try:
            yield
        finally:
            _SLOT.pack_into(self._bytes, place, 0, 0)

    def oldest(self) -> int | None:
        """The video of the first element that is being read: the one that its batch waits for."""
        slots = (_SLOT.unpack_from(self._bytes, i * _SLOT.size) for i in range(self._slots))
        return min((slot for slot in slots if slot[0] > 0), default=(0, None))[1]

    def close(self) -> None:
        if isinstance(self._memory, SharedMemory):
            self._memory.close()
            self._memory.unlink()

    @property
    def _bytes(self) -> Any:
        return self._memory.buf if isinstance(self._memory, SharedMemory) else self._memory


def noted(board: Board | None, element: int, video: int) -> AbstractContextManager[None]:
    return nullcontext() if board is None else board.note(element, video)


@dataclass(frozen=True)
class Hung:
    """What to say when nothing comes, and which worker processes to end.

    Attributes:
      timeout: seconds.
      board: what is being read.
      name: of a video, given its index.
      others: processes that were there before those that load.
    """

    timeout: float
    board: Board
    name: Callable[[int], str]
    others: frozenset[BaseProcess]

    def error(self) -> HungError:
        video = self.board.oldest()
        workers = set(multiprocessing.active_children()) - self.others
        for worker in workers:
            worker.kill()  # it may be stopped, and then takes no other signal
        if video is not None:
            doing = f"{self.name(video)} is still being read (is its file system there?)"
        elif workers:
            doing = f"a process of the {len(workers)} that load is stopped or stuck"
        else:
            doing = "what is being read is not known"
        return HungError(
            f"host {socket.gethostname()} has waited data.timeout={self.timeout:g} s for a batch "
            f"of clips, and {doing}: mend that and give the same command again, or raise "
            "data.timeout where loading is merely slow"
        )


def within(iterator: Iterator[Any], hung: Hung) -> Iterator[Any]:
    """Gives what `iterator` gives, each element asked for when it is wanted.

    Raises:
      HungError: an element takes longer than `hung.timeout`. The iterator then still hangs.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        while wanted.get():
            try:
                answers.put((next(iterator), None))
            except BaseException as error:  # whatever it is, it belongs to the caller
                answers.put((None, error))
                return

    # A daemon: Python does not wait for it at the end.
    threading.Thread(target=answer, name="batches", daemon=True).start()
    try:
        while True:
            wanted.put(True)
            try:
                element, error = answers.get(timeout=hung.timeout)
            except queue.Empty:
                raise hung.error() from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield element
    finally:
        wanted.put(False)
