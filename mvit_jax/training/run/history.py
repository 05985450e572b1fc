"""History of a run: the file DIR/metrics.jsonl, with a line of JSON for each logged event.

Each line has a "kind", a "step" and a "time" (seconds since 1970). The kinds are:

- "start": facts on the program and the machine, at each start of the run.
- "train": means of a log interval.
- "val": results of a validation.
- "rollback": a return to the weights of step "to".
- "end": the end of a start.

All kinds but "val" have "spent": seconds of each phase (`training.run.goodput.PHASES`) since the
last line with "spent". Lines are only appended. A kill loses at most the last line; in a bucket, it
loses the lines of about the last half minute. `read` merges the lines of several starts. Training
does not read this file.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, describe_error, io_errors, is_local, to_path
from mvit_jax.common.text import plural
from mvit_jax.training.run import goodput as timing

NAME = "metrics.jsonl"


@dataclass(frozen=True)
class History:
    """History of a run, merged over its starts and sorted by step.

    Attributes:
      starts: one entry for each start of the training program, in the order of time.
      train: "step", "loss", "accuracy" (percent, of augmented clips), "grad_norm", "param_norm",
        "learning_rate" and "clips_per_second". Metrics are means since the previous line.
      val: "step", "top1", "top5", and "mean_class" or, for multi-label data, "map" (percent). For
        detection "step" and "map" alone.
      seconds: time from each start to its last line, summed over all starts.
      spent: seconds of each phase (`goodput.PHASES`), summed over all starts. The time of steps
        that a later start repeated or a rollback undid is counted as `goodput.REPEATED` instead.
        Empty if no line has "spent".
    """

    starts: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float | None:
        """Share of the wall time of all starts spent on steps that were not repeated or undone.

        From 0 to 1; None if the history has no times.
        """
        whole = sum(self.spent.values())
        return self.spent["step"] / whole if whole > 0 else None

    def __bool__(self) -> bool:
        return bool(self.starts or self.train or self.val)


class Writer:
    """Writer that appends lines to a run's history."""

    def __init__(self, workdir: str | AnyPath) -> None:
        path = to_path(workdir) / NAME
        # A kill may have left an incomplete line; the next line must not be appended to it.
        try:
            if is_local(path):
                torn = path.exists() and path.stat().st_size > 0 and not _ends_a_line(path)
                self.file = path.open("a", encoding="utf-8")
            else:
                self.file = ObjectFile(path)
                torn = self.file.content[-1:] not in (b"", b"\n")
        except io_errors() as error:
            raise UserError(f"{path} cannot be written ({describe_error(error)})") from None
        if torn:
            self.file.write("\n")

    def line(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Appends a line and flushes the file; an object in a bucket may be uploaded later."""
        entry = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class ObjectFile:
    """File-like object in a bucket, to which text or bytes are appended.

    Cloud Storage cannot append, so each upload repeats the whole content. Uploads are limited to a
    small share of a run's time. A kill loses the content since the last upload.
    """

    SECONDS, SHARE = 30.0, 0.02  # minimum between two uploads; maximum share of time for uploads

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self.content = bytearray(path.read_bytes() if path.exists() else b"")
        self._written = len(self.content)
        self._next_upload = -math.inf

    def write(self, content: str | bytes) -> None:
        self.content += content.encode() if isinstance(content, str) else content

    def flush(self) -> None:
        """Uploads the content if the last upload is long enough ago."""
        if time.monotonic() >= self._next_upload:
            self.close()

    def close(self) -> None:
        """Uploads the content if it has changed."""
        if len(self.content) == self._written:
            return
        began = time.monotonic()
        self._path.write_bytes(bytes(self.content))
        self._written, now = len(self.content), time.monotonic()
        self._next_upload = now + max(self.SECONDS, (now - began) / self.SHARE)


def _ends_a_line(path: AnyPath) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read(workdir: str | AnyPath) -> History:
    """Reads the history of a run; empty if the folder has no history.

    A start at step s continues from the state after s steps. Earlier lines about steps above s are
    therefore dropped, even if no later start repeated these steps. Incomplete lines and lines of
    unknown kinds are ignored.
    """
    path = to_path(workdir) / NAME
    if not path.is_file():
        return History()
    entries = list(_entries(path))
    starts: list[dict[str, Any]] = []
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "val": {}}
    seconds = 0.0
    begun: float | None = None
    last = 0.0
    for entry in entries:
        step = entry["step"]
        if entry["kind"] == "start":
            seconds += 0.0 if begun is None else max(last - begun, 0.0)
            begun = entry["time"]
            starts.append(entry)
            for kind, lines in by_kind.items():
                by_kind[kind] = {s: line for s, line in lines.items() if s <= step}
        elif entry["kind"] in by_kind:
            by_kind[entry["kind"]][step] = entry
        last = entry["time"]
    seconds += 0.0 if begun is None else max(last - begun, 0.0)
    train, val = ([lines[step] for step in sorted(lines)] for lines in by_kind.values())
    return History(starts, train, val, seconds, _spent(entries))


def _spent(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the seconds of each phase over all starts, and of repeated or undone steps."""
    total = dict.fromkeys([*timing.PHASES, timing.REPEATED], 0.0)
    timed = [entry for entry in entries if isinstance(entry.get("spent"), dict)]
    last_valid: float = math.inf
    # In reverse, because a step counts unless a later start or rollback returned to before it.
    since = [0, *(entry["step"] for entry in timed[:-1])][: len(timed)]
    for entry, before in reversed(list(zip(timed, since, strict=True))):
        if entry["kind"] == "rollback":  # a rollback also undoes the steps of its own interval
            last_valid = min(last_valid, float(entry["to"]))
        spent = {p: s for p, s in entry["spent"].items() if p in timing.PHASES and _is_number(s)}
        repeated = _repeated_share(before, entry["step"], last_valid) * spent.get("step", 0.0)
        for phase, seconds in spent.items():
            total[phase] += seconds
        total["step"] -= repeated
        total[timing.REPEATED] += repeated
        if entry["kind"] == "start":
            last_valid = min(last_valid, float(entry["step"]))
    return total if timed else {}


def _repeated_share(since: int, step: int, last_valid: float) -> float:
    """Returns the share of the steps after `since` up to `step` that are above `last_valid`."""
    if step <= since:  # no new step: the time is the rest of a step in progress
        return float(step > last_valid)
    return (step - max(since, min(last_valid, step))) / (step - since)


def goodput_sentence(run: History) -> str | None:
    """Returns a sentence on the goodput and the shares of the other phases; None without times."""
    if run.goodput is None:
        return None
    whole = sum(run.spent.values())
    parts = sorted(
        ((seconds / whole, name) for name, seconds in run.spent.items() if name != "step"),
        reverse=True,
    )
    phases = ", ".join(f"{name} {100 * share:.1f} %" for share, name in parts if share >= 0.0005)
    return (
        f"goodput {100 * run.goodput:.1f} %: this share of {whole:.0f} s in "
        f"{plural(len(run.starts), 'start')} went into training steps that were not repeated; "
        f"other phases: {phases}"
    )


_NEEDED = {
    "start": (),
    "train": ("loss", "accuracy", "grad_norm", "learning_rate"),
    "val": (),
    "end": (),
    "rollback": ("to",),
}


def _entries(path: AnyPath):
    """Yields the complete and valid lines of a history."""
    for line in path.read_bytes().decode(errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or entry.get("kind") not in _NEEDED:
            continue
        if type(entry.get("step")) is not int or not _is_number(entry.get("time")):
            continue
        needed = _NEEDED[entry["kind"]]
        if entry["kind"] == "val":  # detection has no top-1
            needed = ("top1", "top5") if "top1" in entry else ("map",)
        if all(_is_number(entry.get(name)) for name in needed):
            yield entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
