"""MViT in float64 NumPy, one clip at a time: an independent version of PySlowFast's computation.

It reads a state dict with PySlowFast's names and shapes, does not import `mvit_jax` and is slow.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ONE = (1, 1, 1)


class Block(NamedTuple):
    """One block; kernels and strides are (time, height, width)."""

    width: int
    attention: int
    out: int
    heads: int
    q_kernel: tuple = ONE
    q_stride: tuple = ONE
    kv_kernel: tuple = ONE
    kv_stride: tuple = ONE


@dataclass(frozen=True)
class Settings:
    blocks: tuple[Block, ...]
    grid: tuple = (2, 4, 4)  # of tokens, for the positional embeddings
    patch: tuple = ((3, 7, 7), (2, 4, 4), (1, 3, 3))  # kernel, stride, padding
    classes: int = 5
    class_token: bool = True
    positions: str = "separate"
    stem_norm: bool = False
    mode: str = "conv"
    pool_first: bool = False
    separate: bool = False
    qkv_bias: bool = True
    relative: str = "none"
    residual: str = "none"
    skip: str = "normalised"
    mean_pooling: bool = False
    pool_norm_eps: float = 1e-6


def shapes(s: Settings) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors of the state dict."""
    out: dict[str, tuple[int, ...]] = {}

    def linear(name, inputs, outputs, bias=True):
        out[name + ".weight"] = (outputs, inputs)
        if bias:
            out[name + ".bias"] = (outputs,)

    def norm(name, width):
        out[name + ".weight"] = out[name + ".bias"] = (width,)

    c, (t, h, w) = s.blocks[0].width, s.grid
    out["patch_embed.proj.weight"], out["patch_embed.proj.bias"] = (c, 3, *s.patch[0]), (c,)
    if s.class_token:
        out["cls_token"] = (1, 1, c)
    if s.positions in ("joint", "sincos"):
        out["pos_embed"] = (1, s.class_token + t * h * w, c)
    if s.positions in ("space", "separate"):
        out["pos_embed_spatial"] = (1, h * w, c)
        if s.class_token:
            out["pos_embed_class"] = (1, 1, c)
    if s.positions == "separate":
        out["pos_embed_temporal"] = (1, t, c)
    if s.stem_norm:
        norm("norm_stem", c)
    grid = s.grid
    for i, b in enumerate(s.blocks):
        name = f"blocks.{i}."
        norm(name + "norm1", b.width)
        if s.separate or s.pool_first:
            for x in "qkv":
                linear(f"{name}attn.{x}", b.width, b.attention, s.qkv_bias)
        else:
            linear(name + "attn.qkv", b.width, 3 * b.attention, s.qkv_bias)
        pooled = b.width if s.pool_first else b.attention
        dim = pooled if s.mode == "conv_unshared" else pooled // b.heads
        for x in "qkv":
            kernel, stride = (b.q_kernel, b.q_stride) if x == "q" else (b.kv_kernel, b.kv_stride)
            if s.mode.startswith("conv") and math.prod(kernel) * math.prod(stride) > 1:
                out[f"{name}attn.pool_{x}.weight"] = (dim, 1, *kernel)
                norm(f"{name}attn.norm_{x}", dim)
        side = max(grid[1:])
        rows = 2 * max(side // b.q_stride[1], side // b.kv_stride[1], 1) - 1
        if s.relative in ("space", "both"):
            out[name + "attn.rel_pos_h"] = (rows, b.attention // b.heads)
            out[name + "attn.rel_pos_w"] = (rows, b.attention // b.heads)
        if s.relative in ("time", "both"):
            out[name + "attn.rel_pos_t"] = (2 * grid[0] - 1, b.attention // b.heads)
        linear(name + "attn.proj", b.attention, b.attention)
        norm(name + "norm2", b.attention)
        linear(name + "mlp.fc1", b.attention, 4 * b.attention)
        linear(name + "mlp.fc2", 4 * b.attention, b.out)
        if b.width != b.out and s.skip != "none":
            linear(name + "proj", b.width, b.out)
        grid = tuple(n // q for n, q in zip(grid, b.q_stride, strict=True))
    norm("norm", s.blocks[-1].out)
    linear("head.projection", s.blocks[-1].out, s.classes)
    return out


def forward(state: dict[str, np.ndarray], s: Settings, clip: np.ndarray) -> np.ndarray:
    """Returns the logits of one clip [3, T, H, W]; an image has T = 1."""
    p = {name: np.asarray(values, np.float64) for name, values in state.items()}
    kernel = p["patch_embed.proj.weight"].reshape(s.blocks[0].width, 3, *s.patch[0])
    patches, grid = windows(np.moveaxis(clip.astype(np.float64), 0, -1), *s.patch, fill=0.0)
    tokens = np.einsum("nthwc,octhw->no", patches, kernel) + p["patch_embed.proj.bias"]
    x = add_positions(p, s, tokens, grid)
    if s.stem_norm:
        x = norm(p, "norm_stem", x)
    for i, block in enumerate(s.blocks):
        x, grid = run_block(p, f"blocks.{i}.", s, block, x, grid)
    if s.mean_pooling:
        pooled = norm(p, "norm", x[int(s.class_token) :].mean(0))
    else:
        x = norm(p, "norm", x)
        pooled = x[0] if s.class_token else x.mean(0)
    return linear(p, "head.projection", pooled)


def add_positions(p, s: Settings, tokens, grid):
    first, width = int(s.class_token), tokens.shape[-1]
    embeddings = np.zeros((first + math.prod(s.grid), width))
    if s.positions == "joint":
        embeddings = p["pos_embed"].reshape(embeddings.shape)
    elif s.positions == "sincos":
        embeddings[first:] = sincos(s.grid, width)
    elif s.positions != "none":
        embeddings[:first] = p["pos_embed_class"][0] if first else 0
        for n, (t, h, w) in enumerate(positions_of(s.grid)):
            embeddings[first + n] = p["pos_embed_spatial"][0, h * s.grid[2] + w]
            if s.positions == "separate":
                embeddings[first + n] += p["pos_embed_temporal"][0, t]
    on_grid = embeddings[first:].reshape(*s.grid, width)
    for axis in range(3):
        on_grid = np.moveaxis(resize(np.moveaxis(on_grid, axis, 0), grid[axis]), 0, axis)
    tokens = tokens + on_grid.reshape(tokens.shape)
    return np.concatenate([p["cls_token"][0] + embeddings[:1], tokens]) if first else tokens


def run_block(p, name, s: Settings, b: Block, x, grid):
    y = norm(p, name + "norm1", x)
    attended, new_grid = attention(p, name + "attn.", s, b, y, grid)
    skip = skip_of(p, name, s, x, y, b.attention)
    if math.prod(b.q_stride) > 1:
        kernel = tuple(n + 1 if n > 1 else 1 for n in b.q_stride)
        skip, _ = pool(skip, grid, "max", kernel, b.q_stride)
    x = skip + attended
    y = norm(p, name + "norm2", x)
    hidden = linear(p, name + "mlp.fc1", y)
    hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    return skip_of(p, name, s, x, y, b.out) + linear(p, name + "mlp.fc2", hidden), new_grid


def skip_of(p, name, s: Settings, x, normalised, width):
    if x.shape[-1] == width:
        return x
    if s.skip == "none":
        return np.zeros((len(x), width))
    return linear(p, name + "proj", normalised if s.skip == "normalised" else x)


def attention(p, name, s: Settings, b: Block, x, grid):
    """Maps tokens [n, width] on a grid to tokens [m, attention] on the grid of the queries."""
    rows, grids = {}, {}
    for index, which in enumerate("qkv"):
        kernel, stride = (b.q_kernel, b.q_stride) if index == 0 else (b.kv_kernel, b.kv_stride)
        y = x if s.pool_first else project(p, name, s, index, x)
        weight = p.get(f"{name}pool_{which}.weight")
        grids[which] = grid
        if math.prod(kernel) * math.prod(stride) > 1:
            groups = 1 if s.mode == "conv_unshared" else b.heads
            pooled = []
            for part in np.split(y, groups, axis=1):
                part, grids[which] = pool(part, grid, s.mode, kernel, stride, weight)
                if weight is not None:
                    part = norm(p, f"{name}norm_{which}", part, s.pool_norm_eps)
                pooled.append(part)
            y = np.concatenate(pooled, axis=1)
        rows[which] = project(p, name, s, index, y) if s.pool_first else y
    out = []
    for head in range(b.heads):
        dim = b.attention // b.heads
        q, k, v = (rows[which][:, head * dim : (head + 1) * dim] for which in "qkv")
        scores = q @ k.T / math.sqrt(dim) + relative_scores(p, name, q, grids["q"], grids["k"])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        y = weights / weights.sum(1, keepdims=True) @ v
        first = len(q) - math.prod(grids["q"])
        if s.residual == "all":
            y = y + q
        elif s.residual == "grid":
            y[first:] += q[first:]
        out.append(y)
    return linear(p, name + "proj", np.concatenate(out, axis=1)), grids["q"]


def project(p, name, s: Settings, index, x):
    if s.separate or s.pool_first:
        return linear(p, name + "qkv"[index], x)
    return np.split(linear(p, name + "qkv", x), 3, axis=1)[index]


def relative_scores(p, name, q, q_grid, k_grid):
    """Returns q.R for every pair of positions, with q not scaled; zero for the class token."""
    first = len(q) - math.prod(q_grid)
    out = np.zeros((len(q), first + math.prod(k_grid)))
    for axis, letter in enumerate("thw"):
        table = p.get(f"{name}rel_pos_{letter}")
        if table is None:
            continue
        table = resize(table, 2 * max(q_grid[axis], k_grid[axis]) - 1)
        rows = distances(q_grid[axis], k_grid[axis])
        for i, query in enumerate(positions_of(q_grid), start=first):
            for j, key in enumerate(positions_of(k_grid), start=first):
                out[i, j] += q[i] @ table[rows[query[axis], key[axis]]]
    return out


def distances(queries: int, keys: int) -> np.ndarray:
    """Returns distances on the finer grid, from 0, truncated, in float32 step by step."""
    f, q_ratio, k_ratio = np.float32, max(keys / queries, 1.0), max(queries / keys, 1.0)
    out = np.zeros((queries, keys), int)
    for i, j in itertools.product(range(queries), range(keys)):
        value = f(f(i) * f(q_ratio)) - f(f(j) * f(k_ratio))
        out[i, j] = int(f(value) + f((keys - 1) * k_ratio))  # towards zero
    return out


def pool(x, grid, mode, kernel, stride, weight=None):
    """Pools tokens [n, dim] except for a class token before them."""
    first = len(x) - math.prod(grid)
    padding = tuple(k // 2 for k in kernel)
    on_grid = x[first:].reshape(*grid, x.shape[-1])
    fill = -np.inf if mode == "max" else 0.0
    patches, new_grid = windows(on_grid, kernel, stride, padding, fill)
    if mode == "max":
        out = patches.max((1, 2, 3))
    elif mode == "avg":  # padding counts
        out = patches.mean((1, 2, 3))
    else:
        out = np.einsum("nthwd,dthw->nd", patches, weight.reshape(-1, *kernel))
    return np.concatenate([x[:first], out]), new_grid


def windows(on_grid, kernel, stride, padding, fill):
    """Returns the windows [n, *kernel, channels] of a padded grid, and their grid."""
    padded = np.pad(on_grid, [*((n, n) for n in padding), (0, 0)], constant_values=fill)
    grid = tuple((n - k) // s + 1 for n, k, s in zip(padded.shape, kernel, stride, strict=False))
    patches = []
    for position in positions_of(grid):
        t, h, w = (n * s for n, s in zip(position, stride, strict=True))
        patches.append(padded[t : t + kernel[0], h : h + kernel[1], w : w + kernel[2]])
    return np.array(patches), grid


def positions_of(grid):
    return itertools.product(*(range(n) for n in grid))


def resize(table: np.ndarray, length: int) -> np.ndarray:
    """Interpolates rows linearly, centres at half-integers, ends repeated."""
    old = len(table)
    out = []
    for i in range(length):
        position = min(max((i + 0.5) * old / length - 0.5, 0), old - 1)
        low = math.floor(position)
        high = min(low + 1, old - 1)
        out.append(table[low] * (1 - (position - low)) + table[high] * (position - low))
    return np.array(out)


def sincos(grid, width: int) -> np.ndarray:
    """Returns embeddings with a quarter of the channels for time, then column, then row."""
    rows = []
    for t, h, w in positions_of(grid):
        parts = []
        for position, channels in ((t, width // 4), (w, width * 3 // 8), (h, width * 3 // 8)):
            waves = [position / 10000 ** (2 * i / channels) for i in range(channels // 2)]
            parts += [math.sin(x) for x in waves] + [math.cos(x) for x in waves]
        rows.append(parts)
    return np.array(rows)


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0.0)


def norm(p, name, x, eps=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * p[name + ".weight"] + p[name + ".bias"]


# Settings of small models.


def stages(depths, *, attention=False, growth=2, q=(1, 2, 2), kv=(1, 4, 4), kernel=(3, 3, 3),
           pool_queries=False, adaptive=True):  # fmt: skip
    """Returns blocks of stages that start at 8 channels and 1 head; `kernel` None is stride + 1."""

    def kernel_of(stride):
        return kernel or tuple(n + 1 if n > 1 else 1 for n in stride)

    blocks = []
    for stage, depth in enumerate(depths):
        for i in range(depth):
            wide, heads = 8 * growth**stage, growth**stage
            starts, ends = i == 0 and stage > 0, i == depth - 1 and stage < len(depths) - 1
            stride = q if starts else ONE
            if starts and adaptive:
                kv = tuple(max(a // b, 1) for a, b in zip(kv, q, strict=True))
            blocks.append(
                Block(
                    width=wide // growth if starts and attention else wide,
                    attention=wide,
                    out=wide * growth if ends and not attention else wide,
                    heads=heads,
                    q_kernel=kernel_of(stride) if pool_queries or stride != ONE else ONE,
                    q_stride=stride,
                    kv_kernel=kernel_of(kv),
                    kv_stride=kv,
                )
            )
    return tuple(blocks)


IMAGE = {"grid": (1, 6, 6), "patch": ((1, 7, 7), (1, 4, 4), (0, 3, 3)), "positions": "joint"}


def settings(blocks=None, **changes) -> Settings:
    """Returns a model of two blocks on 2 x 6 x 6 tokens; `blocks` are arguments of `stages`."""
    blocks = stages((1, 1), **{"kv": (1, 2, 2)} | (blocks or {}))
    return Settings(blocks=blocks, **{"grid": (2, 6, 6)} | changes)


def v2(**changes) -> Settings:
    same = {"positions": "none", "relative": "both", "residual": "grid"}
    blocks = {"attention": True, "pool_queries": True} | changes.pop("blocks", {})
    return settings(blocks, **same | changes)
