"""Contact sheet of an experiment's first training clips, after augmentation."""

import os
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import matplotlib.layout_engine
import matplotlib.patches
import numpy as np

from mvit_jax.analysis import plots
from mvit_jax.config import Config, check
from mvit_jax.data import pipeline
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.training import build, step

CLIPS = 8
FRAMES = 8  # frames drawn per clip
TITLE = 120  # characters above a clip


def draw(config: Config, path: str | os.PathLike[str]) -> Path:
    """Draws the first clips of step 0 after all augmentation, including random erasing and mixup.

    For detection, the boxes are solid in the key frame and dotted in the others.

    Args:
      config: an experiment. The clips equal those of a run on one device.
      path: the PNG file, written atomically.

    Returns:
      The path.

    Raises:
      UserError: the config or its data cannot be used, or the file cannot be written.
    """
    check(config)
    videos = build.videos(config, "train")
    settings = build.settings(config, len(videos.class_names))
    share = np.lcm(config.data.repeats, config.augment.mixup_group_size)
    rows = range(min(-(-CLIPS // share) * share, config.batch))
    [batch] = pipeline.train_batches(
        videos,
        settings.clips,
        seed=config.seed,
        batch=config.batch,
        steps=1,
        rows=rows,
        repeats=config.data.repeats,
        balanced=config.data.balanced,
        loader=LoaderOptions(config.data.threads),
    )
    key, _ = step.keys(config.seed, 0)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    clips, targets = jax.device_get(step.augment(arrays, key, settings.step))
    pixels = np.clip(clips.astype(np.float32) * settings.step.std + settings.step.mean, 0, 1)
    if not settings.step.multi_label and settings.step.label_smoothing < 1:
        targets = _without_smoothing(targets, settings.step.label_smoothing)
    boxes = step.augment_boxes(arrays, key, settings.step)
    corners = None if boxes is None else np.asarray(boxes[0])
    plots.save(_figure(pixels, targets, videos.class_names, corners, batch.get("box_mask")), path)
    return Path(path)


def _figure(
    clips: np.ndarray,
    targets: np.ndarray,
    names: tuple[str, ...],
    boxes: np.ndarray | None,
    mask: np.ndarray | None,
) -> matplotlib.figure.Figure:
    key_frame = clips.shape[1] // 2
    shown = np.linspace(0, clips.shape[1] - 1, FRAMES).round().astype(int)
    if boxes is not None:
        shown[np.abs(shown - key_frame).argmin()] = key_frame
    shown = np.unique(shown)
    with plots.style():
        layout = matplotlib.layout_engine.ConstrainedLayoutEngine(h_pad=0.15)
        figure = matplotlib.figure.Figure((1.2 * len(shown) + 0.4, 1.6 * len(clips)), layout=layout)
        rows = figure.subplots(len(clips), len(shown), squeeze=False)
        for i, axes in enumerate(rows):
            for ax, frame in zip(axes, shown, strict=True):
                ax.imshow(clips[i, frame])
                ax.axis("off")
                if boxes is not None and mask is not None:
                    _draw_boxes(ax, boxes[i, mask[i]], "-" if frame == key_frame else ":")
            title = (
                _label(targets[i], names) if mask is None else _labels(targets[i, mask[i]], names)
            )
            text = axes[0].text(0, 1.05, title, fontsize="small", transform=axes[0].transAxes)
            text.set_in_layout(False)  # a long title would widen its column
    return figure


def _draw_boxes(ax: Any, boxes: np.ndarray, line: str) -> None:
    """Draws the outlines and numbers of boxes; a box outside the crop is a line at its border."""
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        colour = f"C{number % 10}"
        outline = matplotlib.patches.Rectangle(
            (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linestyle=line
        )
        ax.add_patch(outline)
        ax.text(x1, y1, str(number + 1), color=colour, fontsize="x-small", va="top", clip_on=True)


def _labels(targets: np.ndarray, names: tuple[str, ...]) -> str:
    """Returns the number of each box with its classes."""
    texts = [
        f"{number} " + (", ".join(names[i] for i in np.flatnonzero(target)) or "no label")
        for number, target in enumerate(targets, start=1)
    ]
    return textwrap.shorten("; ".join(texts), TITLE, placeholder=" …")


def _without_smoothing(targets: np.ndarray, smoothing: float) -> np.ndarray:
    """Returns the classes' shares of each clip, which sum to 1: targets before label smoothing."""
    return (targets - smoothing / targets.shape[1]) / (1 - smoothing)


def _label(target: np.ndarray, names: tuple[str, ...]) -> str:
    """Returns the classes of a soft target: one name, or up to three names with shares."""
    # At most two classes are mixed, so that of three or more the least probable one is absent.
    floor = target.min() if len(target) > 2 and target.min() < target.max() else 0.0
    above = [int(i) for i in np.argsort(-target, kind="stable") if target[i] > floor + 0.005]
    if len(above) == 1:
        return plots.truncate(names[above[0]])
    return ", ".join(f"{plots.truncate(names[i])} {target[i]:.2f}" for i in above[:3])
