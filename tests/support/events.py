"""Scalars of TensorBoard's event files, read by TensorBoard."""

from pathlib import Path


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Returns the scalars in a folder's events: the value at each step, by name."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("tensor") and value.metadata.plugin_data.plugin_name != "text":
                    array = tensor_util.make_ndarray(value.tensor)
                    if array.dtype.kind == "f" and array.ndim == 0:
                        scalars.setdefault(value.tag, {})[event.step] = array.item()
    return scalars
