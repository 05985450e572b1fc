"""Runs the blocks, equal ones as a loop if asked, under a rematerialisation policy.

Saved activations dominate a training step's memory, equal blocks its compile time. Neither the loop
nor the policy changes any result.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mvit_jax.models.ops.attention import KEPT, Record, Tokens
from mvit_jax.models.ops.dispatch import keep_batch_sharded
from mvit_jax.models.plan import BlockPlan, Triple

# What is computed again in the backward pass, instead of being kept: nothing; norms, activations
# and drop path ("cheap"); the blocks on the first stage's grid, which hold most of what is kept;
# all blocks.
REMAT = ("none", "cheap", "first_stage", "blocks")


def run(
    blocks: Sequence[Any],
    plans: Sequence[BlockPlan],
    x: Tokens,
    grid: Triple,
    keys: Sequence[Array | None],
    *,
    capture: bool = False,
    scan: bool = False,
    remat: str = "none",
) -> tuple[Tokens, Triple, list[Array], list[Record]]:
    """Tokens on `grid` through all blocks: the tokens and their grid after the last one, the grids
    `[batch, T, H, W, channels]` after each stage, and with `capture` a record of each block.

    With `scan`, equal blocks that follow each other are one loop: a program with fewer operations,
    which compiles faster. On CPUs, where loops run slowly backwards, it does not pay. Custom blocks
    are looped over like ours; those that a loop cannot run (see `_loop_end`) follow one by one.
    """
    stages: list[Array] = []
    records: list[Record] = []
    first_grid, start = grid, 0
    while start < len(blocks):
        plan = plans[start]
        again = remat == "blocks" or (remat == "first_stage" and grid == first_grid)
        call = functools.partial(_call, grid=grid, remat="blocks" if again else remat)
        stop = start + 1
        if scan and not capture:
            stop = _loop_end(blocks, plans, start, x, grid, keys[start], call)
        name = f"block{start}" if stop == start + 1 else f"blocks{start}-{stop - 1}"
        with jax.named_scope(f"stage{plan.stage}/{name}"):
            if stop > start + 1:
                x = _loop(blocks[start:stop], x, keys[start:stop], call)
            else:
                record: Record = {}
                extra: dict[str, Any] = {"record": record} if capture else {}
                x, grid = call(blocks[start], x, keys[start], **extra)
                records.append(record)
        x = keep_batch_sharded(x)
        stages[plan.stage :] = [on_its_grid(x, grid)]
        start = stop
    return x, grid, stages, records


def _loop_end(
    blocks: Sequence[Any],
    plans: Sequence[BlockPlan],
    start: int,
    x: Tokens,
    grid: Triple,
    key: Array | None,
    call: Callable,
) -> int:
    """Returns the end of the longest loop that begins with block `start`; `start + 1` for none.

    Equal plans do not suffice, since a custom block may be anything. Its modules must be equal but
    for the weights and the drop path rates. It must return tokens of the shape and dtype that it
    takes, on the same grid, where the rates are arrays.
    """
    stop = start + 1
    while stop < len(blocks) and plans[stop] == plans[start]:
        stop += 1
    if stop == start + 1:
        return stop
    grids: list[Triple] = []

    def probe(x, each):
        x, grid = run(x, each)
        grids.append(grid)
        return x

    try:
        first = _structure(blocks[start])
        equal = itertools.takewhile(lambda block: _structure(block) == first, blocks[start:stop])
        stop = start + len(list(equal))
        run = _loop_body(blocks[start], call)
        rates = jnp.zeros(len(_with_rate(blocks[start])), jnp.float32)
        after = jax.eval_shape(probe, x, (nnx.state(blocks[start]), rates, key))
    except Exception:  # of the user's code: called as it is, the block raises what is really wrong
        return start + 1
    same = (after.shape, after.dtype, *grids) == (x.shape, x.dtype, grid)
    return max(stop, start + 1) if same else start + 1


def _structure(block: Any) -> Any:
    """Returns all of a block but its weights and drop path rates, to be compared.

    A block that is no module, or has state besides weights (statistics, counters), which a loop
    would not update, equals no other.
    """
    if not isinstance(block, nnx.Module):
        return object()
    copy = nnx.merge(*nnx.split(block))
    for module in _with_rate(copy):
        module.drop_path = 0.0
    graph, weights, others = nnx.split(copy, nnx.Param, ...)
    if jax.tree.leaves(others):
        return object()
    leaves, tree = jax.tree.flatten(weights)
    return graph, tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _with_rate(block: Any) -> list[Any]:
    """Returns the modules in `block`, itself among them, that have a rate of drop path."""
    modules = [module for _, module in nnx.iter_modules(block)]
    return [m for m in modules if isinstance(vars(m).get("drop_path"), float | int)]


def _call(block, x: Tokens, key: Array | None, *, grid: Triple, remat: str, **record):
    if remat not in ("cheap", "blocks") or record:
        return block(x, grid, key, **record)
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(KEPT) if remat == "cheap" else None
    after: list[Triple] = []  # not an array, so it takes another way out

    def tokens(x, key):
        x, grid_after = block(x, grid, key)
        after.append(grid_after)
        return x

    x = jax.checkpoint(tokens, policy=policy)(x, key)
    return x, after[0]


def _loop(blocks: Sequence[Any], x: Tokens, keys: Sequence[Array | None], call: Callable) -> Tokens:
    """Equal blocks, none of which changes the grid, as one loop over their stacked parameters."""
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(b) for b in blocks))
    rates = [[module.drop_path for module in _with_rate(block)] for block in blocks]
    drawn = None if keys[0] is None else jnp.stack([key for key in keys if key is not None])
    run = _loop_body(blocks[0], call)

    def body(x, each):
        return keep_batch_sharded(run(x, each)[0]), None

    return jax.lax.scan(body, x, (weights, jnp.asarray(rates, jnp.float32), drawn))[0]


def _loop_body(block: Any, call: Callable) -> Callable[..., tuple[Tokens, Triple]]:
    graph, _ = nnx.split(block)

    def run(x, each):
        state, rates, key = each
        block = nnx.merge(graph, state)
        for module, rate in zip(_with_rate(block), rates, strict=True):
            module.drop_path = rate
        return call(block, x, key)

    return run


def fold(key: Array | None, count: int) -> Sequence[Array | None]:
    """`fold_in(key, i)` for i < count: as one operation, which compiles as fast as one of them."""
    return [None] * count if key is None else list(_folded(key, count))


def _folded(key: Array, count: int) -> Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def draw_clips(key: Array | None, rate: Any, clips: Any) -> Sequence[Array | None]:
    """Which clips keep the first and the second branch of a block, `[clips, 1, 1]`: a random share
    1 - `rate` of them; None where all do."""
    if key is None or (isinstance(rate, float | int) and rate == 0):
        return None, None
    kept = 1 - jnp.asarray(rate, jnp.float32)  # in float32, as a loop over blocks has it
    keys = _folded(key, 2)
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, kept, (clips, 1, 1)))(keys)
    return drawn[0], drawn[1]


def drop_clips(x: Tokens, rate: Any, kept: Array | None) -> Tokens:
    """Drop path: a branch without the clips that do not keep it, the others scaled up."""
    if kept is None:
        return x
    share = 1 - jnp.asarray(rate, jnp.float32)
    return jnp.where(kept, x / share.astype(x.dtype), 0)


def on_its_grid(x: Tokens, grid: Triple) -> Float[Array, "batch time height width channels"]:
    batch, tokens, channels = x.shape
    return x[:, tokens - math.prod(grid) :].reshape(batch, *grid, channels)
