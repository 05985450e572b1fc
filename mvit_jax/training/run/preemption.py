"""Graceful stop on Ctrl-C and SIGTERM: all processes stop after the same step."""

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Flag that SIGINT or SIGTERM sets; the training loop checks it after each step.

    With several processes, the signal may reach all processes or only one. JAX then handles
    SIGTERM, and makes all processes agree on a step that none has passed. SIGINT is forwarded as
    SIGTERM.

    Attributes:
      signal: number of the signal after which the run stops; 0 for none.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.several = jax.distributed.is_initialized()

    def __enter__(self) -> "StopRequest":
        self.signal = self._received = 0
        handled = (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM)
        self._before: dict[int, Any] = {s: signal.signal(s, self._handle) for s in handled}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self._received == signal.SIGINT == number:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self._received = number
        if self.several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = number

    def agree(self, step: int) -> None:
        """Sets `signal` if all processes stop after `step`; call after every step."""
        # Steps are counted from this start, so that a request before the first step is for step 1.
        if self.several and multihost_utils.reached_preemption_sync_point(step - self.start):
            self.signal = self._received or signal.SIGTERM

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
