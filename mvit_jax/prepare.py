"""Command-line program that makes, packs, lists and checks data sets.

    python -m mvit_jax.prepare moving_digits --out=DIR

writes the data set `moving_digits` into DIR: 2,000 training, 200 validation and 400 test videos
(mp4, 64x64, 40 to 56 frames) of handwritten digits in eight classes of motion. Beside them are the
lists train.csv, val.csv and test.csv, and the class names, labels.txt. Needs no download. The same
seed gives the same files. The same command resumes an interrupted run; a finished folder stays
unchanged.

    python -m mvit_jax.prepare moving_scenes --out=DIR

writes the data set `moving_scenes` likewise: 1,200, 60 and 180 videos (mp4, 176x128 or 128x176, 155
to 170 frames) of several digits with motions of their own and relations to each other. The csv
files have AVA's formats: labels, boxes of a detector, excluded key frames, and classes.pbtxt. The
lists clips_train.csv, clips_val.csv and clips_test.csv have one label a video.

    python -m mvit_jax.prepare fashion_mnist --out=DIR
    python -m mvit_jax.prepare fashion_mnist --out=DIR --files=/usr/share/datasets/fashion-mnist

writes Fashion-MNIST (60,000 training and 10,000 test images, 28x28, grey, ten kinds of clothing)
as array_record into DIR, the data folder of TensorFlow Datasets. The four published files
(*-ubyte.gz) are downloaded, or read from the folder --files. In the example they come from Debian's
package dataset-fashion-mnist. The set is written atomically; an existing set stays unchanged.

    python -m mvit_jax.prepare videos --csv=lists/train.csv --out=DIR

packs the videos of a list (lines "path label") into ArrayRecord shards in DIR. Videos are scaled
down to a short side of 256 pixels and re-encoded so that random clips decode fast: H.264, no sound,
the same frames at the same times. The split is named after the list. Its manifest,
train.manifest.json, lists the packed videos, and the failed ones with the reason of each failure.
The same command resumes an interrupted run. Packing runs on Apache Beam
(pip install -e '.[prepare]'), in processes on this machine. Flags for Beam come last, after --,
as in -- --runner=FlinkRunner; then all workers must see the videos and DIR under the same paths.

    python -m mvit_jax.prepare lists --out=DIR [--val=0.1 --test=0.1]

splits the videos or images in DIR, one folder per class, into the lists train.csv, val.csv and
test.csv there, and writes the class names to labels.txt. Files that are neither videos nor images
are counted and left out, hidden ones silently. Existing lists with other content are not
overwritten.

    python -m mvit_jax.prepare check DIR [--split=train]

decodes every video and image of a data set, stored in shards or listed in files. The command prints
each broken file and each error in a manifest, and exits with status 1 if there is any.

    python -m mvit_jax.prepare check DIR --config=configs/ava.py

checks the csv files of a detection data set, as the config names them, and decodes the key frames:
missing videos and frames, seconds beyond the end, frames that differ in size, boxes out of range.
"""

import os
import sys

from absl import flags

from mvit_jax.common import errors, files
from mvit_jax.config import check as check_config
from mvit_jax.config import define_flag
from mvit_jax.data.formats.ava import KeyFrameClips
from mvit_jax.data.making import (
    fashion_mnist,
    moving_digits,
    moving_scenes,
    packing,
    splitting,
    transcoding,
    verifying,
)

CONFIG = define_flag()
OUT = flags.DEFINE_string("out", None, "Output folder: new, empty, or of an interrupted run.")
SEED = flags.DEFINE_integer("seed", 0, "Random seed of moving digits or scenes, and of lists.")
VAL = flags.DEFINE_float("val", 0.1, "Share of each class for the validation list.")
TEST = flags.DEFINE_float("test", 0.1, "Share of each class for the test list.")
VIDEOS = {
    "train_videos": flags.DEFINE_integer(
        "train_videos", None, "Number of training videos; default: as above."
    ),
    "val_videos": flags.DEFINE_integer(
        "val_videos", None, "Number of validation videos; default: as above."
    ),
    "test_videos": flags.DEFINE_integer(
        "test_videos", None, "Number of test videos; default: as above."
    ),
}
FILES = flags.DEFINE_string("files", None, "Folder of Fashion-MNIST's files; default: download.")
CSV = flags.DEFINE_string("csv", None, "List of the videos to pack.")
PREFIX = flags.DEFINE_string("prefix", "", "Folder that the paths in a list are relative to.")
SEPARATOR = flags.DEFINE_string(
    "separator", None, "Separator of path and label; default: white space."
)
SHORT_SIDE = flags.DEFINE_integer(
    "short_side", 256, "Short side in pixels; smaller videos keep their size."
)
GOP = flags.DEFINE_integer("gop", 16, "Frames from one key frame to the next.")
CRF = flags.DEFINE_integer("crf", 20, "x264's rate factor, 0 (lossless) to 51 (smallest file).")
SHARDS = flags.DEFINE_integer(
    "shards", None, "Number of shards; default: one per 256 videos, at least 16."
)
WORKERS = flags.DEFINE_integer(
    "workers", None, "Number of processes (check: threads); default: all cores."
)
MULTI_LABEL = flags.DEFINE_bool(
    "multi_label", False, "Lines of a list have any number of labels: path 4,17."
)
SPLIT = flags.DEFINE_string("split", None, "Split to check; default: all.")

# Flags that each data set or task accepts.
DATA_SETS = {
    "moving_digits": ("seed", *VIDEOS),
    "moving_scenes": ("seed", *VIDEOS),
    "fashion_mnist": ("files",),
    "lists": ("val", "test", "seed"),
    "videos": (
        "csv",
        "prefix",
        "separator",
        "multi_label",
        "short_side",
        "gop",
        "crf",
        "shards",
        "workers",
    ),
    "check": ("config", "split", "prefix", "separator", "multi_label", "workers"),
}


def main(argv: list[str]) -> None:
    name, rest = "".join(argv[1:2]), argv[2:]
    allowed = {"check": 1, "videos": len(rest)}.get(name, 0)  # DIR, and flags for Beam
    if name not in DATA_SETS or len(rest) > allowed:
        raise errors.UserError(
            f"'{' '.join(argv[1:])}' is not a data set or task: give one of "
            f"{', '.join(DATA_SETS)}, as in python -m mvit_jax.prepare moving_digits --out=DIR"
        )
    for flag in {flag for flags_of in DATA_SETS.values() for flag in flags_of}:
        owners = [owner for owner, flags_of in DATA_SETS.items() if flag in flags_of]
        if name not in owners and flags.FLAGS[flag].present:
            raise errors.UserError(
                f"--{flag} applies only to {' and '.join(owners)}: leave it out for {name}"
            )
    if name == "check":
        _check(rest)
        return
    if not OUT.value:
        raise errors.UserError(f"no folder to write {name} into: give --out=DIR")
    out = str(files.local_path(OUT.value))  # data sets cannot be written into a bucket
    if name == "videos":
        _videos(OUT.value, rest)
    elif name == "lists":
        counts = splitting.write_lists(OUT.value, val=VAL.value, test=TEST.value, seed=SEED.value)
        summary = ", ".join(f"{count} files in {list_}" for list_, count in counts.items())
        print(f"{summary}, in {OUT.value}")
    elif name == "fashion_mnist":
        fashion_mnist.prepare(out, FILES.value)
        print(f"{name} is in {OUT.value}")
    else:
        made = {"moving_digits": moving_digits, "moving_scenes": moving_scenes}[name]
        counts = {flag: holder.value for flag, holder in VIDEOS.items() if holder.value is not None}
        made.prepare(OUT.value, seed=SEED.value, **counts)
        print(f"{name} is in {OUT.value}")


def _videos(out: str, beam_flags: list[str]) -> None:
    if not CSV.value:
        raise errors.UserError(
            "the list of videos is missing: give --csv=FILE, with lines `path label`"
        )
    positional = [argument for argument in beam_flags if not argument.startswith("--")]
    if positional:
        raise errors.UserError(f"{positional[0]!r} is not a flag: only flags of Beam may follow --")
    try:
        manifest = packing.prepare(
            CSV.value,
            out,
            prefix=PREFIX.value,
            separator=SEPARATOR.value,
            encoding=transcoding.Encoding(SHORT_SIDE.value, GOP.value, CRF.value),
            shards=SHARDS.value,
            workers=WORKERS.value,
            beam_flags=beam_flags,
            multi_label=MULTI_LABEL.value,
        )
    except packing.DeadWorkerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    failed = [each for shard in manifest.shards for each in shard.failed]
    for video, _, reason in failed[:10]:
        print(f"left out {video}: {reason}", file=sys.stderr)
    if len(failed) > 10:
        print(f"left out {len(failed) - 10} more; see the manifest", file=sys.stderr)
    videos = sum(len(shard.ids) for shard in manifest.shards)
    print(
        f"{videos} of {videos + len(failed)} videos are in {len(manifest.shards)} shards in {out}"
    )


def _check(rest: list[str]) -> None:
    if not rest:
        raise errors.UserError(
            "the data set to check is missing: give its folder, as in prepare check DIR"
        )
    if CONFIG.value is None:
        reports = verifying.check(
            rest[0], SPLIT.value, prefix=PREFIX.value, separator=SEPARATOR.value,
            workers=WORKERS.value, multi_label=MULTI_LABEL.value,
        )  # fmt: skip
    else:
        reports = _check_boxes(rest[0])
    for report in reports:
        for problem in report.problems:
            print(problem)
        contents = f"{report.contents}, " if report.contents else ""
        print(f"{report.split}: {report.videos} videos, {contents}{len(report.problems)} problems")
    problems = sum(len(report.problems) for report in reports)
    if problems:
        raise errors.UserError(f"{rest[0]} has {problems} problems, listed above")


def _check_boxes(folder: str) -> list[verifying.Report]:
    """Checks the lists of a detection config; those that cannot be read are problems, too."""
    from mvit_jax.training import build  # imports JAX, which all else here does without

    config = CONFIG.value
    errors.lock(config)
    if config.data.source != "ava":
        raise errors.UserError(
            f"--config is for detection, but has data.source={config.data.source}: leave it out"
        )
    config.data.folder = folder
    config.data.max_broken = 1.0  # each missing video is a problem, not an error
    check_config(config)
    splits: dict[tuple[str, str | None], str] = {}  # validation and test may be the same
    for split in ("train", "val", "test"):
        names = config.data[f"{split}_list"], config.data[f"{split}_boxes"]
        if names[0] and SPLIT.value in (None, split):
            splits.setdefault(names, split)
    if not splits:
        raise errors.UserError(f"the config has no list {SPLIT.value}: give train, val or test")
    reports = []
    for split in splits.values():
        try:
            clips = build.videos(config, split)
        except errors.UserError as error:
            reports.append(verifying.Report(split, 0, (str(error),)))
        else:
            assert isinstance(clips, KeyFrameClips)
            reports.append(verifying.check_key_frames(split, clips, WORKERS.value))
    return reports


if __name__ == "__main__":
    errors.run(main)
