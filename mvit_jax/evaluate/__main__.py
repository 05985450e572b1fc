"""The test command: class probabilities of every video, aggregated over K clips x C crops.

For action detection: class probabilities of every box, and the frame mAP.

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

A run of action detection has no confusion matrix, and instead of scores.npz and videos.csv

    detections.csv                  detections in the format of the ActivityNet challenge
    boxes.npz                       per-box results: "probabilities" [boxes, classes], "boxes"
                                    [boxes, 4] as fractions of the frame, "video", "second",
                                    "classes"

--weights=plain tests the plain weights of a run that also has averaged ones (EMA). With that flag,
--which=best, --shuffle_frames, --full_frame or another list, all names but report.html have a
suffix, like `_val_best_plain_shuffled`. --shuffle_frames writes no clips.json. Several values of
--clips are tested in one pass over the list: the files above describe the largest value, and
views.json and views.png compare all values. --compare tests nothing; it prints a table of the runs
and writes it as an HTML page.
"""

import signal
from typing import Any

import jax
from absl import flags

from mvit_jax.analysis import example_boxes, example_clips, run_data
from mvit_jax.common import errors
from mvit_jax.common.files import AnyPath, to_path
from mvit_jax.data.source import fingerprint
from mvit_jax.evaluate import classification, detection
from mvit_jax.training import build
from mvit_jax.training.distributed import coordination, failure, launch
from mvit_jax.training.evaluation.boxes import BoxScores
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
_FULL_FRAME = flags.DEFINE_bool(
    "full_frame", None, "Test boxes in the whole frame; by default eval.full_frame."
)
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
        "eval.full_frame": _FULL_FRAME.value,
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
        "full_frame": config.eval.full_frame,
        "plain_weights": run.averages and _WEIGHTS.value == "plain",
        "classes": list(videos.class_names),
    } | scores.metrics()
    end = suffix(results, _LIST.value, _FULL_FRAME.value)
    # Results are written before the example clips are rendered, which can fail.
    if isinstance(scores, BoxScores):
        written = detection.write(folder, scores, results, end)
    else:
        written = classification.write(folder, scores, videos, results, end)
    print(run_data.summary(folder), flush=True)
    if len(counts) > 1:
        metrics = [s.metrics() for s in by_count]
        by_number = dict(zip(counts, metrics, strict=True))
        written += classification.write_views(folder, by_number, results, end)
    if not _SHUFFLE.value:
        written.append(folder / f"clips{end}.json")
        if isinstance(scores, BoxScores):
            pictures = example_boxes.make(scores, settings.clips)
        else:
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


def suffix(results: dict[str, Any], which: str, full_frame: bool | None) -> str:
    """Returns the file name suffix for options of a test other than the default."""
    checkpoint = results["checkpoint"]
    parts = [which if which != "test" else "", checkpoint if checkpoint != "last" else ""]
    parts.append("plain" if results["plain_weights"] else "")
    parts.append({None: "", True: "full", False: "centre"}[full_frame])
    parts.append("shuffled" if results["shuffled_frames"] else "")
    return "".join(f"_{part}" for part in parts if part)


def compare(folders: list[str], out: str) -> None:
    """Prints a comparison of the runs in `folders` and writes it as the HTML page `out`."""
    if not folders:
        raise errors.UserError("--compare needs the folders of runs: --compare DIR1 DIR2")
    print(run_data.write_comparison(folders, out))
    print(f"wrote {out}")


if __name__ == "__main__":
    errors.run(main)
