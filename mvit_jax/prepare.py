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
"""

from absl import flags

from mvit_jax import errors
from mvit_jax.data import fashion_mnist, moving_digits

OUT = flags.DEFINE_string("out", None, "Folder to write into: new, empty, or to be gone on with.")
SEED = flags.DEFINE_integer("seed", 0, "Another seed gives other moving digits.")
TRAIN_VIDEOS = flags.DEFINE_integer("train_videos", 2000, "Moving digits to train on.")
VAL_VIDEOS = flags.DEFINE_integer("val_videos", 200, "Moving digits to validate on.")
TEST_VIDEOS = flags.DEFINE_integer("test_videos", 400, "Moving digits to test on.")
FILES = flags.DEFINE_string("files", None, "Folder of Fashion-MNIST's files, else downloaded.")

# Each data set with the flags that are its own.
DATA_SETS = {
    "moving_digits": ("seed", "train_videos", "val_videos", "test_videos"),
    "fashion_mnist": ("files",),
}


def main(argv: list[str]) -> None:
    names = argv[1:]
    if len(names) != 1 or names[0] not in DATA_SETS:
        raise errors.UserError(
            f"'{' '.join(names)}' is not the name of a data set: give one of "
            f"{', '.join(DATA_SETS)}, as in python -m mvit_jax.prepare moving_digits --out=DIR"
        )
    if not OUT.value:
        raise errors.UserError(f"no folder to write {names[0]} into: give --out=DIR")
    for other, own in DATA_SETS.items():
        for flag in own:
            if other != names[0] and flags.FLAGS[flag].present:
                raise errors.UserError(f"--{flag} is for {other}: leave it out for {names[0]}")
    if names[0] == "fashion_mnist":
        fashion_mnist.prepare(OUT.value, FILES.value)
    else:
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
