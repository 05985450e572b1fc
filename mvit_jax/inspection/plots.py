"""Pictures of results, as PNG files that are written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mvit_jax.errors import UserError

matplotlib.use("Agg")
BLUE = "#2a6f97"
LABELLED = 40  # classes above which names no longer fit beside a row


def confusion_matrix(
    path: str | Path, confusion: Sequence[Sequence[int]], names: Sequence[str], title: str
) -> None:
    """Rows are true classes, columns what the model said, in percent of the row's videos."""
    counts = np.asarray(confusion, float)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(names)
    side = min(3.5 + 0.55 * n, 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if n <= LABELLED:
        axes.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), names)
    if n <= LABELLED / 2:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if share[i, j] > 55 else "black"
            axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=colour)
    _save(figure, path)


def class_accuracy(
    path: str | Path, accuracy: Sequence[float | None], names: Sequence[str], title: str
) -> None:
    """A bar for each class, worst first; classes without videos are left out."""
    pairs = sorted((a, name) for a, name in zip(accuracy, names, strict=True) if a is not None)
    shown = pairs[:LABELLED]
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(shown)), [a for a, _ in shown], color=BLUE)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_yticks(range(len(shown)), [name for _, name in shown])
    axes.invert_yaxis()
    axes.set(title=title, xlabel="top-1 accuracy, %", xlim=(0, 106))
    axes.spines[["top", "right"]].set_visible(False)
    if len(pairs) > len(shown):
        axes.set_ylabel(f"the worst {len(shown)} of {len(pairs)} classes")
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
