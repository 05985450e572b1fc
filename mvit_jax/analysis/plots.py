"""Figures of results, as PNG files and as inline SVG in the colours of the HTML page."""

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mvit_jax.analysis import fonts
from mvit_jax.common.files import write_atomically

# Legible on white paper and on a dark page.
COLOURS = ("#2f7fb8", "#d9772b", "#35996b", "#c2507c", "#8a6fc0", "#a08420", "#4aa3a8", "#8c7f78")
DASHES = ("-", "--", "-.", ":")  # line styles; the next style each time the colours repeat
LABELLED = 40  # largest number of classes whose names fit beside the rows
LONGEST = 26  # characters of a name at most

# Colours that `svg` replaces with CSS variables.
INK, LINE = "#1b1c1d", "#c8c9ca"
_STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a class may be named $x$
    "svg.fonttype": "none",  # text remains text: searchable, and readable by screen readers
    "svg.hashsalt": "mvit_jax",  # the same figure gives the same bytes
}
# From transparent to blue, so that an empty cell has the colour of the page.
_BLUES = LinearSegmentedColormap.from_list("blues", [(0.13, 0.45, 0.71, a) for a in (0.0, 1.0)])


@dataclass(frozen=True)
class Curve:
    """A named line of `curves`; `dots` marks its points."""

    name: str
    x: Sequence[int | float]
    y: Sequence[int | float]
    dots: bool = False


def curves(lines: Sequence[Curve], y: str, x: str = "step", title: str = "") -> Figure:
    """Plots lines over steps, with a legend if there are several."""
    with style():
        figure = Figure(figsize=(4.5, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for i, line in enumerate(lines):
            axes.plot(
                line.x, line.y, linewidth=1.5, label=truncate(line.name), markersize=4,
                color=COLOURS[i % len(COLOURS)],
                linestyle=DASHES[i // len(COLOURS) % len(DASHES)],
                marker="o" if line.dots or len(line.x) == 1 else "",
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.grid(True)
        axes.set_axisbelow(True)
        if len(lines) > 1:
            axes.legend(fontsize=8.5)
    return figure


def confusion_matrix(
    confusion: Sequence[Sequence[int]], names: Sequence[str], title: str = ""
) -> Figure:
    """Plots a confusion matrix in percent of the true class (rows: true, columns: predicted)."""
    counts = np.asarray(confusion, float)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(names)
    named, numbers = n <= LABELLED, n <= LABELLED / 2
    side = min(max(0.36 * n, 2.2), 11) if named else 3.6
    with style():
        room = 1.7 if named else 0.9
        figure = Figure(figsize=(side + room, side + 1.3), layout="constrained")
        axes = figure.add_subplot()
        # With many classes a cell is a pixel or less: the square root makes small shares visible.
        scale = PowerNorm(1 if named else 0.5, vmin=0, vmax=100)
        image = axes.imshow(share, cmap=_BLUES, norm=scale, interpolation="none")
        if not numbers:
            figure.colorbar(image, ax=axes, label="% of the true class", location="bottom")
        below = "predicted, % of the true class" if numbers else "predicted"
        axes.set(title=title, xlabel=below, ylabel="true")
        axes.spines[["top", "right"]].set_visible(True)
        if named:
            shown = [truncate(name) for name in names]
            axes.set_xticks(range(n), shown, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(n), shown)
        if numbers:
            for i, j in np.argwhere(counts > 0):
                colour = "white" if share[i, j] > 55 else INK
                text = f"{share[i, j]:.0f}"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8.5)
    return figure


def class_accuracy(
    accuracy: Sequence[float | None],
    names: Sequence[str],
    title: str = "",
    measure: str = "top-1 accuracy, %",
) -> Figure:
    """Plots a bar per class, worst first; skips classes without videos (None)."""
    pairs = sorted((a, name) for a, name in zip(accuracy, names, strict=True) if a is not None)
    few = f"the worst {LABELLED} of {len(pairs)} classes" if len(pairs) > LABELLED else ""
    return _bars(pairs[:LABELLED], COLOURS[0], "%.0f", title=title, xlabel=measure, ylabel=few)


def percentages(amounts: dict[str, float], x: str, marked: str = "") -> Figure:
    """Plots parts as percentages of their sum, largest first; `marked` has another colour."""
    total = sum(amounts.values())
    rows = sorted(((100 * amount / total, name) for name, amount in amounts.items()), reverse=True)
    colours = [COLOURS[0] if name == marked else COLOURS[1] for _, name in rows]
    return _bars(rows, colours, "%.1f", xlabel=x)


def _bars(rows: Sequence[tuple[float, str]], colours: Any, fmt: str, **labels: str) -> Figure:
    """Plots horizontal bars of (percentage, name), the first on top."""
    with style():
        figure = Figure(figsize=(4.5, 1.0 + 0.23 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.barh(range(len(rows)), [share for share, _ in rows], color=colours)
        axes.bar_label(bars, fmt=fmt, padding=3, fontsize=8.5)
        axes.set_yticks(range(len(rows)), [truncate(name) for _, name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set(**labels, xlim=(0, 112), xticks=range(0, 101, 20))
    return figure


def budgets(
    names: Sequence[str],
    memory: Sequence[Mapping[str, float]],
    limit: float,
    times: Sequence[Mapping[str, float] | None],
    each: str,
    title: str = "",
) -> Figure:
    """Plots the memory of several programs by kind (bars), and their time by resource (dots).

    Args:
      names: of the programs.
      memory: for each program, GiB by kind.
      limit: GiB available.
      times: for each program, a chip's milliseconds per item by resource; None if the program
        does not fit.
      each: the item's name, such as "clip".
      title: of the figure.
    """
    kinds = list(dict.fromkeys(kind for part in memory for kind in part))
    causes = list(dict.fromkeys(cause for part in times if part for cause in part))
    rows = np.arange(len(names))
    with style():
        figure = Figure(figsize=(9.5, 1.9 + 0.36 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1))
        start = np.zeros(len(names))
        for i, kind in enumerate(kinds):
            sizes = np.array([part.get(kind, 0.0) for part in memory])
            left.barh(rows, sizes, 0.62, start, label=kind, color=COLOURS[i % len(COLOURS)])
            start += sizes
        left.axvline(limit, color=INK, linewidth=1, linestyle="--")
        left.text(limit, -0.62, f"{limit:g} ", ha="right", va="center", fontsize=8.5)
        left.set(xlabel="GiB per chip", yticks=rows, yticklabels=names)
        left.set_ylim(len(names) - 0.4, -0.9)  # the first on top
        for i, cause in enumerate(causes):
            points = [(t[cause], y) for t, y in zip(times, rows, strict=True) if t and cause in t]
            right.plot(
                *zip(*points, strict=True), "o", label=cause, markersize=6,
                color=COLOURS[i % len(COLOURS)],
            )  # fmt: skip
        for time, y in zip(times, rows, strict=True):
            if time is None:
                right.text(
                    0.5, y, "does not fit", ha="center", va="center",
                    transform=right.get_yaxis_transform(),
                )  # fmt: skip
        if causes:
            shown = [time for part in times if part for time in part.values()]
            subs = (1, 2, 5) if max(shown) < 300 * min(shown) else (1,)
            right.set_xscale("log")
            right.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
            right.xaxis.set_major_formatter("{x:g}")
            right.xaxis.set_minor_locator(NullLocator())
        right.set(xlabel=f"ms per {each} on one chip, at peak rates")
        for axes, columns in ((left, 3), (right, 2)):
            axes.grid(True, axis="x")
            axes.set_axisbelow(True)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(
                    fontsize=8.5, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0),
                    columnspacing=1.2, handletextpad=0.4, handlelength=1.2, borderaxespad=0.2,
                )  # fmt: skip
        figure.suptitle(title, fontsize=10.5)
    return figure


def truncate(name: str) -> str:
    """Truncates a name to `LONGEST` characters, the last one an ellipsis."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1].rstrip() + "…"


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG file atomically; raises `UserError` on failure."""
    write_atomically(path, png(figure, dpi=150))


def png(figure: Figure, dpi: int) -> bytes:
    """Returns the content of a PNG file, with any installed font that the names need."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi)
        if fonts.complete(figure):  # which needs the texts of ticks: they are made while saving
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(figure: Figure, label: str, prefix: str) -> str:
    """Returns a figure as an `<svg>` element for an HTML page, with escaped names.

    The CSS variable `--ink` is the colour of text and axes, and `--line` that of grid lines. The
    element sets `--natural` to its nominal width in pixels.

    Args:
      figure: the figure.
      label: a description for screen readers. It is not escaped, so it must not come from data.
      prefix: prefix of the element's ids, unique within the page.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Only within tags: a class may be named url(#x).
    text = re.sub(r"<[^>]*>", lambda tag: _prefix_ids(tag[0], prefix), text)
    width = figure.get_figwidth() * 72
    head = f'<svg role="img" aria-label="{label}" style="--natural: {width:.0f}px"'
    return re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf"{head} \1>", text)


def _prefix_ids(tag: str, prefix: str) -> str:
    """Prefixes a tag's ids and references, and replaces its colours with CSS variables."""
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', tag)
    tag = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", tag)
    return tag.replace(INK, "var(--ink)").replace(LINE, "var(--line)")


@contextmanager
def style() -> Iterator[None]:
    """Applies the figures' style; also required while saving, which creates ticks."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The font may lack the script of a name. `png` then uses other fonts, and in HTML the
        # browser does.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
