"""Contact sheet of an experiment's first training clips, after augmentation."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from mvit_jax.analysis import plots
from mvit_jax.config import Config, check
from mvit_jax.data import pipeline
from mvit_jax.data.loader import LoaderOptions
from mvit_jax.training import build, step

CLIPS = 8
FRAMES = 8  # frames drawn per clip


def draw(config: Config, path: str | os.PathLike[str]) -> Path:
    """Draws the first clips of step 0 after all augmentation, including random erasing and mixup.

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
    plots.save(_figure(pixels, targets, videos.class_names), path)
    return Path(path)


def _figure(
    clips: np.ndarray, targets: np.ndarray, names: tuple[str, ...]
) -> matplotlib.figure.Figure:
    shown = np.unique(np.linspace(0, clips.shape[1] - 1, FRAMES).round().astype(int))
    with plots.style():
        figure = matplotlib.figure.Figure(
            (1.2 * len(shown) + 0.4, 1.5 * len(clips)), layout="constrained"
        )
        rows = figure.subplots(len(clips), len(shown), squeeze=False)
        for axes, clip, target in zip(rows, clips, targets, strict=True):
            for ax, frame in zip(axes, clip[shown], strict=True):
                ax.imshow(frame)
                ax.axis("off")
            axes[0].set_title(_label(target, names), loc="left", fontsize="small")
    return figure


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
