"""What a run's folder holds, read for the pages about it; and the pages, written.

Besides config and weights it holds:

    DIR/metrics.jsonl       the history, see `history`
    DIR/evaluation*.json    what the test program found
    DIR/clips*.json         the clips that its page shows, see `sheet`
    DIR/report.html         the page
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from mvit_jax.analysis import report
from mvit_jax.analysis.report import Run
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, faults, to_path, write_whole
from mvit_jax.config import base
from mvit_jax.data.formats.video_list import read_class_names
from mvit_jax.training import build
from mvit_jax.training.run import history, workdir

REPORT = "report.html"
# Without these a file is not what the test program writes.
_EVALUATION = {
    "list", "checkpoint", "step", "clips", "crops", "shuffled_frames", "classes", "top1", "top5",
    "videos", "left_out", "per_class", "confusion",
}  # fmt: skip
_SHEET = {"of", "examples", "mistakes", "wrong", "no_attention"}


def read(folder: str | AnyPath) -> Run:
    """Reads a run's or a converted folder; what is not there is a gap.

    Raises:
      UserError: the folder holds no run, or a file in it is not what it should be.
    """
    folder = to_path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no run (there is no config.json): name a folder that training or "
            "convert made"
        )
    config = workdir.frozen(folder)
    told = history.read(folder)
    tests = sorted(  # the test by default first, those of shuffled frames last
        evaluations(folder),
        key=lambda e: (
            e["shuffled_frames"],
            Path(e["list"]).name != config.data.test_list,
            e["checkpoint"] != "last",
        ),
    )
    classes = _classes(folder, told, tests)
    run = Run(
        folder=str(folder),
        config=_flat(config),
        defaults=_flat(base()),
        model=None if classes is None else build.model_config(config, classes),
        starts=told.starts,
        train=told.train,
        val=told.val,
        seconds=told.seconds,
        spent=told.spent,
        evaluations=tests,
    )
    if run.test is None:
        return run
    marks = report.marks(run.test)
    for path in sorted(folder.glob("clips*.json")):
        sheet = _whole(path, _SHEET)
        if sheet["of"] == marks:  # else it is an older test's, left by a kill
            return replace(run, sheet=sheet)
    return run


def write_report(folder: str | AnyPath) -> AnyPath:
    """Writes the page of a run from what its folder holds, whole or not at all."""
    path = to_path(folder) / REPORT
    write_whole(path, report.report(read(folder)))
    return path


def write_comparison(folders: Sequence[str | AnyPath], path: str | AnyPath) -> str:
    """Writes the page of several runs side by side; gives the same as a table for a terminal."""
    runs = [read(folder) for folder in folders]
    write_whole(path, report.comparison(runs))
    return report.comparison_table(runs)


def keep_sheet(path: AnyPath, sheet: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Writes the clips of an evaluation's page."""
    write_whole(path, json.dumps(sheet | {"of": report.marks(evaluation)}) + "\n")


def evaluations(folder: AnyPath) -> list[dict[str, Any]]:
    """What the test program wrote into a folder, in the order of the files' names."""
    return [_whole(path, _EVALUATION) for path in sorted(folder.glob("evaluation*.json"))]


def _whole(path: AnyPath, keys: set[str]) -> dict[str, Any]:
    """What the test program wrote, or one sentence where it is not that any more."""
    try:
        found = json.loads(path.read_text())
    except (*faults(), ValueError):
        found = None
    if not isinstance(found, dict) or not keys <= found.keys():
        raise UserError(
            f"{path} is not what `evaluate` writes, or is damaged: delete it and test again"
        )
    return found


def _classes(
    folder: AnyPath, told: history.History, evaluations: list[dict[str, Any]]
) -> int | None:
    if evaluations:
        return len(evaluations[0]["classes"])
    if told.starts and "classes" in told.starts[-1]:
        return told.starts[-1]["classes"]
    labels = folder / "labels.txt"
    return len(read_class_names(labels)) if labels.is_file() else None


def _flat(config: Any) -> dict[str, Any]:
    """A config as JSON has it, flattened: `{"optim.lr": 1e-3}`."""
    return flatten_dict(json.loads(config.to_json()), sep=".")
