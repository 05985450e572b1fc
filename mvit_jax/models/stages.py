"""Runs the blocks one after the other, or equal ones as a loop, and says what of them is kept.

What a training step keeps for its backward pass is most of the memory that it takes, and one block
compiled nine times most of the time that it takes to compile. Neither changes any result.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mvit_jax.models.attention import KEPT, Record, Tokens
from mvit_jax.models.devices import keep_batch_sharded
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
            stop = _loop_end(blocks, plans, start, x, keys[start], call)
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
    key: Array | None,
    call: Callable,
) -> int:
    """The end of the longest loop that begins with block `start`; `start + 1` for none.

    Equal plans do not suffice, since a custom block may be anything. The modules must be equal but
    for their weights and drop path rates. The first must return tokens of the shape and dtype that
    it takes, and must not decide in Python on its rate, which is an array in the loop.
    """
    stop, structure = start + 1, None
    while stop < len(blocks) and plans[stop] == plans[start]:
        structure = structure or _structure(blocks[start])
        if structure != _structure(blocks[stop]):
            break
        stop += 1
    if stop == start + 1:
        return stop
    body, weights = _loop_body(blocks[start], call), nnx.state(blocks[start])
    rates = jnp.zeros(len(_with_rate(blocks[start])))
    try:
        after, _ = jax.eval_shape(body, x, (weights, rates, key))
    except jax.errors.ConcretizationTypeError:
        return start + 1
    return stop if (after.shape, after.dtype) == (x.shape, x.dtype) else start + 1


def _structure(block: Any) -> Any:
    """All of a block but the values of its weights and its drop path rate, to be compared."""
    if not isinstance(block, nnx.Module):
        return id(block)
    copy = nnx.merge(*nnx.split(block))
    for module in _with_rate(copy):
        module.drop_path = 0.0
    graph, state = nnx.split(copy)
    leaves, tree = jax.tree.flatten(state)
    return graph, tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _with_rate(block: Any) -> list[Any]:
    """The modules in `block`, itself among them, that have a rate of drop path."""
    modules = [module for _, module in nnx.iter_modules(block)]
    return [m for m in modules if isinstance(getattr(m, "drop_path", None), float | int)]


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
    each = weights, jnp.asarray(rates, jnp.float32), drawn
    return jax.lax.scan(_loop_body(blocks[0], call), x, each)[0]


def _loop_body(block: Any, call: Callable) -> Callable:
    graph, _ = nnx.split(block)

    def body(x, each):
        state, rates, key = each
        block = nnx.merge(graph, state)
        for module, rate in zip(_with_rate(block), rates, strict=True):
            module.drop_path = rate
        return keep_batch_sharded(call(block, x, key)[0]), None

    return body


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
