"""Files that a classification test writes."""

import csv
import io
import json
from typing import Any

import numpy as np

from mvit_jax.analysis import plots
from mvit_jax.common.files import AnyPath, write_atomically
from mvit_jax.common.text import plural
from mvit_jax.data.source import Source
from mvit_jax.training.evaluation.classification import Scores


def write(
    folder: AnyPath, scores: Scores, videos: Source, results: dict[str, Any], end: str
) -> list[AnyPath]:
    """Writes results as JSON and figures, and per-video scores; returns the paths."""
    names = (f"evaluation{end}.json", f"confusion{end}.png", f"per_class{end}.png")
    paths = [folder / name for name in names]
    title = f"top-1 {results['top1']:.1f} % of {results['videos']} videos"
    title += ", frames shuffled" if results["shuffled_frames"] else ""
    write_atomically(paths[0], json.dumps(results, indent=1) + "\n")
    plots.save(plots.confusion_matrix(results["confusion"], results["classes"], title), paths[1])
    plots.save(plots.class_accuracy(results["per_class"], results["classes"], title), paths[2])
    return paths + _write_scores(folder, scores, videos, end)


def _write_scores(folder: AnyPath, scores: Scores, videos: Source, end: str) -> list[AnyPath]:
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
