"""Figures of the documentation, drawn at build time from the plans that define the models.

Lines and text have the text colour of the page, for light and dark themes. The other colours are
legible in both.
"""

import io
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from mvit_jax.common.text import plural
from mvit_jax.data import sampling
from mvit_jax.models.plan import grids, patch_grid, plan
from mvit_jax.models.positions import distances
from mvit_jax.models.variants import variant

TEXT = "#010203"  # placeholder of the page's text colour
QUERIES, KEYS, GRID = "#3b82c4", "#d9822b", "#7a9e5f"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # stores text as text, not as paths
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def svg(name: str, alt: str) -> str:
    """Returns a figure of this module as an `<svg>` element; `alt` is the alternative text."""
    draw: Callable[[], Figure] = globals()[name]
    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name, "svg.id": name}):
        draw().savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids must be unique in a page with several figures.
    text = re.sub(r'id="', f'id="{name}-', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", text)
    text = text.replace(TEXT, "currentColor")
    label = alt.replace("&", "&amp;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def cubes() -> Figure:
    """Draws a row of pixels, and the pixels in it that each token's patch embedding reads."""
    config = variant("mvit_b_16x4")
    kernel, stride, padding = (
        values[2] for values in (config.patch_kernel, config.patch_stride, config.patch_padding)
    )
    pixels, windows = 20, 5
    figure = Figure(figsize=(7.2, 2.2), layout="constrained")
    axes = _bare(figure)
    for pixel in range(-padding, pixels):
        inside = pixel >= 0
        axes.add_patch(Rectangle(
            (pixel, 0), 1, 0.8, facecolor=GRID if inside else "none", alpha=0.55 if inside else 1,
            edgecolor=TEXT, linewidth=0.6, linestyle="-" if inside else ":",
        ))  # fmt: skip
    for token in range(windows):
        start = token * stride - padding
        y = 1.15 + 0.32 * token
        axes.plot([start + 0.08, start + kernel - 0.08], [y, y], color=QUERIES, linewidth=5,
                  solid_capstyle="butt")  # fmt: skip
        axes.text(start + kernel + 0.25, y, f"token {token}", va="center", fontsize=9)
    axes.text(pixels + 0.4, 0.4, "pixels of a row", va="center")
    axes.text(-padding, -0.55, f"kernel {kernel}, stride {stride}, padding {padding} (dotted)",
              va="center")  # fmt: skip
    axes.set(xlim=(-padding - 0.3, pixels + 6), ylim=(-0.9, 1.15 + 0.32 * windows))
    return figure


def stages() -> Figure:
    """Draws the token grid and the channels of each stage of MViT-B."""
    config = variant("mvit_b_16x4")
    sizes = grids(config, config.frames, config.size, config.size)
    t, h, w = patch_grid(config, config.frames, config.size, config.size)
    columns = [("cubes", (t, h, w), config.width, "")]
    for stage, members in groupby(zip(plan(config), sizes, strict=True), lambda m: m[0].stage):
        blocks = list(members)
        block, block_grids = blocks[-1]
        count = plural(len(blocks), "block")
        columns.append((f"stage {stage + 1}", block_grids.output, block.attention_width, count))
    figure = Figure(figsize=(7.6, 2.75), layout="constrained")
    axes = _bare(figure)
    unit, step, depth = 1.0 / columns[0][1][1], 1.75, 0.05
    for i, (name, (t, h, _), width, count) in enumerate(columns):
        x, side = i * step, h * unit
        for frame in reversed(range(t)):
            corner = (x + depth * frame, depth * frame)
            _panel(axes, corner, side, side, GRID if frame == 0 else None)
        axes.text(x, -0.16, f"{t}×{h}×{h} tokens", va="top", fontsize=9)
        axes.add_patch(Rectangle((x, -0.72), width / 768 * 1.4, 0.2, facecolor=QUERIES))
        axes.text(x, -0.8, f"{width} channels", va="top", fontsize=9)
        axes.text(x, 1.68, name, fontweight="bold")
        axes.text(x, 1.5, count, fontsize=9)
    axes.set(xlim=(-0.1, step * len(columns) - 0.2), ylim=(-1.05, 1.85))
    axes.set_aspect("equal")
    return figure


def tokens() -> Figure:
    """Draws the numbers of queries and keys of each block of MViT-B, and the pooling strides."""
    config = variant("mvit_b_16x4")
    sizes = grids(config, config.frames, config.size, config.size)
    queries = [np.prod(g.output) for g in sizes]
    keys = [np.prod(g.keys) for g in sizes]
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    position = np.arange(len(sizes))
    axes.bar(position - 0.2, queries, 0.4, color=QUERIES, label="queries")
    axes.bar(position + 0.2, keys, 0.4, color=KEYS, label="keys and values")
    axes.set_yscale("log")
    axes.set_xticks(position)
    axes.set(xlabel="block", ylabel="tokens", ylim=(100, 60000))
    axes.legend(frameon=False, ncols=2, loc="upper right")
    for i, block in enumerate(plan(config)):
        stride = block.kv_pool.stride[1] if block.kv_pool else 1
        axes.text(i + 0.2, keys[i] * 1.15, f"/{stride}", ha="center", fontsize=8)
    return figure


def block() -> Figure:
    """Draws the data flow of the first block of stage 3 of MViT-B."""
    config = variant("mvit_b_16x4")
    first = sum(config.depths[:2])
    p = plan(config)[first]
    g = grids(config, config.frames, config.size, config.size)[first]
    assert p.q_pool and p.kv_pool and p.skip_pool

    def grid(size: tuple[int, ...], width: int) -> str:
        return f"{'×'.join(map(str, size))}, {width}"

    def pool(size: tuple[int, ...]) -> str:
        return "stride " + "×".join(map(str, size))

    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    axes = _bare(figure)
    axes.set(xlim=(0.05, 13.05), ylim=(0.4, 5.75))
    boxes = {
        "x": (1.0, 3.3, f"tokens\n{grid(g.input, p.width)}", GRID),
        "norm": (2.75, 3.3, "norm", None),
        "q": (4.6, 4.6, f"Q\n{grid(g.input, p.attention_width)}", QUERIES),
        "k": (4.6, 3.3, f"K\n{grid(g.input, p.attention_width)}", KEYS),
        "v": (4.6, 2.0, f"V\n{grid(g.input, p.attention_width)}", KEYS),
        "pq": (8.0, 4.6, f"pooled Q\n{grid(g.output, p.attention_width)}", QUERIES),
        "pk": (8.0, 3.3, f"pooled K\n{grid(g.keys, p.attention_width)}", KEYS),
        "pv": (8.0, 2.0, f"pooled V\n{grid(g.keys, p.attention_width)}", KEYS),
        "attend": (10.4, 3.3, "softmax\n(QKᵀ/√d) V,\nlinear", None),
        "sum": (10.4, 0.85, "+", None),
        "out": (12.05, 0.85, grid(g.output, p.attention_width), GRID),
    }
    for x, y, text, colour in boxes.values():
        _box(axes, x, y, text, colour)
    for start, end, label in (
        ("x", "norm", ""), ("norm", "q", ""), ("norm", "k", ""), ("norm", "v", ""),
        ("q", "pq", pool(p.q_pool.stride)), ("k", "pk", pool(p.kv_pool.stride)),
        ("v", "pv", pool(p.kv_pool.stride)), ("pq", "attend", ""), ("pk", "attend", ""),
        ("pv", "attend", ""), ("attend", "sum", ""), ("sum", "out", ""),
    ):  # fmt: skip
        _arrow(axes, boxes[start], boxes[end], label)
    axes.plot([1.0, 1.0], [2.85, 0.85], color=TEXT, linewidth=1)
    axes.add_patch(_arrow_patch((1.0, 0.85), (10.15, 0.85)))
    axes.text(5.5, 0.98, f"skip: max pool, {pool(p.skip_pool.stride)}", ha="center", fontsize=9)
    axes.text(4.6, 5.4, "linear, split in three", ha="center", fontsize=9)
    axes.text(8.0, 5.4, "pool on the grid, norm", ha="center", fontsize=9)
    return figure


def relative() -> Figure:
    """Draws the index of the relative positional embedding by query and key row, for two blocks."""
    config = variant("mvitv2_s_16x4")
    blocks, sizes = plan(config), grids(config, config.frames, config.size, config.size)
    chosen = [sum(config.depths[:2]), sum(config.depths[:2]) + 1]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    for axes, i in zip(figure.subplots(1, 2), chosen, strict=True):
        q, k = sizes[i].output[1], sizes[i].keys[1]
        rows = distances(q, k, blocks[i].relative_distances)
        image = axes.imshow(rows, cmap="viridis", aspect="equal", vmin=0)
        axes.set(xlabel="row of the key", ylabel="row of the query")
        axes.set_title(f"block {i}: {q} × {k}, {blocks[i].relative_space} embeddings", fontsize=10)
        axes.set_xticks(range(0, k, 3))
        axes.set_yticks(range(0, q, 3))
        figure.colorbar(image, ax=axes, shrink=0.8, label="index of the embedding")
    return figure


def clips() -> Figure:
    """Draws the frame indices of training clips and of the test protocol's clips."""
    frames, fps = 300, 30.0
    settings: dict[str, Any] = {"frames": 16, "stride": 4}
    rng = np.random.default_rng(1)
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    names = []
    for row in range(3):
        indices = sampling.train_indices(frames, fps, rng=rng, sampling="span", **settings)
        axes.plot(indices, [len(names)] * len(indices), ".", color=QUERIES, markersize=5)
        names.append(f"training, draw {row + 1}")
    for number, indices in enumerate(
        sampling.view_indices(frames, fps, clips=5, sampling="span", **settings)
    ):
        axes.plot(indices, [len(names)] * len(indices), ".", color=KEYS, markersize=5)
        names.append(f"test, clip {number + 1} of 5")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="frame of a video of 10 seconds at 30 frames a second", xlim=(-5, frames + 4))
    return figure


def _bare(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.axis("off")
    return axes


def _panel(axes: Axes, corner: tuple, width: float, height: float, colour: str | None) -> None:
    if colour:
        axes.add_patch(Rectangle(corner, width, height, facecolor=colour, alpha=0.45))
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=TEXT, linewidth=0.6))


def _box(axes: Axes, x: float, y: float, text: str, colour: str | None) -> None:
    width, height = _size(text)
    _panel(axes, (x - width / 2, y - height / 2), width, height, colour)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def _size(text: str) -> tuple[float, float]:
    lines = text.splitlines()
    return 0.35 + 0.125 * max(map(len, lines)), 0.3 + 0.28 * len(lines)


def _arrow(axes: Axes, start: tuple, end: tuple, label: str) -> None:
    (x1, y1, text1, _), (x2, y2, text2, _) = start, end
    (w1, h1), (w2, h2) = _size(text1), _size(text2)
    if x1 == x2:
        axes.add_patch(_arrow_patch((x1, y1 - h1 / 2), (x2, y2 + h2 / 2)))
        return
    axes.add_patch(_arrow_patch((x1 + w1 / 2, y1), (x2 - w2 / 2, y2)))
    axes.text((x1 + x2 + (w1 - w2) / 2) / 2, y1 + 0.1, label, ha="center", fontsize=8)


def _arrow_patch(start: tuple[float, float], end: tuple[float, float]) -> FancyArrowPatch:
    return FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=TEXT,
                           linewidth=1, shrinkA=0, shrinkB=0)  # fmt: skip
