"""Figures of a prediction: frames, class bars, timeline, and Grad-CAM, still and animated."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mvit_jax.analysis import plots, render
from mvit_jax.common.text import printable
from mvit_jax.data.sampling import FRAME_RATE
from mvit_jax.predict.windows import Timeline, clock

Shown = UInt8[np.ndarray, "clips time height width 3"]
Heat = Float[np.ndarray, "clips time height width"]

BLUE = "#2a6f97"
# The colour-blind safe palette of Okabe and Ito (2008), without black and pale yellow.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
GREY = "#9a9a9a"
FRAMES = 8  # frames drawn at most
CAPTION = "Grad-CAM: brighter parts contributed more to the score of the most probable class"
SECONDS_A_PICTURE = 0.5  # duration of each frame in an image model's animation

_INCHES = {"frames": 1.6, "bar": 0.32, "timeline": 2.6, "gap": 0.7}


def picture(
    title: str,
    probabilities: Float[np.ndarray, " classes"],
    names: Sequence[str],
    shown: Shown,
    times: Float[np.ndarray, "clips time"],
    *,
    top: int = 5,
    timeline: Timeline | None = None,
    grad_cam: Heat | None = None,
) -> bytes:
    """Returns a PNG file with frames, bars of the most probable classes, and the timeline.

    Args:
      title: text above the figure.
      probabilities: of all classes.
      names: of all classes.
      shown: clips whose frames are drawn.
      times: presentation times of the frames of `shown`, in seconds, drawn above the frames.
      top: number of bars.
      timeline: the timeline of a long video.
      grad_cam: maps of `shown`, drawn below the frames.
    """
    top = min(top, len(names))
    rows = 1 if grad_cam is None else 2
    heights = [_INCHES["frames"] * rows, _INCHES["bar"] * top + _INCHES["gap"]]
    if timeline is not None:
        heights.append(_INCHES["timeline"])
    figure = Figure(figsize=(12, sum(heights) + _INCHES["gap"]), layout="constrained")
    title = printable(title)
    figure.suptitle(
        _plain(title if len(title) <= 100 else "…" + title[-99:]), x=0.01, ha="left", fontsize=12
    )
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _strip(parts[0], shown, times, grad_cam)
    _bars(parts[1].subplots(), probabilities, names, top)
    if timeline is not None:
        _draw_timeline(parts[2], timeline, names)
    return plots.png(figure, dpi=110)


def timeline_picture(timeline: Timeline, names: Sequence[str]) -> bytes:
    """Returns a PNG file with the timeline alone."""
    figure = Figure(figsize=(9, _INCHES["timeline"] + 0.4), layout="constrained")
    _draw_timeline(figure, timeline, names)
    return plots.png(figure, dpi=110)


def animate(shown: Shown, grad_cam: Heat) -> UInt8[np.ndarray, "frames _height _width 3"]:
    """Returns the clips as one animation: each frame alone, and beside it under its map."""
    rows = []
    for clip, heat in zip(shown, grad_cam, strict=True):
        panels = (clip, render.overlay(clip, heat))
        rows.append(np.concatenate([render.enlarge(panel, 224) for panel in panels], axis=2))
    return np.concatenate(rows)


def animation_fps(shown: Shown, stride: int) -> float:
    """Returns the animation's frame rate: real time for clips, slow for an image model's frames."""
    return 1 / SECONDS_A_PICTURE if shown.shape[1] == 1 else FRAME_RATE / stride


def _strip(
    figure: SubFigure, shown: Shown, times: Float[np.ndarray, "clips time"], grad_cam: Heat | None
) -> None:
    """Draws up to `FRAMES` frames: evenly spaced for one clip, else each clip's middle frame."""
    if len(shown) == 1:
        frames = np.unique(np.linspace(0, shown.shape[1] - 1, FRAMES).round().astype(int))
        pairs = [(0, int(i)) for i in frames]
    else:
        pairs = [(i, shown.shape[1] // 2) for i in range(len(shown))]
    rows = figure.subfigures(1 if grad_cam is None else 2, 1, squeeze=False)[:, 0]
    axes = np.stack([row.subplots(1, FRAMES) for row in rows])
    for ax in axes.flat:
        ax.axis("off")
    moving = shown.size > shown[0, 0].size
    for column, (clip, frame) in enumerate(pairs):
        _image(axes[0, column], shown[clip, frame])
        if moving:
            seconds = times[clip, frame]
            label = clock(seconds) if len(shown) > 1 else f"{seconds:.1f} s"
            axes[0, column].set_title(label, fontsize=8, pad=3)
        if grad_cam is not None:
            _image(axes[1, column], render.overlay(shown[clip], grad_cam[clip])[frame])
    if grad_cam is not None:
        rows[1].suptitle(CAPTION, x=0.003, ha="left", fontsize=8)


def _image(axes: Axes, image: UInt8[np.ndarray, "height width 3"]) -> None:
    # Smooths, unless the image is enlarged by an integer factor or by more than 3.
    axes.imshow(image, interpolation="antialiased")


def _bars(
    axes: Axes, probabilities: Float[np.ndarray, " classes"], names: Sequence[str], top: int
) -> None:
    order = np.argsort(-probabilities, kind="stable")[:top]
    values = 100 * probabilities[order]
    bars = axes.barh(range(top), values, color=BLUE)
    axes.bar_label(bars, [f"{value:.1f} %" for value in values], padding=4, fontsize=9)
    axes.set_yticks(range(top), [_plain(plots.truncate(names[int(i)])) for i in order], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def _draw_timeline(figure: Any, timeline: Timeline, names: Sequence[str]) -> None:
    """Draws probabilities over time, and below them a strip with the most probable class."""
    segments = timeline.segments()
    share = np.zeros(len(names))
    for segment in segments:
        share[segment.label] += segment.end - segment.start
    # The classes that are most probable for the longest time have colours; others are grey.
    labels = [int(i) for i in np.argsort(-share, kind="stable")[: len(COLOURS)] if share[i] > 0]
    colour = dict(zip(labels, COLOURS, strict=False))
    lines, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
    centres = (timeline.starts + timeline.ends) / 2
    for label in labels:
        name = _plain(plots.truncate(names[label]))
        values = 100 * timeline.probabilities[:, label]
        marker = "o" if len(centres) < 60 else ""
        lines.plot(centres, values, color=colour[label], label=name, lw=1.5, marker=marker, ms=3)
    lines.set(ylim=(-3, 103), ylabel="probability, %")
    lines.grid(axis="y", alpha=0.3)
    for segment in segments:
        strip.axvspan(segment.start, segment.end, color=colour.get(segment.label, GREY), lw=0)
    if len(np.flatnonzero(share)) > len(labels):
        lines.plot([], [], color=GREY, lw=6, label="other classes")
    strip.set(xlim=(timeline.starts[0], timeline.ends[-1]), yticks=[], xlabel="time")
    strip.set_ylabel("top-1", rotation=0, ha="right", va="center", fontsize=8)
    strip.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 3, 6, 10], integer=True))
    strip.xaxis.set_major_formatter(FuncFormatter(lambda x, _: clock(x)))
    for axes in (lines, strip):
        axes.spines[["top", "right"]].set_visible(False)
    lines.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _plain(text: str) -> str:
    # Matplotlib parses text between dollar signs as mathematics, and raises if the parser fails.
    return text.replace("$", r"\$")
