"""Timeouts of batches, and the videos that are named in their errors."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from mvit_jax.common.errors import HungError
from mvit_jax.data import pipeline, watchdog
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.formats.synthetic import Synthetic
from tests.data.loading import loading
from tests.support.stand_ins import until

SETTINGS = pipeline.ClipSettings(
    frames=2, stride=2, size=8, short_side=8, augmentation=Augmentation(crop_area=None)
)


@dataclass(frozen=True)
class Hanging(Synthetic):
    """Synthetic videos; reading the video `stuck` blocks until `freed` is set."""

    stuck: int = -1
    freed: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def opened(self, index, clip_frames):
        if index == self.stuck:
            self.freed.wait()
        with super().opened(index, clip_frames) as video:
            yield video


def synthetic(stuck=-1):
    return Hanging(videos=12, classes=3, num_frames=8, height=8, width=8, stuck=stuck)


def load(videos, kind="train", steps=3, **changes):
    options = loading(changes)
    if kind == "test":
        return pipeline.test_batches(videos, SETTINGS, clips=1, crops=1, batch=4, **options)
    return pipeline.train_batches(videos, SETTINGS, seed=0, batch=4, steps=steps, **options)


@pytest.mark.parametrize("kind", ["train", "test"])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_timeout_names_the_video_that_is_still_being_read(kind, threads):
    order = pipeline.epoch_order(12, 0, 0) if kind == "train" else range(12)
    stuck = int(order[6])  # of the second batch
    videos = synthetic(stuck)
    batches = load(videos, kind, threads=threads, timeout=0.4)
    try:
        first = next(batches)
        plain = next(load(synthetic(), kind, threads=0))
        np.testing.assert_array_equal(first["clip"], plain["clip"])
        start = time.monotonic()
        with pytest.raises(HungError) as caught:
            next(batches)
        assert 0.35 < time.monotonic() - start < 3
    finally:
        videos.freed.set()
    message = str(caught.value)
    assert f"synthetic/{stuck} is still being read" in message
    assert os.uname().nodename in message and "data.timeout=0.4 s" in message
    assert next(batches, None) is None


def test_a_timeout_changes_neither_batches_nor_errors():
    expected = list(load(synthetic(), threads=0))
    for timeout in (0.0, 30.0):
        batches = list(load(synthetic(), threads=2, timeout=timeout))
        assert len(batches) == 3
        for batch, other in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(batch["clip"], other["clip"])

    def failing():
        yield 1
        raise KeyError("two")

    reads = watchdog.ActiveReads(1, shared=False)
    timeout = watchdog.Timeout(30.0, reads, str, frozenset())
    elements = watchdog.with_timeout(failing(), timeout)
    assert next(elements) == 1
    with pytest.raises(KeyError, match="two"):
        next(elements)


def test_the_batch_thread_ends_with_the_iterator():
    def running():
        return any(thread.name == "batches" for thread in threading.enumerate())

    batches = load(synthetic(), threads=1, timeout=30.0)
    next(batches)
    assert running()
    batches.close()
    until(lambda: not running())


def test_the_oldest_read_of_all_processes_is_returned():
    reads = watchdog.ActiveReads(16, shared=True)
    assert reads.oldest() is None
    with reads.record(21, 5), reads.record(19, 7):
        assert reads.oldest() == 7
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            assert pool.apply(watchdog.ActiveReads.oldest, [reads]) == 7
    with pytest.raises(ValueError), reads.record(3, 1):
        raise ValueError  # a decode failure
    assert reads.oldest() is None
    reads.close()


@pytest.mark.slow
def test_a_stopped_worker_is_ended_and_unrelated_processes_are_not():
    context = multiprocessing.get_context("spawn")
    bystander = context.Process(target=time.sleep, args=(60,), daemon=True)
    bystander.start()
    videos = Synthetic(videos=4000, classes=3, num_frames=8, height=8, width=8)
    batches = load(videos, steps=1000, threads=1, processes=2, timeout=20.0)
    next(batches)
    workers = [p for p in multiprocessing.active_children() if p != bystander]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(HungError, match=r"stopped or stuck|still being read"):
        list(batches)
    assert 19 < time.monotonic() - start < 40
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()
    assert bystander.is_alive()
    bystander.kill()
