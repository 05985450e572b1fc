"""The test command: class probabilities of every video, aggregated over K clips x C crops.

    python -m mvit_jax.evaluate --workdir=DIR
    python -m mvit_jax.evaluate --workdir=DIR --shuffle_frames     (MViT, Table 9)
    python -m mvit_jax.evaluate --workdir=DIR --which=best --list=val
    python -m mvit_jax.evaluate --workdir=DIR --clips=1,3,5,7,10   (MViT, Figure A.4)
    python -m mvit_jax.evaluate --compare DIR1 DIR2 ... [--out=FILE]

Writes into DIR

    evaluation.json                 accuracies in percent
    confusion.png, per_class.png    confusion matrix and per-class accuracy as figures
    scores.npz                      per-video results: "probabilities" [videos, classes], "labels",
                                    "tested", "videos", "classes"
    videos.csv                      the tested videos (copies of a data set may differ), each with
                                    label, predicted class and its probability
    clips.json                      the example clips of the report
    report.html                     the HTML report of the run, which needs no server

--weights=plain tests the plain weights of a run that also has averaged ones (EMA). With that flag,
--which=best, --shuffle_frames or another list, all names but report.html have a suffix, like
`_val_best_plain_shuffled`. --shuffle_frames writes no clips.json. Several values of --clips are
tested in one pass over the list: the files above describe the largest value, and views.json and
views.png compare all values. --compare tests nothing; it prints a table of the runs and writes it
as an HTML page.
"""

import csv
import io
import json
import signal
from typing import Any

import jax
import numpy as np
from absl import flags

from mvit_jax.analysis import example_clips, plots, run_data
from mvit_jax.common import errors
from mvit_jax.common.files import AnyPath, to_path, write_atomically
from mvit_jax.common.text import plural
from mvit_jax.data.source import Source, fingerprint
from mvit_jax.training import build
from mvit_jax.training.distributed import coordination, failure, launch
from mvit_jax.training.evaluation.classification import Scores
from mvit_jax.training.run import runtime, workdir
from mvit_jax.training.run_folder import RunFolder, score
from mvit_jax.weights.state_dicts import WEIGHTS

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", allow_override=True)
_WHICH = flags.DEFINE_enum("which", "last", ["last", "best"], "The checkpoint to test.")
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    WEIGHTS,
    "Plain or averaged (ema) weights; by default averaged ones if the run has any.",
    allow_override=True,
)
_LIST = flags.DEFINE_enum("list", "test", ["test", "val", "train"], "The list of videos.")
_CLIPS = flags.DEFINE_list(
    "clips", None, "Clips per video, one or more numbers; by default the config's eval.clips."
)
_CROPS = flags.DEFINE_integer("crops", None, "Crops per clip, 1 or 3; by default eval.crops.")
_BATCH = flags.DEFINE_integer(
    "batch", None, "Videos at a time; by default eval.batch.", allow_override=True
)
_DATA = flags.DEFINE_string("data", None, "The data folder; by default data.folder.")
_SHUFFLE = flags.DEFINE_bool("shuffle_frames", False, "Shuffle the frames of each clip.")
_COMPARE = flags.DEFINE_bool("compare", False, "Compare the runs in the folders that follow.")
_OUT = flags.DEFINE_string("out", "comparison.html", "HTML report that --compare writes.")


def main(argv: list[str]) -> None:
    if _COMPARE.value:
        compare(argv[1:], _OUT.value)
        return
    if len(argv) > 1:
        raise errors.UserError(
            f"unknown argument {argv[1]!r}: flags look like --workdir=DIR, and folders require "
            "--compare"
        )
    if _WORKDIR.value is None:
        raise errors.UserError("give --workdir=DIR, the folder of a run")
    runtime.run_in_calling_thread()
    launch.start()
    # With several processes, JAX intercepts SIGTERM for training to save; a test saves nothing.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    runtime.cache_compiled_programs()
    with failure.fail_together():
        if jax.default_backend() == "cpu":
            runtime.keep_freed_memory()
        test(to_path(_WORKDIR.value))


def test(folder: AnyPath) -> None:
    """Tests the run in `folder` according to the flags; only process 0 writes and prints."""
    counts = numbers(_CLIPS.value)
    changes = {
        "eval.clips": max(counts, default=None),
        "eval.crops": _CROPS.value,
        "eval.batch": _BATCH.value,
        "data.folder": _DATA.value,
    }
    with RunFolder(folder, changes, weights=_WEIGHTS.value) as run:
        config, counts = run.config, counts or [run.config.eval.clips]
        options = {"list": _LIST.value, "which": _WHICH.value, "shuffle_frames": _SHUFFLE.value}
        options |= {"weights": _WEIGHTS.value}
        coordination.check_equal(
            "test", workdir.shared_values(config) | options | {"clips": counts}
        )
        videos = build.videos(config, _LIST.value)
        list_ = fingerprint(videos)
        coordination.check_equal("list of videos", list_)
        by_count, params = score(
            run, videos, which=_WHICH.value, shuffle=_SHUFFLE.value, clips=counts
        )
        step, settings = run.step(_WHICH.value), run.settings(_WHICH.value)
    if not coordination.is_process_0():
        return
    scores = by_count[counts.index(max(counts))]
    results = {
        "list": videos.list_file,
        "list_checksum": list_["names in order"],
        "checkpoint": _WHICH.value,
        "step": step,
        "clips": config.eval.clips,
        "crops": config.eval.crops,
        "ensemble": config.eval.ensemble,
        "shuffled_frames": _SHUFFLE.value,
        "plain_weights": run.averages and _WEIGHTS.value == "plain",
        "classes": list(videos.class_names),
    } | scores.metrics()
    end = suffix(results, _LIST.value)
    # Results are written before the example clips are rendered, which can fail.
    written = write(folder, results, end) + write_scores(folder, scores, videos, end)
    print(run_data.summary(folder), flush=True)
    if len(counts) > 1:
        metrics = [s.metrics() for s in by_count]
        written += write_views(folder, dict(zip(counts, metrics, strict=True)), results, end)
    if not _SHUFFLE.value:
        written.append(folder / f"clips{end}.json")
        local_params = jax.device_get(params)  # replicated, so process 0 holds them all
        with jax.default_matmul_precision(config.precision):
            pictures = example_clips.make(
                scores, videos, settings.clips, local_params, settings.model, settings.step
            )
        run_data.write_example_clips(written[-1], pictures, results)
    report = run_data.write_report(folder)
    for sentence in scores.failures:
        print(f"left out: {sentence}")
    print(f"wrote into {folder}: {', '.join(path.name for path in written)}")
    print(f"open {report} in a browser")


def numbers(texts: list[str] | None) -> list[int]:
    """Parses --clips into distinct numbers in ascending order.

    Raises:
      UserError: a text is not an integer of at least 1.
    """
    try:
        counts = sorted({int(text) for text in texts or []})
        if counts and counts[0] < 1:
            raise ValueError
    except ValueError:
        raise errors.UserError(
            f"--clips={','.join(texts or [])} must be whole numbers of at least 1, like 5 or 1,5,10"
        ) from None
    return counts


def compare(folders: list[str], out: str) -> None:
    """Prints a comparison of the runs in `folders` and writes it as the HTML page `out`."""
    if not folders:
        raise errors.UserError("--compare needs the folders of runs: --compare DIR1 DIR2")
    print(run_data.write_comparison(folders, out))
    print(f"wrote {out}")


def suffix(results: dict[str, Any], which: str) -> str:
    """Returns the file name suffix for options of a test other than the default."""
    checkpoint = results["checkpoint"]
    parts = [which if which != "test" else "", checkpoint if checkpoint != "last" else ""]
    parts.append("plain" if results["plain_weights"] else "")
    parts.append("shuffled" if results["shuffled_frames"] else "")
    return "".join(f"_{part}" for part in parts if part)


def write(folder: AnyPath, results: dict[str, Any], end: str) -> list[AnyPath]:
    """Writes the results as JSON and as figures, and returns the paths."""
    names = (f"evaluation{end}.json", f"confusion{end}.png", f"per_class{end}.png")
    paths = [folder / name for name in names]
    title = f"top-1 {results['top1']:.1f} % of {results['videos']} videos"
    title += ", frames shuffled" if results["shuffled_frames"] else ""
    write_atomically(paths[0], json.dumps(results, indent=1) + "\n")
    plots.save(plots.confusion_matrix(results["confusion"], results["classes"], title), paths[1])
    plots.save(plots.class_accuracy(results["per_class"], results["classes"], title), paths[2])
    return paths


def write_scores(folder: AnyPath, scores: Scores, videos: Source, end: str) -> list[AnyPath]:
    """Writes per-video scores (.npz) and the table of tested videos (.csv); returns the paths."""
    paths = [folder / f"scores{end}.npz", folder / f"videos{end}.csv"]
    items = [videos.item(i) for i in range(len(videos))]
    arrays, table = io.BytesIO(), io.StringIO()
    np.savez_compressed(
        arrays, probabilities=scores.probabilities.astype(np.float32), labels=scores.labels,
        tested=scores.tested, videos=np.array(items), classes=np.array(videos.class_names),
    )  # fmt: skip
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["video", "label", "predicted", "probability"])
    for i in np.flatnonzero(scores.tested).tolist():
        label, predicted = scores.labels[i], int(scores.predicted[i])
        classes = label if label.ndim == 0 else " ".join(map(str, np.flatnonzero(label)))
        rows.writerow([items[i], classes, predicted, f"{scores.probabilities[i, predicted]:.4f}"])
    write_atomically(paths[0], arrays.getvalue())
    write_atomically(paths[1], table.getvalue())
    return paths


def write_views(
    folder: AnyPath, by_count: dict[int, dict[str, Any]], results: dict[str, Any], end: str
) -> list[AnyPath]:
    """Prints accuracy by number of clips, writes it as JSON and as a figure; returns the paths."""
    measures = [name for name in ("top1", "top5", "mean_class", "map") if name in results]
    rows = [{"clips": n} | {m: metrics[m] for m in measures} for n, metrics in by_count.items()]
    print("clips  " + "  ".join(f"{m:>6}" for m in measures))
    for row in rows:
        values = (f"{row[m]:{max(len(m), 6)}.2f}" for m in measures)
        print(f"{row['clips']:5d}  " + "  ".join(values))
    keys = ("list", "checkpoint", "step", "crops", "ensemble", "videos")
    common = {k: results[k] for k in keys}
    paths = [folder / f"views{end}.json", folder / f"views{end}.png"]
    write_atomically(paths[0], json.dumps(common | {"views": rows}, indent=1) + "\n")
    shown = "map" if "map" in measures else "top1"
    line = plots.Curve(shown, [row["clips"] for row in rows], [row[shown] for row in rows], True)
    name = "mAP, %" if shown == "map" else "top-1, %"
    crops = plural(results["crops"], "crop")
    figure = plots.curves([line], name, f"clips of a video, {crops} of each")
    axes = figure.axes[0]
    axes.set(xticks=list(by_count), ylim=(None, min(axes.get_ylim()[1], 100.5)))
    plots.save(figure, paths[1])
    return paths


if __name__ == "__main__":
    errors.run(main)
