"""TensorBoard's events of a run. Imported where a run begins, since it brings TensorFlow along."""

from collections.abc import Callable, Mapping
from typing import Any

from clu import metric_writers

from mvit_jax.files import AnyPath, faults, why


class Events(metric_writers.SummaryWriter):
    """A fault, a full disk say, ends the events, and no training: `say` tells so once."""

    def __init__(self, workdir: str | AnyPath, say: Callable[[str], None]) -> None:
        super().__init__(str(workdir))
        self._say, self._ended = say, False

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._attempt(super().write_scalars, step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        self._attempt(super().write_texts, step, texts)

    def flush(self) -> None:
        self._attempt(super().flush)

    def close(self) -> None:
        self._attempt(super().close)

    def _attempt(self, write: Callable[..., None], *args: Any) -> None:
        if self._ended:
            return
        try:
            write(*args)
        except faults() as error:
            self._ended = True
            reason = f"they cannot be written ({why(error)})"
            self._say(f"the TensorBoard events of this run end here: {reason}")
