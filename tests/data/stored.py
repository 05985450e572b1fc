"""Small data sets in the format of TFDS."""

from pathlib import Path
from typing import Any


def stills(**image: Any) -> dict[str, Any]:
    """Returns the features of labelled images of two classes."""
    from tensorflow_datasets import features

    return {"image": features.Image(**image), "label": features.ClassLabel(names=["a", "b"])}


def store(folder: Path, name: str, features: dict[str, Any], *examples: Any, **options: Any):
    import tensorflow_datasets as tfds

    options = {"version": "1.0.0", "file_format": "array_record", "split": "train"} | options
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_datasets={options.pop("split"): list(enumerate(examples))},
        **options,
    )
