"""Labelled images prepared by TensorFlow Datasets (TFDS), read without TensorFlow."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from mvit_jax.common import extras
from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.data.media.images import DecodeError, Frames, check_still, decode_image

# Limit in bytes. A set up to this size is read into memory at once, in 7 microseconds per 28x28
# image, against 130 to 300 for separate reads. Decoded pixels up to this size are cached, which
# halves the loading time. Images like ImageNet's would gain little, as each takes milliseconds to
# decode.
IN_MEMORY = 256 * 2**20


# eq=False, repr=False: the examples may be large.
@dataclass(frozen=True, eq=False, repr=False)
class TfdsSplit:
    """One split of a prepared image data set; a `data.source.Source`.

    Attributes:
      examples: sequence of dictionaries with "image" (bytes of an image file) and "label".
      class_names: name of each class.
      list_file: name, version and split of the set, for messages.
      decoded: cache of decoded images by index; None for no cache.
    """

    examples: Any  # TFDS's source has length and indexing, but is not typed as a Sequence
    class_names: tuple[str, ...]
    list_file: str
    decoded: dict[int, Frames] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def label(self, index: int, frames: Int[np.ndarray, " frames"] | None = None) -> int:
        return int(self._example(index)["label"])

    def item(self, index: int) -> str:
        return f"{self.list_file}/{index}"

    @contextlib.contextmanager
    def opened(self, index: int, clip_frames: int) -> Iterator[Frames]:
        check_still(self.item(index), clip_frames)
        frames = None if self.decoded is None else self.decoded.get(index)
        if frames is None:
            frames = Frames(decode_image(self._example(index)["image"], self.item(index)))
            if self.decoded is not None:
                self.decoded[index] = frames
        yield frames

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self.examples[index]
        except Exception as error:  # among others RuntimeError for a damaged or missing file
            raise DecodeError(self.item(index), _sentence(error)) from error


def read_split(name: str, folder: str, split: str) -> TfdsSplit:
    """Opens a split of a data set that was prepared as array_record in TFDS's data folder.

    The images are decoded as by `images.read_image`; grey becomes RGB.

    Args:
      name: TFDS's "name", "name:version", "name/config" or "name/config:version".
      folder: TFDS's `data_dir`.
      split: a split, or a part of one like `train[:55000]`.

    Raises:
      UserError: the set, version or split does not exist; the set is not prepared, lacks random
        access, or does not consist of labelled images. The message has the command that prepares
        the set, where this helps.
    """
    extras.require("tensorflow_datasets")
    import tensorflow_datasets as tfds  # takes a second, and few data sets need it

    builder = prepared_builder(name, folder)
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
            f"{title} is prepared in {folder} as {builder.info.file_format.value}, which has "
            "no random access: prepare it as array_record in another folder DIR by "
            f"{prepare_command(name, 'DIR', folder)}, and set --config.data.folder=DIR"
        ) from None
    except Exception as error:  # TFDS and its readers raise many types
        raise UserError(
            f"the split {split!r} of {title} in {folder} cannot be read ({_sentence(error)}): name "
            "another split, like train[:90%], or prepare the set again in another folder"
        ) from error
    features = builder.info.features
    height, width = features["image"].shape[:2]  # None if they differ among images
    cached = height is not None and width is not None and 3 * count * height * width <= IN_MEMORY
    names = tuple(features["label"].names)
    opened = TfdsSplit(examples, names, f"{title}/{split}", {} if cached else None)
    # Checks the first label only. A damaged first record is not an error here.
    with contextlib.suppress(DecodeError):
        if opened.label(0) < 0:  # test splits, like that of imagenet2012
            raise UserError(f"the images of {opened.list_file} have no labels: name another split")
    return opened


def prepare_command(name: str, folder: str, downloaded: str = "") -> str:
    """Returns the command that prepares a set, for messages.

    Args:
      folder: TFDS's `data_dir` for the prepared set.
      downloaded: the `data_dir` of earlier or manual downloads; "" for `folder`.
    """
    if name.partition(":")[0] == "fashion_mnist":
        return f"`python -m mvit_jax.prepare fashion_mnist --out={folder}`"
    arguments = f"download_dir='{downloaded}/downloads'" if downloaded else ""
    return (
        '`python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{folder}', file_format='array_record')"
        f'.download_and_prepare({arguments})"`'
    )


def prepared_builder(name: str, folder: str) -> Any:
    """Returns TFDS's builder of a prepared set in the data folder.

    Raises:
      UserError: the set does not exist or is not prepared.
    """
    extras.require("tensorflow_datasets")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # ValueError, AssertionError, RuntimeError, TFDS's own types
        raise UserError(
            f"there is no data set data.tfds={name} ({_sentence(error)}): check the name and "
            f"version, and the folder {folder} if the set is your own"
        ) from None
    if not builder.data_path.exists():
        files = f" from the files that TFDS requires in {folder}/downloads/manual"
        manual = getattr(builder, "MANUAL_DOWNLOAD_INSTRUCTIONS", None) is not None
        raise MissingDataError(
            f"{name} is not prepared in {folder}: {prepare_command(name, folder)} prepares it"
            f"{files * manual}, or name the folder that holds it, --config.data.folder=DIR"
        )
    return builder


def _check_features(title: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    # Without names, the set has a single feature.
    named = dict(features.items()) if hasattr(features, "items") else {}
    image, label = named.get("image"), named.get("label")
    # TFDS stores floating-point images as PNGs of their raw bytes, not of pixels.
    still = isinstance(image, tfds.features.Image) and image.np_dtype in (np.uint8, np.uint16)
    if not (still and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(
            f"{title} must have the features image (uint8 or uint16) and label, but has "
            f"({' '.join(str(features).split())}): name a set for image classification in data.tfds"
        )


def _sentence(error: Exception) -> str:
    """Returns the first line of a TFDS error, without the arguments of the failed call."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit('}": ', 1)[-1].strip().rstrip(".:")
