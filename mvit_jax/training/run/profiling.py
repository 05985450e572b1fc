"""A trace of a few training steps, for TensorBoard and xprof."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from mvit_jax.common.files import AnyPath, is_local, to_path, write_whole

FIRST, LAST = 10, 15  # by default; by then all is compiled and the input has settled


class Profile:
    """Traces some steps of a run into `WORKDIR/profile`, each under its number.

    A context, so that a trace is also ended where training stops in the middle of it.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        window: tuple[int, int] | None,
        *,
        start: int,
        steps: int,
        say: Callable[[str], object],
    ) -> None:
        """Nothing is traced where `window` is None.

        Args:
          folder: the workdir.
          window: first and last step to trace, counted from 1 at this start of the run. One that
            goes beyond the run's end is moved to its last steps.
          start: steps done before this start.
          steps: of the whole run.
          say: is told, in one line, where the trace is.
        """
        self._folder, self._say = to_path(folder) / "profile", say
        # Where the trace of a run in a bucket is written first, as JAX knows folders alone.
        self._here: tempfile.TemporaryDirectory[str] | None = None
        self._steps = range(0)
        self._last: int | None = None  # step that the trace holds, while one is running
        if window is not None:
            last = min(start + window[1], steps)
            # Moved, it leaves out the first step of a start where it can: that one compiles.
            earliest = max(start + min(2, window[0]), last - (window[1] - window[0]))
            self._steps = range(min(start + window[0], earliest, last), last + 1)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Traces what runs inside, the step `number` of the run, from 1, if it is to be traced."""
        if number not in self._steps or not self._started():
            yield
            return
        self._last = number
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._steps[-1]:
            jax.block_until_ready(jax.live_arrays())  # the devices are behind
            self._stop()

    def _started(self) -> bool:
        """Starts the trace where it does not run yet; False where that fails."""
        if self._last is not None:
            return True
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would be most of the trace
        try:
            if not is_local(self._folder):
                self._here = tempfile.TemporaryDirectory()
            folder = self._here.name if self._here else self._folder
            jax.profiler.start_trace(folder, profiler_options=options)
        except Exception as error:  # another trace runs, say: the training goes on
            self._say(f"no trace: {error}")
            self._steps = range(0)
            return False
        return True

    def _stop(self) -> None:
        first, last, self._last = self._steps[0], self._last, None
        try:
            jax.profiler.stop_trace()
            self._hand_over()
        except Exception as error:  # whatever it is, a full disk say: the training goes on
            self._say(f"the trace in {self._folder} could not be written: {error}")
        else:
            self._say(
                f"traced steps {first} to {last} into {self._folder}: open it by "
                f"pip install xprof, then xprof --logdir={self._folder}"
            )

    def _hand_over(self) -> None:
        """Brings a trace into the bucket of the run."""
        if self._here is None:
            return
        written = Path(self._here.name)
        for file in filter(Path.is_file, written.rglob("*")):
            target = self._folder / file.relative_to(written).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, file.read_bytes())
        self._here.cleanup()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._last is not None:
            self._stop()


def window(text: str) -> tuple[int, int]:
    """First and last step of "10:15".

    Raises:
      ValueError: it is no such range.
    """
    parts = re.fullmatch(r"(\d+):(\d+)", text)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise ValueError(f"{text} is no range of steps: give first and last, {FIRST}:{LAST}")
    return int(parts[1]), int(parts[2])
