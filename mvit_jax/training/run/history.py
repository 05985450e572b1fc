"""The history of a run: DIR/metrics.jsonl, a line of JSON for all that the log told.

Lines have a "kind" and a "time" (seconds since 1970): "start" is what the program found when it
was started, "train" the means of a log interval, "val" a validation, "rollback" a return to the
weights of the step "to", "end" a start's last line. All but "val" have "spent", the seconds that
went into each of `timing.PHASES` since the line before that has it. A file is only ever appended
to, so that a kill costs at most its last line, and in a bucket those of the last half a minute or
so; `read` makes one history of what several starts wrote.
Nothing that training does depends on it.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, faults, is_local, to_path, why
from mvit_jax.common.text import plural
from mvit_jax.training.run import goodput as timing

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
      spent: seconds of each of `timing.PHASES`, all starts together, with steps that a later start
        did again or a rollback undid apart, as `timing.REPEATED`; empty where no line tells.
    """

    starts: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float | None:
        """The share of the run's wall time, all starts together, that went into steps that count,
        from 0 to 1; None where the history does not tell."""
        whole = sum(self.spent.values())
        return self.spent["step"] / whole if whole > 0 else None

    def __bool__(self) -> bool:
        return bool(self.starts or self.train or self.val)


class Writer:
    """Appends lines to a run's history."""

    def __init__(self, workdir: str | AnyPath) -> None:
        path = to_path(workdir) / NAME
        # A kill may have left half a line, which the next one must not be glued to.
        try:
            if is_local(path):
                torn = path.exists() and path.stat().st_size > 0 and not _ends_a_line(path)
                self.file = path.open("a", encoding="utf-8")
            else:
                self.file = ObjectFile(path)
                torn = self.file.content[-1:] not in (b"", b"\n")
        except faults() as error:
            raise UserError(f"{path} cannot be written ({why(error)})") from None
        if torn:
            self.file.write("\n")

    def line(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends one line and hands it to the operating system, or soon to a bucket."""
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class ObjectFile:
    """An object in a bucket, to which text or bytes are appended.

    Cloud Storage cannot append, so that each upload repeats the whole content. Uploads take a small
    share of a run's time; a kill loses the content since the last upload."""

    SECONDS, SHARE = 30.0, 0.02  # at least between two writes, and at most of the time for them

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self.content = bytearray(path.read_bytes() if path.exists() else b"")
        self._written = len(self.content)
        self._due = -math.inf

    def write(self, content: str | bytes) -> None:
        self.content += content.encode() if isinstance(content, str) else content

    def flush(self) -> None:
        if time.monotonic() >= self._due:
            self.close()

    def close(self) -> None:
        if len(self.content) == self._written:
            return
        began = time.monotonic()
        self._path.write_bytes(bytes(self.content))
        self._written, now = len(self.content), time.monotonic()
        self._due = now + max(self.SECONDS, (now - began) / self.SHARE)


def _ends_a_line(path: AnyPath) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read(workdir: str | AnyPath) -> History:
    """Reads a run's history; an empty one where the folder has none.

    A start from step s stands for a state after s steps, so what earlier lines tell of later steps
    never led to it and is left out, whether it was done again or not. Lines that are torn or of
    no known kind are passed over.
    """
    path = to_path(workdir) / NAME
    if not path.is_file():
        return History()
    entries = list(_entries(path))
    starts: list[dict[str, Any]] = []
    found: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "val": {}}
    seconds = 0.0
    begun: float | None = None
    last = 0.0
    for entry in entries:
        step = entry["step"]
        if entry["kind"] == "start":
            seconds += 0.0 if begun is None else max(last - begun, 0.0)
            begun = entry["time"]
            starts.append(entry)
            for kind, lines in found.items():
                found[kind] = {s: line for s, line in lines.items() if s <= step}
        elif entry["kind"] in found:
            found[entry["kind"]][step] = entry
        last = entry["time"]
    seconds += 0.0 if begun is None else max(last - begun, 0.0)
    train, val = ([lines[step] for step in sorted(lines)] for lines in found.values())
    return History(starts, train, val, seconds, _spent(entries))


def _spent(entries: list[dict[str, Any]]) -> dict[str, float]:
    """The seconds of each phase, all starts together, and of steps that were done again."""
    total = dict.fromkeys([*timing.PHASES, timing.REPEATED], 0.0)
    known = [entry for entry in entries if isinstance(entry.get("spent"), dict)]
    kept: float = math.inf
    # From the end, as a step counts if no later start or rollback went back before it.
    since = [0, *(entry["step"] for entry in known[:-1])][: len(known)]
    for entry, before in reversed(list(zip(known, since, strict=True))):
        if entry["kind"] == "rollback":  # which undid what it tells of, too
            kept = min(kept, float(entry["to"]))
        spent = {p: s for p, s in entry["spent"].items() if p in timing.PHASES and _is_number(s)}
        repeated = _lost(before, entry["step"], kept) * spent.get("step", 0.0)
        for phase, seconds in spent.items():
            total[phase] += seconds
        total["step"] -= repeated
        total[timing.REPEATED] += repeated
        if entry["kind"] == "start":
            kept = min(kept, float(entry["step"]))
    return total if known else {}


def _lost(since: int, step: int, kept: float) -> float:
    """The share of the steps after `since` up to `step` that are above `kept`."""
    if step <= since:  # none was done: what is told of is the end of one that was under way
        return float(step > kept)
    return (step - max(since, min(kept, step))) / (step - since)


def goodput_sentence(told: History) -> str | None:
    """How much of a run's time went into steps that count, and where the rest of it went."""
    if told.goodput is None:
        return None
    whole = sum(told.spent.values())
    parts = sorted(
        ((seconds / whole, name) for name, seconds in told.spent.items() if name != "step"),
        reverse=True,
    )
    others = ", ".join(f"{name} {100 * share:.1f} %" for share, name in parts if share >= 0.0005)
    return (
        f"goodput {100 * told.goodput:.1f} % of {whole:.0f} s in "
        f"{plural(len(told.starts), 'start')} went into steps that count; {others}"
    )


_NEEDED = {
    "start": (),
    "train": ("loss", "accuracy", "grad_norm", "learning_rate"),
    "val": ("top1", "top5"),
    "end": (),
    "rollback": ("to",),
}


def _entries(path: AnyPath):
    """The whole lines of a history, as dicts."""
    for line in path.read_bytes().decode(errors="replace").split("\n"):
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
