"""Files that a test of action detection writes."""

import io
import json
from typing import Any

import numpy as np

from mvit_jax.analysis import plots
from mvit_jax.common.files import AnyPath, write_atomically
from mvit_jax.data.formats.ava_tables import write_detections
from mvit_jax.training.evaluation.boxes import BoxScores


def write(folder: AnyPath, scores: BoxScores, results: dict[str, Any], end: str) -> list[AnyPath]:
    """Writes results as JSON and a figure, and the scores of all boxes; returns the paths."""
    names = ("evaluation{}.json", "per_class{}.png", "detections{}.csv", "boxes{}.npz")
    paths = [folder / name.format(end) for name in names]
    title = f"mAP {results['map']:.1f} % on {results['videos']} key frames"
    title += ", frames shuffled" if results["shuffled_frames"] else ""
    write_atomically(paths[0], json.dumps(results, indent=1) + "\n")
    figure = plots.class_accuracy(
        results["per_class"], results["classes"], title, measure="average precision, %"
    )
    plots.save(figure, paths[1])
    frames, clips = scores.clips.key_frames, scores.clips
    counts = np.diff(frames.starts)
    rows = np.flatnonzero(np.repeat(scores.tested, counts))
    videos = np.repeat(np.array(frames.videos)[frames.video], counts)[rows]
    seconds = np.repeat(frames.second, counts)[rows]
    ids = results["class_ids"]
    write_detections(
        paths[2], videos.tolist(), seconds, frames.box[rows],
        scores.probabilities[rows][:, np.array(ids) - 1], ids,
    )  # fmt: skip
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays, probabilities=scores.probabilities[rows].astype(np.float32),
        boxes=frames.box[rows], video=videos, second=seconds, classes=np.array(clips.class_names),
    )  # fmt: skip
    write_atomically(paths[3], arrays.getvalue())
    return paths
