"""The folder of one run: its frozen config, and whether a command may go on in it.

It holds:

    DIR/config.json     the config, frozen when the run began
    DIR/labels.txt      the names of the classes
    DIR/checkpoints/    the last states
    DIR/best/           the state of the best validation
    DIR/metrics.jsonl   the history; DIR/events.* the same for TensorBoard
    DIR/evaluation*     what tests found, with clips*.json, confusion*.png, per_class*.png
    DIR/report.html     the page
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mvit_jax.errors import UserError
from mvit_jax.files import write_whole

# Keys that say where and how fast, not what: they may change when a run goes on.
MAY_CHANGE = (
    "data.folder", "data.threads", "data.processes", "data.max_broken", "data.train_videos",
    "data.classes", "published",
    "mesh.", "remat", "checkpoint.", "log_every", "eval.batch",
)  # fmt: skip


def freeze(config: ConfigDict, workdir: str | Path, defaults: ConfigDict | None = None) -> None:
    """Writes the config on the first start; later, refuses a config that differs.

    `defaults` has the values of keys that are newer than the run.
    """
    path = Path(workdir) / "config.json"
    now = json.loads(config.to_json())
    if not path.exists():
        make(workdir)
        write_whole(path, json.dumps(now, indent=2) + "\n")
        return
    older = {} if defaults is None else _flat(json.loads(defaults.to_json()))
    before, now = older | _flat(read(path)), _flat(now)
    differing = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(differing)}): start with the "
            "same values to go on with it, or choose another --workdir"
        )


def keep_labels(workdir: str | Path, names: Sequence[str]) -> None:
    """Writes the names of the classes beside the weights, so that these tell without the data."""
    path = Path(workdir) / "labels.txt"
    if not path.exists():
        write_whole(path, "".join(f"{name}\n" for name in names))


def has_checkpoint(workdir: str | Path) -> bool:
    """Whether there is something to go on with."""
    folder = Path(workdir) / "checkpoints"
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def frozen(workdir: str | Path, defaults: ConfigDict | None = None) -> Any:  # a ConfigDict
    """The config that a run was started with; keys that are newer have the values of `defaults`."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no run: there is no config.json; check --workdir")
    started_with = ConfigDict(_tuples(read(path)))
    if defaults is None:
        return started_with.lock()
    config = ConfigDict(defaults.to_dict())  # of plain values, which take any others
    config.update(started_with)
    return config.lock()


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a config ({error}): restore it, or choose another --workdir"
        ) from None


def make(workdir: str | Path) -> None:
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the workdir {workdir} cannot be made ({error.strerror}): choose another --workdir"
        ) from None


def _tuples(value: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
