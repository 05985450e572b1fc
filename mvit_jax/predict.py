"""The most probable classes of video or image files, by a trained model.

    python -m mvit_jax.predict FILE... --workdir=DIR
    python -m mvit_jax.predict FILE... --workdir=DIR --clips=1 --top=3 --json=FILE

Probabilities are averages over K clips x C crops, as in the test program. The names of the classes
are the lines of DIR/labels.txt or else of the data folder's labels.txt. A file that cannot be
decoded is named, the others are done, and the exit status is 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mvit_jax import errors
from mvit_jax.data.sources import VideoList, read_class_names
from mvit_jax.training import experiment, workdir
from mvit_jax.training.experiment import Config

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run.", allow_override=True)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "last", ["last", "best"], "Which of its states.")
_CLIPS = flags.DEFINE_integer("clips", None, "Clips per video; the config's where not given.")
_CROPS = flags.DEFINE_integer("crops", None, "Crops per clip, 1 or 3; the config's likewise.")
_TOP = flags.DEFINE_integer("top", 5, "Classes to name per file.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write the same as JSON.")


def main(argv: list[str]) -> None:
    files = argv[1:]
    if not files or _WORKDIR.value is None:
        raise errors.UserError("give video or image files and --workdir=DIR, the folder of a run")
    folder = Path(_WORKDIR.value)
    config = workdir.frozen(folder)
    for key, value in (("eval.clips", _CLIPS.value), ("eval.crops", _CROPS.value)):
        if value is not None:
            config.update_from_flattened_dict({key: value})
    experiment.check(config)

    results = predict(config, folder, files, which=_CHECKPOINT.value, top=_TOP.value)
    if _JSON.value is not None:
        workdir.write_whole(Path(_JSON.value), json.dumps(results, indent=1) + "\n")
    failures = [result for result in results["files"] if "error" in result]
    if len(failures) < len(files):
        print(table(results["files"]))
    for result in failures:
        print(f"{result['file']} cannot be decoded: {result['error']}", file=sys.stderr)
    if failures:
        sys.exit(1)


def predict(
    config: Config, folder: Path, files: list[str], *, which: str, top: int
) -> dict[str, Any]:
    """For each file its `top` most probable classes, or why it cannot be decoded."""
    names = class_names(config, folder, experiment.num_classes(folder, which))
    labels = np.zeros(len(files), np.int32)  # nobody knows them
    videos = VideoList(tuple(files), labels, names, "the command line")
    config.eval.batch = 1  # a file on each device
    scores, step = experiment.score(config, folder, videos, which=which)
    failures = iter(scores.failures)
    results: list[dict[str, Any]] = []
    for file, probabilities, tested in zip(files, scores.probabilities, scores.tested, strict=True):
        if tested:
            order = np.argsort(-probabilities, kind="stable")[:top]
            classes = [{"class": names[i], "probability": float(probabilities[i])} for i in order]
            results.append({"file": file, "classes": classes})
        else:
            results.append({"file": file, "error": next(failures).removeprefix(f"{file}: ")})
    return {
        "workdir": str(folder),
        "checkpoint": which,
        "step": step,
        "clips": config.eval.clips,
        "crops": config.eval.crops,
        "files": results,
    }


def class_names(config: Config, folder: Path, count: int) -> tuple[str, ...]:
    """Names of a model's classes; "class 0" and so on where no labels.txt gives them."""
    places = [folder] if config.data.folder is None else [folder, Path(config.data.folder)]
    for file in (place / "labels.txt" for place in places):
        if file.is_file():
            names = read_class_names(file)
            if len(names) != count:
                raise errors.UserError(
                    f"{file} names {len(names)} classes, and the model has {count}: put the list "
                    f"that it was trained with at {folder / 'labels.txt'}"
                )
            return names
    return tuple(f"class {label}" for label in range(count))


def table(results: list[dict[str, Any]]) -> str:
    """File, class and probability, aligned; of files that could be decoded."""
    rows = [("file", "class", "probability"), ("", "", "")]
    for result in results:
        for rank, found in enumerate(result.get("classes", ())):
            file = result["file"] if rank == 0 else ""
            rows.append((file, found["class"], f"{found['probability']:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows[1] = ("-" * widths[0], "-" * widths[1], "-" * widths[2])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    errors.run(main)
