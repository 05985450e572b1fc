"""TensorBoard's event files, by TensorBoard's own protocol buffers; needs no TensorFlow."""

import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from mvit_jax.common.files import AnyPath, faults, is_local, to_path, why
from mvit_jax.training.run.history import ObjectFile

_numbers = itertools.count()  # two writers of one process have different files


class Events:
    """A writer of one event file. After a fault, a full disk say, it calls `say` once and ignores
    all later calls, so that training goes on."""

    def __init__(self, workdir: str | AnyPath, say: Callable[[str], None]) -> None:
        host, number = socket.gethostname(), next(_numbers)
        name = f"events.out.tfevents.{time.time():010.0f}.{host}.{os.getpid()}.{number}"
        self._path = to_path(workdir) / name
        self._say, self._ended = say, False
        self._records: RecordWriter | None = None  # made by the first write

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._write(step, [scalar_pb(name, float(value)) for name, value in scalars.items()])

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._write(step, [text_pb(name, text) for name, text in texts.items()])

    def close(self) -> None:
        if self._records is not None:
            self._attempt(self._records.close)

    def _write(self, step: int, summaries: list[Any]) -> None:
        now = time.time()
        self._attempt(self._append, [Event(wall_time=now, step=step, summary=s) for s in summaries])

    def _append(self, events: list[Event]) -> None:
        if self._records is None:
            local = is_local(self._path)
            self._records = RecordWriter(self._path.open("wb") if local else ObjectFile(self._path))
            events = [Event(wall_time=time.time(), file_version="brain.Event:2"), *events]
        for event in events:
            self._records.write(event.SerializeToString())
        self._records.flush()

    def _attempt(self, write: Callable[..., None], *args: Any) -> None:
        if self._ended:
            return
        try:
            write(*args)
        except faults() as error:
            self._ended = True
            reason = f"they cannot be written ({why(error)})"
            self._say(f"the TensorBoard events of this run end here: {reason}")
