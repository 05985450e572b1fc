"""The history of a run: DIR/metrics.jsonl, a line of JSON for all that the log told.

Lines have a "kind" and a "time" (seconds since 1970): "start" is what the program found when it was
started, "train" the means of a log interval, "val" a validation. A file is only ever appended to,
so that a kill costs at most its last line; `read` makes one history of what several starts wrote.
Nothing that training does depends on it.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvit_jax.errors import UserError

NAME = "metrics.jsonl"


@dataclass(frozen=True)
class History:
    """What a run's history tells, in the order of steps.

    Attributes:
      starts: one for each time that the training program was started, in the order of time.
      train: "step", "loss", "accuracy" (percent, of augmented clips), "grad_norm", "param_norm",
        "learning_rate" and "clips_per_second", means since the line before.
      val: "step", "top1" and "top5" (percent).
      seconds: how long training ran, all starts together, from each start to its last line.
    """

    starts: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.starts or self.train or self.val)


class Writer:
    """Appends lines to a run's history."""

    def __init__(self, workdir: str | Path) -> None:
        path = Path(workdir) / NAME
        # A kill may have left half a line, which the next one must not be glued to.
        try:
            torn = path.exists() and path.stat().st_size > 0 and not _ends_a_line(path)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from None
        if torn:
            self.file.write("\n")

    def line(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends one line and hands it to the operating system."""
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read(workdir: str | Path) -> History:
    """Reads a run's history; an empty one where the folder has none.

    A start from step s stands for a state after s steps, so what earlier lines tell of later steps
    never led to it and is left out, whether it was done again or not. Lines that are torn or of
    no known kind are passed over.
    """
    path = Path(workdir) / NAME
    if not path.is_file():
        return History()
    starts: list[dict[str, Any]] = []
    found: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "val": {}}
    seconds = 0.0
    begun: float | None = None
    last = 0.0
    for entry in _entries(path):
        step = entry["step"]
        if entry["kind"] == "start":
            seconds += 0.0 if begun is None else max(last - begun, 0.0)
            begun = entry["time"]
            starts.append(entry)
            for kind, lines in found.items():
                found[kind] = {s: line for s, line in lines.items() if s <= step}
        else:
            found[entry["kind"]][step] = entry
        last = entry["time"]
    seconds += 0.0 if begun is None else max(last - begun, 0.0)
    train, val = ([lines[step] for step in sorted(lines)] for lines in found.values())
    return History(starts, train, val, seconds)


_NEEDED = {
    "start": (),
    "train": ("loss", "accuracy", "grad_norm", "learning_rate"),
    "val": ("top1", "top5"),
}


def _entries(path: Path):
    """The whole lines of a history, as dicts."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or entry.get("kind") not in _NEEDED:
            continue
        if type(entry.get("step")) is not int or not _is_number(entry.get("time")):
            continue
        if all(_is_number(entry.get(name)) for name in _NEEDED[entry["kind"]]):
            yield entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
