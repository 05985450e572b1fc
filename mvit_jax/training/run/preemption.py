"""Ctrl-C and SIGTERM: the step under way is finished, by all processes after the same step."""

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop reads after each step.

    Of many processes each may get the signal, or one alone. JAX then takes SIGTERM itself, and
    finds a step that none of them has passed yet; Ctrl-C becomes one.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.several = jax.distributed.is_initialized()

    def __enter__(self) -> "StopRequest":
        self.signal = self._asked = 0
        ours = (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM)
        self._before: dict[int, Any] = {s: signal.signal(s, self._ask) for s in ours}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice at the keyboard: at once
        self._asked = number
        if self.several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal = number

    def agree(self, step: int) -> None:
        """To be called after every step: whether all stop here."""
        # Steps are counted from this start: a request before the first one is for step 1.
        if self.several and multihost_utils.reached_preemption_sync_point(step - self.start):
            self.signal = self._asked or signal.SIGTERM

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
