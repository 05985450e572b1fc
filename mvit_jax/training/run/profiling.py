"""Profiler traces of a few training steps, for TensorBoard and xprof."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from mvit_jax.common.files import AnyPath, is_local, to_path, write_atomically

FIRST, LAST = 10, 15  # defaults: after compilation, with a steady input pipeline


class Profile:
    """Profiler trace of some steps of a run, in `WORKDIR/profile`.

    The context manager also ends a trace if training stops during the traced steps.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        window: tuple[int, int] | None,
        *,
        start: int,
        steps: int,
        log: Callable[[str], object],
    ) -> None:
        """Selects the steps to trace.

        Args:
          folder: the workdir.
          window: first and last step to trace, counted from 1 at this start of the run. A window
            that extends past the last step is moved back to end there. None for no trace.
          start: steps done before this start.
          steps: steps of the whole run.
          log: called with a message: the trace's folder, or the reason for no trace.
        """
        self._folder, self._log = to_path(folder) / "profile", log
        # JAX traces into local folders only: the trace of a run in a bucket is uploaded from here.
        self._here: tempfile.TemporaryDirectory[str] | None = None
        self._steps = range(0)
        self._last: int | None = None  # last traced step, while a trace runs
        if window is not None:
            last = min(start + window[1], steps)
            # A moved window excludes the first step if possible, as that step compiles.
            earliest = max(start + min(2, window[0]), last - (window[1] - window[0]))
            self._steps = range(min(start + window[0], earliest, last), last + 1)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Traces the block as step `number` of the run (from 1) if this step is selected."""
        if number not in self._steps or not self._start():
            yield
            return
        self._last = number
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._steps[-1]:
            jax.block_until_ready(jax.live_arrays())  # the devices run behind the host
            self._stop()

    def _start(self) -> bool:
        """Starts the trace unless it already runs; returns False if the start fails."""
        if self._last is not None:
            return True
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls would dominate the trace
        try:
            if not is_local(self._folder):
                self._here = tempfile.TemporaryDirectory()
            folder = self._here.name if self._here else self._folder
            jax.profiler.start_trace(folder, profiler_options=options)
        except Exception as error:  # such as another running trace; training continues
            self._log(f"no trace: {error}")
            self._steps = range(0)
            return False
        return True

    def _stop(self) -> None:
        first, last, self._last = self._steps[0], self._last, None
        try:
            jax.profiler.stop_trace()
            self._upload()
        except Exception as error:  # any error, such as a full disk; training continues
            self._log(f"the trace in {self._folder} could not be written: {error}")
        else:
            self._log(
                f"traced steps {first} to {last} into {self._folder}: open it by "
                f"pip install xprof, then xprof --logdir={self._folder}"
            )

    def _upload(self) -> None:
        """Copies the trace into the bucket of the run."""
        if self._here is None:
            return
        local = Path(self._here.name)
        for file in filter(Path.is_file, local.rglob("*")):
            target = self._folder / file.relative_to(local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, file.read_bytes())
        self._here.cleanup()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._last is not None:
            self._stop()


def window(text: str) -> tuple[int, int]:
    """Returns first and last step of a range such as "10:15".

    Raises:
      ValueError: the text is no such range.
    """
    parts = re.fullmatch(r"(\d+):(\d+)", text)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise ValueError(
            f"{text} is not a range of steps: give the first and the last, like {FIRST}:{LAST}"
        )
    return int(parts[1]), int(parts[2])
