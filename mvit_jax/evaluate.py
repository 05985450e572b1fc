"""The test program: K clips x C crops of every video, softmax scores averaged over the views.

    python -m mvit_jax.evaluate --workdir=DIR
    python -m mvit_jax.evaluate --workdir=DIR --shuffle_frames     (MViT, Table 9)

Writes DIR/evaluation.json (accuracies in percent), DIR/confusion.png and DIR/per_class.png; with
--shuffle_frames the same with `_shuffled` in the names, likewise for another list or checkpoint.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from mvit_jax import errors
from mvit_jax.inspection import plots
from mvit_jax.training import experiment, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run.", allow_override=True)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "last", ["last", "best"], "Which of its states.")
_LIST = flags.DEFINE_enum("list", "test", ["test", "val", "train"], "Which list of videos.")
_CLIPS = flags.DEFINE_integer("clips", None, "Clips per video; the config's where not given.")
_CROPS = flags.DEFINE_integer("crops", None, "Crops per clip, 1 or 3; the config's likewise.")
_BATCH = flags.DEFINE_integer("batch", None, "Videos at a time; the config's likewise.")
_DATA = flags.DEFINE_string("data", None, "The data folder, where it is not the config's.")
_SHUFFLE = flags.DEFINE_bool("shuffle_frames", False, "Shuffle the frames of each clip.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise errors.UserError(f"unknown argument {argv[1]!r}: flags look like --workdir=DIR")
    if _WORKDIR.value is None:
        raise errors.UserError("give --workdir=DIR, the folder of a run")
    folder = Path(_WORKDIR.value)
    config = workdir.frozen(folder)
    for key, value in (
        ("eval.clips", _CLIPS.value),
        ("eval.crops", _CROPS.value),
        ("eval.batch", _BATCH.value),
        ("data.folder", _DATA.value),
    ):
        if value is not None:
            config.update_from_flattened_dict({key: value})
    experiment.check(config)

    videos = experiment.videos(config, _LIST.value)
    scores, step = experiment.score(
        config, folder, videos, which=_CHECKPOINT.value, shuffle=_SHUFFLE.value
    )
    results = {
        "list": videos.list_file,
        "checkpoint": _CHECKPOINT.value,
        "step": step,
        "clips": config.eval.clips,
        "crops": config.eval.crops,
        "shuffled_frames": _SHUFFLE.value,
        "classes": list(videos.class_names),
    } | scores.metrics()
    written = write(folder, results, _LIST.value, _CHECKPOINT.value)
    print(summary(folder))
    for sentence in scores.failures:
        print(f"left out: {sentence}")
    print("wrote " + ", ".join(str(path) for path in written))


def write(folder: Path, results: dict[str, Any], which: str, checkpoint: str) -> list[Path]:
    """The results as JSON and as pictures; what is not the default stands in the names."""
    parts = [which if which != "test" else "", checkpoint if checkpoint != "last" else ""]
    parts.append("shuffled" if results["shuffled_frames"] else "")
    suffix = "".join(f"_{part}" for part in parts if part)
    names = (f"evaluation{suffix}.json", f"confusion{suffix}.png", f"per_class{suffix}.png")
    paths = [folder / name for name in names]
    title = f"top-1 {results['top1']:.1f} % of {results['videos']} videos"
    title += ", frames shuffled" if results["shuffled_frames"] else ""
    workdir.write_whole(paths[0], json.dumps(results, indent=1) + "\n")
    plots.confusion_matrix(paths[1], results["confusion"], results["classes"], title)
    plots.class_accuracy(paths[2], results["per_class"], results["classes"], title)
    return paths


def summary(folder: Path) -> str:
    """All evaluations that a run's folder holds, as a short table."""
    rows: list[tuple[str, ...]] = [
        ("list", "frames", "checkpoint", "top-1", "top-5", "videos", "left out", "views")
    ]
    for path in sorted(folder.glob("evaluation*.json")):
        r = workdir.read(path)
        rows.append((
            Path(r["list"]).stem, "shuffled" if r["shuffled_frames"] else "in order",
            f"{r['checkpoint']}, step {r['step']}", f"{r['top1']:.2f}", f"{r['top5']:.2f}",
            str(r["videos"]), str(len(r["left_out"])), f"{r['clips']} x {r['crops']}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    errors.run(main)
