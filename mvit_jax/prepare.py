"""Makes a data set.

    python -m mvit_jax.prepare moving_digits --out=DIR

writes the data set `moving_digits` into the folder DIR: 2,000 training, 200 validation and 400
test videos (mp4, 64x64, 40 to 56 frames) of handwritten digits in eight kinds of motion, lists of
them (train.csv, val.csv, test.csv) and the names of the classes (labels.txt). Needs no download.
The same seed gives the same files. After an interruption the same command goes on where it was; a
finished folder is left as it is.

    python -m mvit_jax.prepare fashion_mnist --out=DIR
    python -m mvit_jax.prepare fashion_mnist --out=DIR --files=/usr/share/datasets/fashion-mnist

has TensorFlow Datasets write Fashion-MNIST (60,000 training and 10,000 test images, 28x28, grey, of
ten kinds of clothing) into its data folder DIR as array_record: downloaded, or from the four
published files (*-ubyte.gz) in another folder, here that of Debian's package dataset-fashion-mnist.
It is written whole or not at all; a set that is there is left as it is.

    python -m mvit_jax.prepare videos --csv=lists/train.csv --out=DIR

packs the videos of a list of lines "path label" into ArrayRecord shards in the folder DIR: scaled
down to a short side of 256 pixels, and encoded anew (H.264, no sound, same frames at the same
times) so that random clips decode fast. The split is named after the list; its manifest
(train.manifest.json) says what it holds, and what failed and why. An interrupted run is gone on
with by the same command. Runs on Apache Beam (pip install 'mvit_jax[prepare]'), in processes on
this machine; flags for Beam come last, after --, as in -- --runner=FlinkRunner: all workers must
see the videos and DIR under the same paths.

    python -m mvit_jax.prepare lists --out=DIR [--val=0.1 --test=0.1]

deals one's own videos or images in DIR, a folder of them for each class, to train.csv, val.csv and
test.csv there, and names the classes in labels.txt. Lists that are there and differ are kept.

    python -m mvit_jax.prepare check DIR [--split=train]

decodes all of a data set, of shards or of lists of files, and tells what is broken in it and
whether its manifests tell the truth; exits with 1 if anything is wrong.
"""

import os
import sys

from absl import flags

from mvit_jax.common import errors, files
from mvit_jax.data.making import (
    fashion_mnist,
    moving_digits,
    packing,
    splitting,
    transcoding,
    verifying,
)

OUT = flags.DEFINE_string("out", None, "Folder to write into: new, empty, or to be gone on with.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed gives other moving digits, or other lists.")
VAL = flags.DEFINE_float("val", 0.1, "Share of each class to validate on.")
TEST = flags.DEFINE_float("test", 0.1, "Share of each class to test on.")
TRAIN_VIDEOS = flags.DEFINE_integer("train_videos", 2000, "Moving digits to train on.")
VAL_VIDEOS = flags.DEFINE_integer("val_videos", 200, "Moving digits to validate on.")
TEST_VIDEOS = flags.DEFINE_integer("test_videos", 400, "Moving digits to test on.")
FILES = flags.DEFINE_string("files", None, "Folder of Fashion-MNIST's files, else downloaded.")
CSV = flags.DEFINE_string("csv", None, "List of the videos to pack.")
PREFIX = flags.DEFINE_string("prefix", "", "Folder that relative paths of a list start at.")
SEPARATOR = flags.DEFINE_string("separator", None, "Of path and label in a list; else white space.")
SHORT_SIDE = flags.DEFINE_integer("short_side", 256, "Pixels; smaller videos stay as they are.")
GOP = flags.DEFINE_integer("gop", 16, "Frames from one key frame to the next.")
CRF = flags.DEFINE_integer("crf", 20, "Quality, 0 (exact) to 51; 3 more halve the size or nearly.")
SHARDS = flags.DEFINE_integer("shards", None, "Shards; else one for 256 videos, at least 16.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes, or threads to check; else all cores.")
SPLIT = flags.DEFINE_string("split", None, "The one split to check.")

# Each data set, or what is done to one, with the flags that are its own.
DATA_SETS = {
    "moving_digits": ("seed", "train_videos", "val_videos", "test_videos"),
    "fashion_mnist": ("files",),
    "lists": ("val", "test", "seed"),
    "videos": ("csv", "prefix", "separator", "short_side", "gop", "crf", "shards", "workers"),
    "check": ("split", "prefix", "separator", "workers"),
}


def main(argv: list[str]) -> None:
    name, rest = "".join(argv[1:2]), argv[2:]
    allowed = {"check": 1, "videos": len(rest)}.get(name, 0)  # DIR, and flags for Beam
    if name not in DATA_SETS or len(rest) > allowed:
        raise errors.UserError(
            f"'{' '.join(argv[1:])}' is not the name of a data set: give one of "
            f"{', '.join(DATA_SETS)}, as in python -m mvit_jax.prepare moving_digits --out=DIR"
        )
    for flag in {flag for flags_of in DATA_SETS.values() for flag in flags_of}:
        owners = [other for other, own in DATA_SETS.items() if flag in own]
        if name not in owners and flags.FLAGS[flag].present:
            raise errors.UserError(
                f"--{flag} is for {' and '.join(owners)}: leave it out for {name}"
            )
    if name == "check":
        _check(rest)
        return
    if not OUT.value:
        raise errors.UserError(f"no folder to write {name} into: give --out=DIR")
    files.local_path(OUT.value)  # data are made here, and copied then
    if name == "videos":
        _videos(OUT.value, rest)
    elif name == "lists":
        counts = splitting.write_lists(OUT.value, val=VAL.value, test=TEST.value, seed=SEED.value)
        said = ", ".join(f"{count} files in {list_}" for list_, count in counts.items())
        print(f"{said}, in {OUT.value}")
    elif name == "fashion_mnist":
        fashion_mnist.prepare(OUT.value, FILES.value)
        print(f"{name} is in {OUT.value}")
    else:
        moving_digits.prepare(
            OUT.value,
            seed=SEED.value,
            train_videos=TRAIN_VIDEOS.value,
            val_videos=VAL_VIDEOS.value,
            test_videos=TEST_VIDEOS.value,
        )
        print(f"{name} is in {OUT.value}")


def _videos(out: str, beam_flags: list[str]) -> None:
    if not CSV.value:
        raise errors.UserError("no list of videos: give --csv=FILE, of lines `path label`")
    strange = [flag for flag in beam_flags if not flag.startswith("--")]
    if strange:
        raise errors.UserError(f"{strange[0]!r} is no flag: after -- give flags of Apache Beam")
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
        )
    except packing.DeadWorkerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    failed = [each for shard in manifest.shards for each in shard.failed]
    for video, _, reason in failed[:10]:
        print(f"left out {video}: {reason}", file=sys.stderr)
    if len(failed) > 10:
        print(f"left out {len(failed) - 10} more, which the manifest lists", file=sys.stderr)
    videos = sum(len(shard.ids) for shard in manifest.shards)
    print(
        f"{videos} of {videos + len(failed)} videos are in {len(manifest.shards)} shards in {out}"
    )


def _check(rest: list[str]) -> None:
    if not rest:
        raise errors.UserError("no data set to check: name its folder, as in prepare check DIR")
    reports = verifying.check(
        rest[0], SPLIT.value, prefix=PREFIX.value, separator=SEPARATOR.value, workers=WORKERS.value
    )
    for report in reports:
        for problem in report.problems:
            print(problem)
        print(f"{report.split}: {report.videos} videos, {len(report.problems)} problems")
    problems = sum(len(report.problems) for report in reports)
    if problems:
        raise errors.UserError(f"{rest[0]} has {problems} problems, which are told above")


if __name__ == "__main__":
    errors.run(main)
