"""Makes a data set.

    python -m mvit_jax.prepare moving_digits --out=DIR

writes the data set `moving_digits` into the folder DIR: 2,000 training, 200 validation and 400
test videos (mp4, 64x64, 40 to 56 frames) of handwritten digits in eight kinds of motion, lists of
them (train.csv, val.csv, test.csv) and the names of the classes (labels.txt). Needs no download.
The same seed gives the same files. After an interruption the same command goes on where it was; a
finished folder is left as it is.
"""

from absl import flags

from mvit_jax import errors
from mvit_jax.data import moving_digits

DATA_SETS = ("moving_digits",)

OUT = flags.DEFINE_string("out", None, "Folder to write into: new, empty, or to be gone on with.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed gives other videos.")
TRAIN_VIDEOS = flags.DEFINE_integer("train_videos", 2000, "Videos to train on.")
VAL_VIDEOS = flags.DEFINE_integer("val_videos", 200, "Videos to validate on.")
TEST_VIDEOS = flags.DEFINE_integer("test_videos", 400, "Videos to test on.")


def main(argv: list[str]) -> None:
    names = argv[1:]
    if len(names) != 1 or names[0] not in DATA_SETS:
        raise errors.UserError(
            f"'{' '.join(names)}' is not the name of a data set: give one of "
            f"{', '.join(DATA_SETS)}, as in python -m mvit_jax.prepare {DATA_SETS[0]} --out=DIR"
        )
    if not OUT.value:
        raise errors.UserError(f"no folder to write {names[0]} into: give --out=DIR")
    moving_digits.prepare(
        OUT.value,
        seed=SEED.value,
        train_videos=TRAIN_VIDEOS.value,
        val_videos=VAL_VIDEOS.value,
        test_videos=TEST_VIDEOS.value,
    )
    print(f"{names[0]} is in {OUT.value}")


if __name__ == "__main__":
    errors.run(main)
