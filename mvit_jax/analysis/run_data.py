"""Reads workdirs and writes their HTML reports.

Besides config and weights a workdir contains:

    DIR/metrics.jsonl       the history, see `training.run.history`
    DIR/evaluation*.json    results of the test program
    DIR/clips*.json         example clips of a test, see `analysis.example_clips`
    DIR/report.html         the HTML report
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
from mvit_jax.common.files import AnyPath, io_errors, to_path, write_atomically
from mvit_jax.common.text import table
from mvit_jax.config import base
from mvit_jax.data.formats.video_list import read_class_names
from mvit_jax.training import build
from mvit_jax.training.run import history, workdir

REPORT = "report.html"
# Required keys of evaluation*.json, of classification and of detection, and of clips*.json.
_COMMON = {
    "list", "checkpoint", "step", "clips", "crops", "shuffled_frames", "classes", "videos",
    "left_out", "per_class",
}  # fmt: skip
_CLASSIFICATION, _DETECTION = {"top1", "top5", "confusion"}, {"map", "map_by_group", "counts"}
_SHEET = {"of", "examples"}


def read(folder: str | AnyPath) -> Run:
    """Reads a workdir or a folder that `convert` wrote; missing files leave fields empty.

    Raises:
      UserError: the folder has no config.json, or a file in it is damaged.
    """
    folder = to_path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no run (it has no config.json): give the folder of a run or of "
            "converted weights"
        )
    config = workdir.recorded_config(folder)
    log = history.read(folder)
    tests = sorted(  # the default test first, tests with shuffled frames last
        evaluations(folder),
        key=lambda e: (
            e["shuffled_frames"],
            Path(e["list"]).name != config.data.test_list,
            e.get("full_frame", False) != config.eval.full_frame,
            e["checkpoint"] != "last",
            e.get("plain_weights", False),
        ),
    )
    classes = _classes(folder, log, tests)
    run = Run(
        folder=str(folder),
        config=_flat(config),
        defaults=_flat(base()),
        model=None if classes is None else build.model_config(config, classes),
        starts=log.starts,
        train=log.train,
        val=log.val,
        seconds=log.seconds,
        spent=log.spent,
        evaluations=tests,
    )
    if run.test is None:
        return run
    identity = report.identify(run.test)
    for path in sorted(folder.glob("clips*.json")):
        sheet = _load(path, _SHEET)
        # A killed test leaves an earlier test's file; pictures made before there was the key
        # "no_grad_cam" do not fit the caption. Sheets of detection have "missed".
        if sheet["of"] == identity and ("no_grad_cam" in sheet or "missed" in sheet):
            return replace(run, sheet=sheet)
    return run


def write_report(folder: str | AnyPath) -> AnyPath:
    """Writes the HTML report of a workdir atomically, and returns its path."""
    path = to_path(folder) / REPORT
    write_atomically(path, report.report(read(folder)))
    return path


def write_comparison(folders: Sequence[str | AnyPath], path: str | AnyPath) -> str:
    """Writes the HTML comparison of several workdirs; returns the comparison as plain text."""
    runs = [read(folder) for folder in folders]
    write_atomically(path, report.comparison(runs))
    return report.comparison_table(runs)


def write_example_clips(path: AnyPath, sheet: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Writes the example clips of an evaluation as JSON."""
    write_atomically(path, json.dumps(sheet | {"of": report.identify(evaluation)}) + "\n")


def evaluations(folder: str | AnyPath) -> list[dict[str, Any]]:
    """Reads a workdir's evaluations, ordered by file name."""
    paths = sorted(to_path(folder).glob("evaluation*.json"))
    return [_load(path, _COMMON, _CLASSIFICATION, _DETECTION) for path in paths]


def checkpoint(evaluation: dict[str, Any]) -> str:
    """Returns the checkpoint of an evaluation in words, like "last, step 300"."""
    plain = ", plain weights" if evaluation.get("plain_weights") else ""
    return f"{evaluation['checkpoint']}, step {evaluation['step']}{plain}"


def _views(evaluation: dict[str, Any]) -> str:
    if "counts" in evaluation:  # detection
        return "whole frame" if evaluation.get("full_frame") else "centre"
    return f"{evaluation['clips']} x {evaluation['crops']}"


def summary(folder: str | AnyPath) -> str:
    """Returns a text table of all evaluations in a run's folder, at most 60 columns wide.

    A test with shuffled frames is omitted if none of the tests in order is of the same list and
    checkpoint. "class" is the mean class accuracy. Columns
    without numbers, like "mAP", are omitted.
    """
    rows: list[tuple[str, ...]] = [
        ("list", "frames", "step", "top-1", "top-5", "class", "mAP", "videos", "left out", "views")
    ]
    names = ("top1", "top5", "mean_class", "map")
    tests = evaluations(folder)
    in_order = [report.identify(r) for r in tests if not r["shuffled_frames"]]
    for r in tests:
        # A shuffled test of an earlier list or step stays in the folder, but compares to no other.
        if r["shuffled_frames"] and in_order and report.identify(r) not in in_order:
            continue
        rows.append((
            Path(r["list"]).name.partition(".")[0],
            "shuffled" if r["shuffled_frames"] else "in order",
            checkpoint(r).replace(" step", ""),
            *(f"{r[name]:.2f}" if name in r else "" for name in names),
            str(r["videos"]), str(len(r["left_out"])), _views(r),
        ))  # fmt: skip
    columns = [i for i in range(len(rows[0])) if any(row[i] not in ("", "0") for row in rows[1:])]
    header, *rows = [tuple(row[i] for i in columns) for row in rows]
    return table(header, rows, numbers_right=False)


def _load(path: AnyPath, keys: set[str], *either: set[str]) -> dict[str, Any]:
    """Reads a JSON file of the test program.

    Raises:
      UserError: one of `keys` is missing, or one of each set of `either`.
    """
    try:
        content = json.loads(path.read_text())
    except (*io_errors(), ValueError):
        content = None
    choices = [keys | more for more in either] or [keys]
    if not isinstance(content, dict) or not any(each <= content.keys() for each in choices):
        raise UserError(
            f"{path} is damaged, or not written by `evaluate`: delete it and test again"
        )
    return content


def _classes(
    folder: AnyPath, log: history.History, evaluations: list[dict[str, Any]]
) -> int | None:
    """Returns the number of classes, or None if no file records it."""
    if log.starts and "classes" in log.starts[-1]:
        return log.starts[-1]["classes"]
    if evaluations:
        return len(evaluations[0]["classes"])
    labels = folder / "labels.txt"
    return len(read_class_names(labels)) if labels.is_file() else None


def _flat(config: Any) -> dict[str, Any]:
    """Flattens a config to JSON values: `{"optim.lr": 1e-3}`."""
    return flatten_dict(json.loads(config.to_json()), sep=".")
