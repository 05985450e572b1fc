"""Images with labels that TensorFlow Datasets has prepared, read without TensorFlow."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from mvit_jax.common.errors import UserError
from mvit_jax.data.images import DecodeError, Frames, check_still, decode_image

# Files up to this size in bytes are read at once: 7 microseconds an image of 28x28 instead of 130
# to 300 when each is asked for alone. Pixels up to this size are kept, half of the time of loading
# them. For images like ImageNet's neither would matter: decoding one takes milliseconds.
IN_MEMORY = 256 * 2**20


# Neither compared nor printed, as what is read may be large.
@dataclass(frozen=True, eq=False, repr=False)
class TfdsSplit:
    """One split of a prepared set of images; a `sources.Source`.

    Attributes:
      examples: "image", bytes of an image's file, and "label", by index.
      class_names: name of each class.
      list_file: name of the set, its version and split, for messages.
      kept: images that were decoded before; None to keep none.
    """

    examples: Any  # has a length and places, but TFDS's source is no Sequence by its type
    class_names: tuple[str, ...]
    list_file: str
    kept: dict[int, Frames] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def label(self, index: int, frames: Int[np.ndarray, " frames"] | None = None) -> int:
        return int(self._example(index)["label"])

    def item(self, index: int) -> str:
        return f"{self.list_file}/{index}"

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[Frames]:
        check_still(self.item(index), clip_frames)
        frames = None if self.kept is None else self.kept.get(index)
        if frames is None:
            frames = Frames(decode_image(self._example(index)["image"], self.item(index)))
            if self.kept is not None:
                self.kept[index] = frames
        yield frames

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self.examples[index]
        except Exception as error:  # a damaged or missing file is a RuntimeError, among others
            raise DecodeError(self.item(index), _sentence(error)) from error


def read_split(name: str, folder: str, split: str) -> TfdsSplit:
    """Opens a split of a set that lies prepared, as array_record, in TFDS's data folder.

    Images are decoded by Pillow, so their pixels are those of files of images; grey becomes RGB.

    Args:
      name: "name", "name:version", "name/config" or "name/config:version" as TFDS has it.
      folder: TFDS's `data_dir`.
      split: a split or a part of one, like `train[:55000]`.

    Raises:
      UserError: no such set, version or split, one that is not prepared or cannot be read in any
        order, or one of something else than images with labels. Says how to prepare.
    """
    import tensorflow_datasets as tfds  # takes a second, and only some data sets need it

    builder = prepared(name, folder)
    title = builder.info.full_name
    _check_features(title, builder.info.features)
    try:
        count = builder.info.splits[split].num_examples
        if count == 0:
            raise ValueError("it is empty")
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        small = 0 < builder.info.dataset_size <= IN_MEMORY
        examples = source.__getitems__(range(count)) if small else source
    except NotImplementedError:
        raise UserError(
            f"{title} is prepared in {folder} as {builder.info.file_format.value}, which cannot be "
            f"read in any order: {how(name, 'DIR', folder)} prepares it anew as array_record in "
            "another folder, which --config.data.folder=DIR then names"
        ) from None
    except Exception as error:  # TFDS and the readers below it raise whatever they like
        raise UserError(
            f"the split {split!r} of {title} in {folder} cannot be read ({_sentence(error)}): name "
            "another one, like train[:90%], or prepare the set anew in another folder"
        ) from error
    features = builder.info.features
    height, width = features["image"].shape[:2]  # None where they differ
    keep = height is not None and width is not None and 3 * count * height * width <= IN_MEMORY
    names = tuple(features["label"].names)
    opened = TfdsSplit(examples, names, f"{title}/{split}", {} if keep else None)
    # Of the first image alone, which may be damaged too.
    with contextlib.suppress(DecodeError):
        if opened.label(0) < 0:  # test splits, like that of imagenet2012
            raise UserError(f"the images of {opened.list_file} have no labels: name another split")
    return opened


def how(name: str, folder: str, downloaded: str = "") -> str:
    """The command that prepares a set, for messages.

    Args:
      folder: TFDS's `data_dir` to prepare it in.
      downloaded: the `data_dir` that holds what TFDS downloaded or asked for; "" for `folder`.
    """
    if name.partition(":")[0] == "fashion_mnist":
        return f"`python -m mvit_jax.prepare fashion_mnist --out={folder}`"
    where = f"download_dir='{downloaded}/downloads'" if downloaded else ""
    return (
        '`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{folder}', file_format='array_record')"
        f'.download_and_prepare({where})"`'
    )


def prepared(name: str, folder: str) -> Any:
    """TFDS's builder of a set that lies prepared in its data folder.

    Raises:
      UserError: no such set, or one that is not prepared.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # ValueError, AssertionError, RuntimeError, those of TFDS's own
        raise UserError(
            f"there is no data set data.tfds={name} ({_sentence(error)}): check the name and "
            f"version, and the folder {folder} if it is of one's own making"
        ) from None
    if not builder.data_path.exists():
        given = f" with the files that TFDS asks for in {folder}/downloads/manual"
        by_hand = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) is not None
        raise UserError(
            f"{name} is not prepared in {folder}: {how(name, folder)} does that{given * by_hand}, "
            "or name the folder that holds it, --config.data.folder=DIR"
        )
    return builder


def _check_features(title: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    # A set of features that has no names is one feature.
    named = dict(features.items()) if hasattr(features, "items") else {}
    image, label = named.get("image"), named.get("label")
    # Other numbers than whole ones are stored as PNGs whose pixels mean something else.
    still = isinstance(image, tfds.features.Image) and image.np_dtype in (np.uint8, np.uint16)
    if not (still and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(
            f"{title} has other features than an image of uint8 or uint16 and a label of classes "
            f"({' '.join(str(features).split())}): name a set for image classification in data.tfds"
        )


def _sentence(error: Exception) -> str:
    """The first line of what TFDS says, without what it was called with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit('}": ', 1)[-1].strip().rstrip(".:")
