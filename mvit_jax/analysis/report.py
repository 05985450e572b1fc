"""HTML reports of a run, and comparisons of several runs.

A report is one file that opens from disk: it loads nothing and contains no scripts. Names of
classes and files are not trusted, so the templates beside this file escape all values.
"""

import datetime
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mvit_jax.analysis import plots
from mvit_jax.analysis.plots import Curve
from mvit_jax.common.files import expanded
from mvit_jax.common.text import table
from mvit_jax.models import summary
from mvit_jax.models.cost import Cost, cost
from mvit_jax.models.plan import MViTConfig

_MEASURES = {"top1": "top-1", "map": "mAP"}
PAIRS = 12  # most confused pairs of classes
GAP = "–"  # for a missing value


@dataclass(frozen=True)
class Run:
    """The contents of a workdir as plain values.

    Attributes:
      folder: the workdir's path, as typed in commands.
      config: the flattened config, `{"optim.lr": 1e-3}`.
      defaults: the flattened default config, or None if unknown.
      model: the architecture, or None if the number of classes is unknown.
      starts, train, val, seconds, spent: as in `training.run.history.History`.
      evaluations: results of the test program, the default test first.
      sheet: example clips of `test`, as `analysis.example_clips.make` returns them.
    """

    folder: str
    config: dict[str, Any]
    defaults: dict[str, Any] | None = None
    model: MViTConfig | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    sheet: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return Path(self.folder).absolute().name or self.folder

    @property
    def test(self) -> dict[str, Any] | None:
        """The run's main evaluation: the first with the frames in order."""
        return next((e for e in self.evaluations if not e["shuffled_frames"]), None)

    @property
    def shuffled(self) -> dict[str, Any] | None:
        """The same test with shuffled frames."""
        test = self.test
        shuffled = (e for e in self.evaluations if e["shuffled_frames"])
        return next((e for e in shuffled if test and identify(e) == identify(test)), None)

    @property
    def cost(self) -> Cost | None:
        """Parameters and multiply-adds.

        The history's last start may record both numbers, with custom modules included. Otherwise
        both are computed from the architecture alone.
        """
        start = self.starts[-1] if self.starts else {}
        if {"parameters", "multiply_adds"} <= start.keys():
            return Cost(start["parameters"], start["multiply_adds"])
        return None if self.model is None else cost(self.model)

    @property
    def goodput(self) -> float | None:
        """Percent of the wall time spent in steps (not repeated ones), or None if not recorded."""
        total = sum(self.spent.values())
        return 100 * self.spent["step"] / total if total > 0 else None

    @property
    def steps(self) -> int | None:
        """The last step in the history or in an evaluation."""
        recorded = [e["step"] for e in (*self.train, *self.val, *self.evaluations)]
        return max(recorded) if recorded else None

    @property
    def measure(self) -> str:
        """Key of the validations that the report draws: "map" for detection, else "top1"."""
        return "top1" if all("top1" in line for line in self.val) else "map"

    def changed_keys(self) -> dict[str, Any]:
        """Returns the keys of the config that differ from the defaults, with their values."""
        if self.defaults is None:
            return {}
        missing = object()
        return {k: v for k, v in self.config.items() if self.defaults.get(k, missing) != v}


def report(run: Run) -> str:
    """Returns the HTML report of a run."""
    test = run.test
    return _render(
        "report.html.jinja",
        run=run,
        test=test,
        history=_history_figures(run),
        time_spent=_time_figure(run),
        evaluations=[(e, evaluate_command(run, e)) for e in run.evaluations],
        test_command=evaluate_command(run, None),
        shuffle_command=evaluate_command(run, (test or {}) | {"shuffled_frames": True}),
        pictures=_test_figures(test) if test else {},
        pairs=most_confused_pairs(test["confusion"], test["classes"])
        if test and "confusion" in test
        else [],
        per_class=_per_class(test) if test else [],
        measure=_MEASURES[run.measure],
        stages=[] if run.model is None else summary.stages(run.model),
        header=summary.HEADER,
        sections=_sections(run),
        things="images" if run.model and run.model.frames == 1 else "videos",
    )


def comparison(runs: Sequence[Run]) -> str:
    """Returns the HTML comparison of several runs."""
    names = distinct_names(runs)
    header, *rows = _figures(runs)
    named = list(zip(names, runs, strict=True))
    loss = [Curve(n, *_columns(r.train, "loss")) for n, r in named if r.train]
    val = [Curve(n, *_columns(r.val, r.measure), dots=True) for n, r in named if r.val]
    measures = " or ".join(sorted({_MEASURES[r.measure] for r in runs if r.val}))
    figures = [
        _figure(plots.curves(lines, y), label, element)
        for lines, y, label, element in (
            (loss, "training loss", "Training loss of all runs over steps", "loss"),
            (val, f"validation {measures}, %", "Validation of all runs over steps", "val"),
        )
        if lines
    ]
    return _render(
        "comparison.html.jinja",
        names=names, runs=runs, header=header, rows=rows, figures=figures,
        differing=_differing(runs),
        note=different_tests(runs),
        silent=[n for n, r in named if not (r.train or r.val)],
    )  # fmt: skip


def comparison_table(runs: Sequence[Run]) -> str:
    """Returns the comparison as plain text, without curves."""
    header, *rows = _figures(runs)
    text = table(header, rows)
    if differing := _differing(runs):
        text += "\n\n" + table(("config", *distinct_names(runs)), differing)
    if note := different_tests(runs):
        text += f"\n\nnote: {note}"
    return text


def different_tests(runs: Sequence[Run]) -> str | None:
    """Returns a sentence if the runs' accuracies are of different videos or classes, else None.

    Lists are compared by their file name, number of videos, classes and, where recorded, the names
    of the videos.
    """
    tests = [(name, run.test) for name, run in zip(distinct_names(runs), runs, strict=True)]
    tested = [(name, test) for name, test in tests if test is not None]
    if not any(_differ(tested[0][1], test) for _, test in tested[1:]):
        return None
    lists = ", ".join(
        f"{name} on {Path(test['list']).name} ({whole(test['videos'])} videos of "
        f"{whole(len(test['classes']))} classes)"
        for name, test in tested
    )
    return f"the runs were tested on different lists, so their accuracies do not compare: {lists}"


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns True if two evaluations are of different lists."""
    recorded = [test["list_checksum"] for test in (one, other) if "list_checksum" in test]
    # Videos that could not be decoded are part of the list.
    counts = {test["videos"] + len(test["left_out"]) for test in (one, other)}
    names = {Path(test["list"]).name for test in (one, other)}
    if len(recorded) == 2:
        return recorded[0] != recorded[1]
    return len(counts) > 1 or len(names) > 1 or one["classes"] != other["classes"]


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Returns the folders' names, or their paths if two folders share a name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [run.folder for run in runs]


def most_confused_pairs(
    confusion: Sequence[Sequence[int]], names: Sequence[str], limit: int = PAIRS
) -> list[tuple[str, str, int, float]]:
    """Returns the most often confused pairs of classes.

    Args:
      confusion: number of videos per true class (row) and predicted class (column).
      names: of the classes.
      limit: number of pairs at most.

    Returns:
      Tuples of true class, predicted class, number of videos, and percent of the true class's
      videos; most videos first.
    """
    counts = np.array(confusion, np.int64)
    of_class = counts.sum(1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(i), len(names)) for i in order]
    return [
        (names[i], names[j], int(counts[i, j]), 100 * counts[i, j] / of_class[i])
        for i, j in pairs
        if counts[i, j]
    ]


def identify(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of an evaluation that identify its test.

    The video list is identified by its file name alone, as the data may have moved between two
    evaluations.
    """
    names = ["checkpoint", "step", "clips", "crops", "videos", "classes"]
    # Newer than some files.
    names += [name for name in ("plain_weights", "full_frame") if evaluation.get(name)]
    return {name: evaluation[name] for name in names} | {"list": Path(evaluation["list"]).name}


def evaluate_command(run: Run, evaluation: dict[str, Any] | None) -> str:
    """Returns the command that reproduces an evaluation; for None, the default test's command."""
    words = ["python", "-m", "mvit_jax.evaluate", f"--workdir={run.folder}"]
    e = evaluation or {}
    file = Path(e["list"]).name if "list" in e else run.config.get("data.test_list")
    for which in ("val", "train"):
        if file == run.config.get(f"data.{which}_list") != run.config.get("data.test_list"):
            words.append(f"--list={which}")
    if e.get("checkpoint", "last") != "last":
        words.append(f"--which={e['checkpoint']}")
    if e.get("plain_weights"):
        words.append("--weights=plain")
    for key in ("clips", "crops"):
        if key in e and e[key] != run.config.get(f"eval.{key}"):
            words.append(f"--{key}={e[key]}")
    if e.get("full_frame", False) != (run.config.get("eval.full_frame") or False) and e:
        words.append(f"--full_frame={e.get('full_frame', False)}")
    folder = run.config.get("data.folder")
    listed = Path(e.get("list", ""))  # an absolute path, except for a TFDS dataset
    if folder is None or (listed.is_absolute() and listed.parent != expanded(folder).absolute()):
        words.append(f"--data={listed.parent if listed.is_absolute() else 'DIR'}")
    if e.get("shuffled_frames"):
        words.append("--shuffle_frames")
    return shlex.join(words)


def _sections(run: Run) -> list[tuple[str, str]]:
    """Returns ids and titles of the report's sections."""
    tested = [("classes", "Classes"), ("clips", "Clips"), ("mistakes", "Worst mistakes")]
    if run.test and "counts" in run.test:
        tested[1] = ("clips", "Key frames")
    broken = [("left_out", "Left out")] if run.test and run.test["left_out"] else []
    return [
        ("training", "Training"),
        *([("time", "Time")] if run.goodput is not None else []),
        ("test", "Test"),
        *([*tested, *broken] if run.test else []),
        *([("model", "Model")] if run.model else []),
        ("config", "Config"),
        ("machine", "Machine and commands"),
    ]


def _history_figures(run: Run) -> list[Markup]:
    """Returns figures of loss, accuracies, learning rate and gradient norm over steps."""
    if not run.train and not run.val:
        return []
    accuracy = [Curve("training clips", *_columns(run.train, "accuracy"))] if run.train else []
    if run.val:
        name = f"validation, {_MEASURES[run.measure]}"
        accuracy.append(Curve(name, *_columns(run.val, run.measure), dots=True))
    drawn = [_figure(plots.curves(accuracy, "accuracy, %"), "Accuracy over steps", "accuracy")]
    for key, name, label in (
        ("loss", "loss", "Training loss over steps"),
        ("learning_rate", "learning rate", "Learning rate over steps"),
        ("grad_norm", "gradient norm", "Norm of the gradient over steps"),
    ):
        if run.train:
            figure = plots.curves([Curve(name, *_columns(run.train, key))], name)
            drawn.append(_figure(figure, label, key))
    return [*drawn[1:2], drawn[0], *drawn[2:]]


def _time_figure(run: Run) -> Markup | None:
    """Returns the breakdown of the wall time, the largest part on top."""
    if run.goodput is None:
        return None
    parts = {name: seconds for name, seconds in run.spent.items() if seconds > 0}
    figure = plots.percentages(parts, "of the wall time, %", marked="step")
    return _figure(figure, "Wall time by phase", "time")


def _test_figures(test: dict[str, Any]) -> dict[str, Markup]:
    names = test["classes"]
    if "counts" in test:
        bars = plots.class_accuracy(test["per_class"], names, measure="average precision, %")
        return {"classes": _figure(bars, "Average precision of each class", "classes")}
    return {
        "confusion": _figure(
            plots.confusion_matrix(test["confusion"], names), "Confusion matrix", "confusion"
        ),
        "classes": _figure(
            plots.class_accuracy(test["per_class"], names), "Accuracy of each class", "classes"
        ),
    }


def _per_class(test: dict[str, Any]) -> list[tuple[str, int, float | None]]:
    counts = test.get("truth_per_class") or [sum(row) for row in test["confusion"]]
    return list(zip(test["classes"], counts, test["per_class"], strict=True))


def _figure(figure: Any, label: str, element: str) -> Markup:
    return Markup(plots.svg(figure, label, element))  # matplotlib has escaped the class names


def _columns(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[int | float]]:
    return [line["step"] for line in lines], [line[key] for line in lines]


def _figures(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Returns a table's header and one row of results per run."""
    boxes = any(run.test and "counts" in run.test for run in runs)
    measures = {"map": "mAP"} if boxes else {}
    if not boxes or any(run.test and "top1" in run.test for run in runs):
        measures = {"top1": "top-1", "top5": "top-5"} | measures
    rows = [("run", "model", "parameters", "mult-adds", "steps", "time", *measures.values(),
             "shuffled", "videos", "views")]  # fmt: skip
    for name, run in zip(distinct_names(runs), runs, strict=True):
        test, shuffled, total = run.test, run.shuffled, run.cost
        rows.append((
            name,
            str(run.config.get("model.variant", GAP)),
            GAP if total is None else whole(total.parameters),
            GAP if total is None else billions(total.multiply_adds),
            whole(run.steps) if run.steps else GAP,
            duration(run.seconds) if run.starts else GAP,
            *(_number(test, key) for key in measures),
            _number(shuffled, "top1" if shuffled and "top1" in shuffled else "map"),
            GAP if test is None else whole(test["videos"]),
            GAP if test is None else f"{test['clips']} x {test['crops']}",
        ))  # fmt: skip
    return rows


def _number(test: dict[str, Any] | None, key: str) -> str:
    return GAP if test is None or key not in test else f"{test[key]:.2f}"


def _differing(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Returns the keys in which the configs differ, with the value in each run."""
    keys = sorted({key for run in runs for key in run.config})
    rows = [(key, *(value(run.config.get(key)) for run in runs)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def whole(number: int) -> str:
    return f"{number:,}"


def billions(number: int) -> str:
    """Formats multiply-adds as the papers do: "70.5 G"."""
    return f"{number / 1e9:.1f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def value(entry: Any) -> str:
    """Formats a config value; None becomes a dash."""
    if entry is None:
        return GAP
    if isinstance(entry, list | tuple):
        return f"({', '.join(map(value, entry))}{',' if len(entry) == 1 else ''})"
    return str(entry)


def _moment(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _percent(number: float | None, digits: int = 1) -> str:
    return GAP if number is None or math.isnan(number) else f"{number:.{digits}f} %"


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "whole": whole, "billions": billions, "duration": duration, "value": value,
        "moment": _moment, "percent": _percent,
    }  # fmt: skip
    return environment.get_template(template).render(**values)
