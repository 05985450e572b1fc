"""Loads the elements of batches in threads and worker processes (Grain), in their order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from absl import flags

from mvit_jax.common.errors import HungError
from mvit_jax.data import watchdog

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class LoaderOptions:
    """Speed of the loading on one host; no batch depends on it.

    Attributes:
      threads: that load, in each process; 0 loads without prefetching.
      processes: that load; 0 for this one alone. They are worth starting where Python's part of
        the work, which threads do in turns, is large: small images, or many cores.
      timeout: seconds that a batch may take; 0 for any time.
    """

    threads: int = 2
    processes: int = 0
    timeout: float = 0.0


DEFAULT = LoaderOptions()


def batched(
    load: Any, batches: int, rows: int, options: LoaderOptions, prefetch: int
) -> Generator[Batch, None, None]:
    """Yields `batches` batches of `rows` elements each; closing the generator stops loading.

    Args:
      load: a frozen dataclass, called with the number of an element, that returns a dictionary of
        arrays. Its field `board` is a `watchdog.Board` or None, its field `videos` a `Source`.
      prefetch: batches loaded ahead.

    Raises:
      HungError: while iterating, a batch takes longer than `options.timeout`.
    """
    if batches == 0:
        return
    processes, threads = options.processes, options.threads
    others = frozenset(multiprocessing.active_children())
    board = None
    if options.timeout > 0:
        # In each process as many elements are under way as its two buffers hold and its threads
        # load; those of the processes take turns.
        slots = 4 * max(processes, 1) * (threads + prefetch * rows + 1)
        board = watchdog.Board(slots, shared=processes > 0)
        load = replace(load, board=board)
    iterator = iter(_dataset(load, batches, rows, options, prefetch))
    batches_in_time, hangs = iterator, False
    if board is not None:
        batches_in_time = watchdog.within(
            iterator, watchdog.Hung(options.timeout, board, load.videos.item, others)
        )
    try:
        yield from batches_in_time
    except HungError:
        hangs = True
        raise
    finally:
        # Workers that were killed may have held locks that closing waits for.
        if not (hangs and processes > 0):
            iterator.close()
        if board is not None:
            board.close()


def _dataset(load: Any, batches: int, rows: int, options: LoaderOptions, prefetch: int) -> Any:
    # Elements, not batches, are spread over the threads, so that the first batch comes as early
    # as can be. Stacking is left to the caller's thread: 0.8 ms for a clip of 16x224x224, which
    # took 45 ms to decode.
    reading = grain.ReadOptions(
        num_threads=options.threads, prefetch_buffer_size=max(options.threads, prefetch * rows)
    )
    dataset = grain.MapDataset.range(batches * rows).map(load).to_iter_dataset(reading)
    if options.processes > 0:
        if not flags.FLAGS.is_parsed():  # as in a notebook or a plain script: workers read them
            flags.FLAGS.mark_as_parsed()
        # What a worker has prefetched at the end is freed, but reported as if it were lost.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        ahead = max(prefetch * rows // options.processes, 1)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=options.processes, per_worker_buffer_size=ahead
            ),
            worker_init_fn=_serve_parent,
        )
    return dataset.batch(rows, drop_remainder=True)


def _serve_parent(worker: int, workers: int) -> None:
    """Ignores SIGINT and SIGTERM, which the parent handles, and exits when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
