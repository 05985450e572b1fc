"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) in TFDS's format, downloaded or from files.

70,000 grey images of 28x28 pixels of ten kinds of clothing. TFDS's own code imports TensorFlow to
download the published files, to read them and to write PNGs; this module does not.
"""

import gzip
import hashlib
import http.client
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from mvit_jax.common import extras
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import expanded
from mvit_jax.data.formats.tfds import read_split

NAME = "fashion_mnist"

# SHA-256 of the four published files, unpacked. MNIST's files have the same names and sizes, and
# packages recompress the files, so neither names nor digests of the .gz files identify the set.
CONTENTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def prepare(folder: str, files: str | None = None) -> None:
    """Writes the set into TFDS's data folder as array_record, atomically.

    An existing set stays unchanged.

    Args:
      folder: TFDS's `data_dir`.
      files: folder of the four .gz files; None to download them.

    Raises:
      UserError: a file is missing, damaged or of another set; the download fails; the folder
        cannot be written; or `read_split` cannot read the existing set.
    """
    extras.require("tensorflow_datasets")
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder: Any = tfds.builder(NAME, data_dir=folder)
    if builder.data_path.exists():
        read_split(NAME, folder, "test")  # raises if the existing set is not usable
        return
    for incomplete in builder.data_path.parent.glob("incomplete.*"):  # left by killed runs
        incomplete.rmtree()
    config = tfds.download.DownloadConfig(try_download_gcs=False)  # GCS has tfrecord only
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary)
        try:
            source = _download(builder.URL, unpacked) if files is None else expanded(files)
            paths = _unpack(source, unpacked)
            # Replaces TFDS's download manager: maps its URLs to the unpacked local files.
            local = SimpleNamespace(
                download_and_extract=lambda urls: {key: paths[Path(urls[key]).stem] for key in urls}
            )
            split_generators = builder._split_generators
            builder._split_generators = lambda manager: split_generators(local)
            builder._generate_examples = examples
            builder.download_and_prepare(
                download_dir=temporary, download_config=config, file_format="array_record"
            )
        except OSError as error:
            raise UserError(f"{NAME} cannot be written into {folder}: {_reason(error)}") from error


def _download(address: str, folder: Path) -> Path:
    for name in CONTENTS:
        try:
            with urllib.request.urlopen(f"{address}{name}.gz", timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{NAME} cannot be downloaded ({_reason(error)}): fetch its four files another "
                "way, for example as Debian's package dataset-fashion-mnist, and name their "
                "folder, --files=DIR"
            ) from error
        (folder / f"{name}.gz").write_bytes(content)
    return folder


def examples(
    num_examples: int, data_path: str, label_path: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the index, PNG image and label of each example; replaces TFDS's function."""
    pixels = np.frombuffer(Path(data_path).read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer(Path(label_path).read_bytes(), np.uint8, offset=8)
    images = pixels.reshape(num_examples, 28, 28)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": cv2.imencode(".png", image)[1].tobytes(), "label": int(label)}


def _unpack(folder: Path, to: Path) -> dict[str, str]:
    paths = {}
    for name, expected in CONTENTS.items():
        file = folder / f"{name}.gz"
        try:
            content = gzip.decompress(file.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"there is no file {file}: --files=DIR should hold the .gz files of "
                f"{', '.join(CONTENTS)}"
            ) from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{file} cannot be unpacked ({_reason(error)}): fetch it again"
            ) from None
        if hashlib.sha256(content).hexdigest() != expected:
            raise UserError(
                f"{file} is not Fashion-MNIST's file of this name (MNIST uses the same names): "
                "fetch it again"
            )
        (to / name).write_bytes(content)
        paths[name] = str(to / name)
    return paths


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # URLError has a `reason`
    text = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
    return text.strip().splitlines()[0].rstrip(".").lower()
