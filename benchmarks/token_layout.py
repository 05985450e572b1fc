"""Memory traffic on a TPU for token layouts: one sequence, or class token and grid apart.

Compiles forward and backward pass of every kind of block of MViTv1-B 16x4 (conv pooling, bfloat16)
ahead of time for one TPU v5e chip, in several token layouts. Prints the compiler's "bytes accessed"
and temporary memory. No TPU is needed, but the package `jax[tpu]` is.

    python -m benchmarks.token_layout                  # the table
    python -m benchmarks.token_layout --whole          # and all 16 blocks as one program
    python -m benchmarks.token_layout --check          # layouts agree on the CPU, tiny shapes

All blocks are unrolled, as `cost_analysis` counts the body of a loop once, for any trip count.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

# The program only compiles for a TPU: arrays are on the CPU, and without a TPU there is no metadata
# server to query.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies

Params = dict[str, Any]
Tokens = tuple[jax.Array, ...]


class Block(NamedTuple):
    """A kind of block: the model has `copies` of it, and `grid` is (T, H, W) of the input."""

    name: str
    copies: int
    grid: tuple[int, int, int]
    width: int
    heads: int
    out: int
    q_stride: int
    kv_stride: int

    @property
    def pooled_grid(self) -> tuple[int, int, int]:
        time, height, width = self.grid
        return time, -(-height // self.q_stride), -(-width // self.q_stride)


# Fan et al. 2021, Table 2 and section 3.2: K/V stride 8 at full resolution, halved with each
# stage, and widths doubled by the MLP of the last block of a stage (Table A.1).
MVIT_B_16X4 = (
    Block("0", 1, (8, 56, 56), 96, 1, 192, 1, 8),
    Block("1", 1, (8, 56, 56), 192, 2, 192, 2, 4),
    Block("2", 1, (8, 28, 28), 192, 2, 384, 1, 4),
    Block("3", 1, (8, 28, 28), 384, 4, 384, 2, 2),
    Block("4-12", 9, (8, 14, 14), 384, 4, 384, 1, 2),
    Block("13", 1, (8, 14, 14), 384, 4, 768, 1, 2),
    Block("14", 1, (8, 14, 14), 768, 8, 768, 2, 1),
    Block("15", 1, (8, 7, 7), 768, 8, 768, 1, 1),
)


class Layout(NamedTuple):
    """Layout of the tokens between operations.

    Attributes:
      pair: True if class token `[B, 1, C]` and grid are separate arrays; False for one sequence
        `[B, 1 + THW, C]`.
      flat: True if the grid of a pair is `[B, THW, C]`, reshaped for pooling only; False for
        `[B, T, H, W, C]`.
      join_queries: True if the queries of a pair are concatenated for one attention call.
    """

    name: str
    pair: bool
    flat: bool = True
    join_queries: bool = False


LAYOUTS = (
    Layout("sequence", pair=False),
    Layout("pair", pair=True, flat=False),
    Layout("pair, flat grid", pair=True),
    Layout("pair, flat, joined queries", pair=True, join_queries=True),
)


def flatten(grid: jax.Array) -> jax.Array:
    return grid.reshape(grid.shape[0], -1, grid.shape[-1])


def split(
    tokens: Tokens, grid: tuple[int, int, int], layout: Layout
) -> tuple[jax.Array, jax.Array]:
    """Splits tokens of any layout into class token `[B, 1, C]` and grid `[B, T, H, W, C]`."""
    token, rest = tokens if layout.pair else unchain(tokens[0])
    return token, rest.reshape(rest.shape[0], *grid, rest.shape[-1])


def join(token: jax.Array, grid: jax.Array, layout: Layout) -> Tokens:
    if layout.pair:
        return token, flatten(grid) if layout.flat else grid
    return (chain(token, flatten(grid)),)


def chain(token: jax.Array, rest: jax.Array) -> jax.Array:
    """Concatenates class token `[B, 1, ...]` and other tokens `[B, N, ...]` into a sequence."""
    return jnp.concatenate([token, rest], axis=1)


def unchain(sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
    return sequence[:, :1], sequence[:, 1:]


def layer_norm(x: jax.Array, p: Params) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]).astype(x.dtype)


def linear(x: jax.Array, p: Params) -> jax.Array:
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def conv_pool(grid: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    channels = grid.shape[-1]
    return lax.conv_general_dilated(
        grid,
        kernel.astype(grid.dtype)[:, :, :, None],
        (1, stride, stride),
        ((1, 1),) * 3,
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=channels,
    )


def max_pool(grid: jax.Array, stride: int) -> jax.Array:
    # With the literal -inf, JAX recognises a max pool and differentiates it.
    return lax.reduce_window(
        grid,
        -jnp.inf,
        lax.max,
        (1, 1, 3, 3, 1),
        (1, 1, stride, stride, 1),
        ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)),
    )


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of q `[B, ..., heads, D]` to k, v `[B, keys, heads, D]`: `[B, ..., C]`."""
    queries = q.reshape(q.shape[0], -1, *q.shape[-2:]) * q.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return out.reshape(*q.shape[:-2], -1)


def keys_and_values(
    p: Params, kv: Tokens, block: Block, layout: Layout
) -> tuple[jax.Array, jax.Array]:
    # One convolution pools keys and values. Heads are merged into channels and share weights.
    kernel = jnp.concatenate(
        [jnp.tile(p[name], block.heads) for name in ("pool_k", "pool_v")], axis=-1
    )
    token, grid = split(kv, block.grid, layout)
    pooled = flatten(conv_pool(grid, kernel, block.kv_stride))
    k, v = jnp.split(chain(token, pooled), 2, axis=-1)
    return (
        layer_norm(split_heads(k, block.heads), p["norm_k"]),
        layer_norm(split_heads(v, block.heads), p["norm_v"]),
    )


def queries(p: Params, q: Tokens, block: Block, layout: Layout) -> Tokens:
    if block.q_stride == 1:
        return tuple(split_heads(part, block.heads) for part in q)
    token, grid = split(q, block.grid, layout)
    pooled = conv_pool(grid, jnp.tile(p["pool_q"], block.heads), block.q_stride)
    parts = join(token, pooled, layout)
    return tuple(layer_norm(split_heads(part, block.heads), p["norm_q"]) for part in parts)


def attention(p: Params, tokens: Tokens, block: Block, layout: Layout) -> Tokens:
    qkv = [linear(part, p["qkv"]) for part in tokens]
    q = queries(p, tuple(part[..., : block.width] for part in qkv), block, layout)
    k, v = keys_and_values(p, tuple(part[..., block.width :] for part in qkv), block, layout)
    if layout.join_queries:
        parts = unchain(attend(chain(*q), k, v))
    else:
        parts = tuple(attend(part, k, v) for part in q)
    return tuple(linear(part, p["proj"]) for part in parts)


def apply_block(p: Params, tokens: Tokens, block: Block, layout: Layout) -> Tokens:
    attended = attention(p, tuple(layer_norm(x, p["norm1"]) for x in tokens), block, layout)
    if block.q_stride > 1:
        token, grid = split(tokens, block.grid, layout)
        tokens = join(token, max_pool(grid, block.q_stride), layout)
    return tuple(mlp(p, x + y, block) for x, y in zip(tokens, attended, strict=True))


def mlp(p: Params, x: jax.Array, block: Block) -> jax.Array:
    y = layer_norm(x, p["norm2"])
    hidden = jax.nn.gelu(linear(y, p["fc1"]), approximate=False)
    skip = x if block.out == block.width else linear(y, p["expand"])
    return skip + linear(hidden, p["fc2"])


def param_shapes(block: Block) -> Params:
    """Returns the shapes of a block's parameters."""
    width, head = block.width, block.width // block.heads

    def dense(rows: int, columns: int) -> Params:
        return {"kernel": (rows, columns), "bias": (columns,)}

    def norm(size: int) -> Params:
        return {"scale": (size,), "bias": (size,)}

    shapes = {
        "norm1": norm(width),
        "qkv": dense(width, 3 * width),
        "pool_k": (3, 3, 3, head),
        "norm_k": norm(head),
        "pool_v": (3, 3, 3, head),
        "norm_v": norm(head),
        "proj": dense(width, width),
        "norm2": norm(width),
        "fc1": dense(width, 4 * width),
        "fc2": dense(4 * width, block.out),
    }
    if block.q_stride > 1:
        shapes |= {"pool_q": (3, 3, 3, head), "norm_q": norm(head)}
    if block.out != width:
        shapes |= {"expand": dense(width, block.out)}
    return shapes


def token_shapes(
    batch: int, grid: tuple[int, int, int], width: int, layout: Layout
) -> tuple[tuple[int, ...], ...]:
    count = grid[0] * grid[1] * grid[2]
    if not layout.pair:
        return ((batch, 1 + count, width),)
    return (batch, 1, width), (batch, count, width) if layout.flat else (batch, *grid, width)


def train_step(blocks: tuple[Block, ...], layout: Layout) -> Callable[..., Any]:
    """Returns `(params, tokens, cotangent) -> (out, d params, d tokens)`, forward and backward."""

    def forward(params: list[Params], tokens: Tokens) -> Tokens:
        for p, block in zip(params, blocks, strict=True):
            tokens = apply_block(p, tokens, block, layout)
        return tokens

    def step(params: list[Params], tokens: Tokens, cotangent: Tokens) -> Any:
        out, backward = jax.vjp(forward, params, tokens)
        return out, *backward(cotangent)

    return step


class Cost(NamedTuple):
    """Bytes accessed and temporary bytes of a compiled step."""

    accessed: float
    temporary: float


def v5e_device() -> Any:
    """Returns a TPU v5e chip as compilation target; it need not be attached."""
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def measure(blocks: tuple[Block, ...], layout: Layout, batch: int, device: Any) -> Cost:
    sharding = jax.sharding.SingleDeviceSharding(device)

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = jax.tree.map(
        lambda shape: struct(shape, jnp.float32),
        [param_shapes(block) for block in blocks],
        is_leaf=lambda node: isinstance(node, tuple),
    )
    first, last = blocks[0], blocks[-1]
    ends = [(first.grid, first.width), (last.pooled_grid, last.out)]
    tokens, cotangent = (
        tuple(struct(shape, jnp.bfloat16) for shape in token_shapes(batch, grid, width, layout))
        for grid, width in ends
    )
    compiled = jax.jit(train_step(blocks, layout)).lower(params, tokens, cotangent).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory and cost
    return Cost(cost["bytes accessed"], memory.temp_size_in_bytes)


def check() -> None:
    """Asserts that all layouts have the same outputs and gradients, in float32 on the CPU."""
    blocks = (
        Block("expands", 1, (2, 6, 6), 8, 2, 16, 1, 4),
        Block("Q stride", 1, (2, 6, 6), 16, 4, 16, 2, 2),
        Block("odd grid", 1, (2, 3, 3), 16, 4, 16, 2, 1),
    )
    random = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = jax.tree.map(
        draw, [param_shapes(block) for block in blocks], is_leaf=lambda n: isinstance(n, tuple)
    )
    grids = (blocks[0].grid, blocks[-1].pooled_grid)
    ends = [(draw((2, 1, c)), draw((2, *grid, c))) for grid, c in zip(grids, (8, 16), strict=True)]
    expected = None
    for layout in LAYOUTS:
        step = jax.jit(train_step(blocks, layout))
        out, d_params, d_tokens = step(params, *(join(*end, layout) for end in ends))
        actual = split(out, grids[1], layout), d_params, split(d_tokens, grids[0], layout)
        expected = actual if expected is None else expected
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            # The gradient of the keys' bias is zero (softmax is invariant to it) up to rounding.
            scale = max(1.0, float(np.abs(y).max()))
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * scale)
    print(f"{len(LAYOUTS)} layouts agree in outputs and gradients")


def header() -> str:
    columns = ["block", "count"]
    for position, layout in enumerate(LAYOUTS):
        columns += [f"{layout.name}: GB", "temp MiB"] + (["ratio"] if position else [])
    return f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"


def row(name: str, count: int, costs: list[Cost]) -> str:
    """Returns a table row: GB, temporary MiB, and the ratio of GB to the first layout's."""
    cells = [name, str(count)]
    for position, cost in enumerate(costs):
        cells += [f"{cost.accessed / 1e9:.2f}", f"{cost.temporary / 2**20:.0f}"]
        cells += [f"{cost.accessed / costs[0].accessed:.2f}"] if position else []
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare numbers, on the CPU")
    parser.add_argument("--whole", action="store_true", help="also compile all blocks as one")
    parser.add_argument("--batch", type=int, default=4, help="clips on the chip")
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    cost = functools.partial(measure, batch=arguments.batch, device=v5e_device())
    # Rows are printed one by one: each takes a minute or more on two cores.
    print(header(), flush=True)
    totals = [Cost(0, 0) for _ in LAYOUTS]
    for block in MVIT_B_16X4:
        costs = [cost((block,), layout) for layout in LAYOUTS]
        print(row(block.name, block.copies, costs), flush=True)
        # Blocks run in sequence: bytes add up, temporary memory is reused.
        totals = [
            Cost(
                total.accessed + block.copies * step_cost.accessed,
                max(total.temporary, step_cost.temporary),
            )
            for total, step_cost in zip(totals, costs, strict=True)
        ]
    print(row("all, added", sum(block.copies for block in MVIT_B_16X4), totals), flush=True)
    if arguments.whole:
        blocks = tuple(block for block in MVIT_B_16X4 for _ in range(block.copies))
        print(row("all, one program", 1, [cost(blocks, layout) for layout in LAYOUTS]))


if __name__ == "__main__":
    main()
