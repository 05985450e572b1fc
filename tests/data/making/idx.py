"""Generated files in the format of MNIST and Fashion-MNIST."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from mvit_jax.data.formats.tfds import TfdsSplit
from mvit_jax.data.making import fashion_mnist

COUNTS = {"train": 96, "t10k": 40}


def images_and_labels(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns distinct images `[count, 28, 28]` with a square in the column of their label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count).astype(np.uint8)
    images = rng.integers(0, 100, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[10:18, 2 * label : 2 * label + 8] += 150
    return images, labels


def write(folder: Path, counts: dict[str, int] = COUNTS) -> dict[str, str]:
    """Writes the four files; returns the SHA-256 of their unpacked contents."""
    sums = {}
    folder.mkdir(exist_ok=True)
    for seed, (part, count) in enumerate(counts.items()):
        images, labels = images_and_labels(count, seed)
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 0x803, count, 28, 28) + bytes(images),
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 0x801, count) + bytes(labels),
        }
        for name, content in contents.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            sums[name] = hashlib.sha256(content).hexdigest()
    return sums


def replace_published_files(patch, sums: dict[str, str], counts: dict[str, int] = COUNTS) -> None:
    """Patches the checksums and counts that Fashion-MNIST's files are checked against."""
    from tensorflow_datasets.image_classification import mnist

    patch.setattr(fashion_mnist, "CONTENTS", sums)
    patch.setattr(mnist, "_TRAIN_EXAMPLES", counts["train"])
    patch.setattr(mnist, "_TEST_EXAMPLES", counts["t10k"])


def elements(split: TfdsSplit) -> list[tuple[bytes, int]]:
    """Returns the sorted grey pixels and labels of all elements; TFDS shuffles them."""
    grey = []
    for index in range(len(split)):
        with split.opened(index, 1) as frames:
            (image,) = frames.frames([0])
        assert image.shape == (28, 28, 3) and image.dtype == np.uint8
        assert (image == image[..., :1]).all()
        grey.append((image[..., 0].tobytes(), split.label(index)))
    return sorted(grey)


def expected(part: str, counts: dict[str, int] = COUNTS) -> list[tuple[bytes, int]]:
    """Returns the elements of "train" or "t10k"."""
    images, labels = images_and_labels(counts[part], list(counts).index(part))
    return sorted(zip(map(bytes, images), labels.tolist(), strict=True))
