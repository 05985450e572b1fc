"""Batches loaded in threads and worker processes by Grain, in order."""

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from mvit_jax.common.errors import HungError, UserError
from mvit_jax.data import watchdog

Batch = dict[str, np.ndarray]

_GUARD = 'put the code of the script under `if __name__ == "__main__":`, or set data.processes=0'


class WorkerError(UserError):
    """A worker process has ended, by an error, a signal, or for lack of memory."""


@dataclass(frozen=True)
class LoaderOptions:
    """Threads, processes and timeout of the loading on one host; batches do not depend on them.

    Attributes:
      threads: loading threads of each process; 0 loads without prefetching.
      processes: worker processes; 0 loads in this process. Worker processes help where threads
        contend for Python's interpreter lock: with small images, or many cores.
      timeout: seconds that a batch may take; 0 for no limit.
    """

    threads: int = 2
    processes: int = 0
    timeout: float = 0.0


DEFAULT = LoaderOptions()


def load_batches(
    load: Any, batches: int, rows: int, options: LoaderOptions, prefetch: int
) -> Generator[Batch, None, None]:
    """Yields batches of stacked elements; closing the generator stops loading.

    Args:
      load: callable frozen dataclass that maps the number of an element to a dictionary of arrays.
        Its field `reads` is a `watchdog.ActiveReads` or None, its field `videos` a `Source`.
      batches: number of batches.
      rows: elements per batch.
      options: threads, processes and timeout of the loading.
      prefetch: number of prefetched batches.

    Raises:
      HungError: while iterating, a batch takes longer than `options.timeout`.
      WorkerError: while iterating, a worker process ends.
      UserError: worker processes would run the script again that starts them.
    """
    if batches == 0:
        return
    processes, threads = options.processes, options.threads
    if processes > 0:
        _check_script()
    earlier_processes = frozenset(multiprocessing.active_children())
    reads = None
    if options.timeout > 0:
        # More slots than elements in progress. Each process has some of these elements in its
        # threads and in its two buffers. Their numbers are close, as processes load in turn.
        slots = 4 * max(processes, 1) * (threads + prefetch * rows + 1)
        reads = watchdog.ActiveReads(slots, shared=processes > 0)
        load = replace(load, reads=reads)
    iterator = iter(_dataset(load, batches, rows, options, prefetch))
    limited, hangs = iterator, False
    if reads is not None:
        limited = watchdog.with_timeout(
            iterator,
            watchdog.Timeout(options.timeout, reads, load.videos.item, earlier_processes),
        )
    try:
        yield from limited
    except HungError:
        hangs = True
        raise
    except RuntimeError as error:
        if ended := re.search(
            r"Worker process was terminated.*?( with exit code -?\d+)?[.]", str(error)
        ):
            raise WorkerError(
                f"a worker process of data.processes={processes} ended{ended[1] or ''}: the lines "
                f"above name the reason; if they name this script, {_GUARD}"
            ) from error
        raise
    finally:
        # Closing may block for ever on a lock that a killed worker held.
        if not (hangs and processes > 0):
            iterator.close()
        if reads is not None:
            reads.close()


def _check_script() -> None:
    """Raises `UserError` in a script without a guard, which its worker processes would run again.

    A spawned process imports the script that was started, up to this call.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        if file is None or getattr(main, "__spec__", None) is not None:  # notebooks, python -m
            return
        try:
            if "__name__" in Path(file).read_text(errors="replace"):
                return
        except OSError:
            return
    raise UserError(f"{file or 'this script'} would be run again by each worker process: {_GUARD}")


def _dataset(load: Any, batches: int, rows: int, options: LoaderOptions, prefetch: int) -> Any:
    # Threads load single elements, not batches, to minimise the time to the first batch. The
    # caller's thread stacks the elements: 0.8 ms for a clip of 16x224x224, which takes 45 ms to
    # decode.
    reading = grain.ReadOptions(
        num_threads=options.threads, prefetch_buffer_size=max(options.threads, prefetch * rows)
    )
    dataset = grain.MapDataset.range(batches * rows).map(load).to_iter_dataset(reading)
    if options.processes > 0:
        if not flags.FLAGS.is_parsed():  # in notebooks and scripts; Grain's workers read the flags
            flags.FLAGS.mark_as_parsed()
        # Without this, Python warns of leaked shared memory at exit, although it was freed.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        ahead = max(prefetch * rows // options.processes, 1)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=options.processes, per_worker_buffer_size=ahead
            ),
            worker_init_fn=_set_up_worker,
        )
    return dataset.batch(rows, drop_remainder=True)


def _set_up_worker(worker: int, workers: int) -> None:
    """Ignores SIGINT and SIGTERM, which the parent handles, and exits when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
