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

from mvit_jax.common.errors import UserError
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
) -> tuple[Tokens, list[Array], list[Record]]:
    """Runs tokens on `grid` through all blocks.

    With `scan`, equal blocks that follow each other are one loop: a program with fewer operations,
    which compiles faster. On CPUs, where loops run slowly backwards, it does not pay. Custom blocks
    are looped over like ours; those that a loop cannot run (see `_loop_end`) follow one by one.

    Returns:
      The last block's tokens, the grids `[batch, T, H, W, channels]` after each stage, and with
      `capture` a record of each block.

    Raises:
      UserError: a block gives another number of tokens than the grid of its plan has.
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, not {remat!r}")
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
        after = plan.output(grid)
        due = x.shape[1] - math.prod(grid) + math.prod(after)
        with jax.named_scope(f"stage{plan.stage}/{name}"):
            if stop > start + 1:
                x = _loop(blocks[start:stop], x, keys[start:stop], call)
            else:
                record: Record = {}
                extra: dict[str, Any] = {"record": record} if capture else {}
                x = call(blocks[start], x, keys[start], **extra)
                records.append(record)
        if x.shape[1] != due:
            raise UserError(
                f"block {start} ({type(blocks[start]).__name__}) gives {x.shape[1]} tokens; the "
                f"grid {after} that its plan has for {grid} needs {due}"
            )
        x, grid = keep_batch_sharded(x), after
        stages[plan.stage :] = [on_its_grid(x, grid)]
        start = stop
    return x, stages, records


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
    takes where the rates are arrays.
    """
    plan = plans[start]
    equal_plans = itertools.takewhile(lambda other: other == plan, plans[start:])
    candidates = [block for block, _ in zip(blocks[start:], equal_plans, strict=False)]
    if len(candidates) == 1 or plan.output(grid) != grid:
        return start + 1
    try:
        first = _structure(blocks[start])
        equal = list(itertools.takewhile(lambda block: _structure(block) == first, candidates))
        rates = jnp.zeros(len(_with_rate(blocks[start])), jnp.float32)
        body = _loop_body(blocks[start], call)
        after = jax.eval_shape(body, x, (nnx.state(blocks[start]), rates, key))
    except Exception:  # of the user's code: called as it is, the block raises what is really wrong
        return start + 1
    same = (after.shape, after.dtype) == (x.shape, x.dtype)
    return start + max(len(equal), 1) if same else start + 1


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


def _call(block, x: Tokens, key: Array | None, *, grid: Triple, remat: str, **record) -> Tokens:
    if remat not in ("cheap", "blocks") or record:
        return block(x, grid, key, **record)
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(KEPT) if remat == "cheap" else None
    return jax.checkpoint(lambda x, key: block(x, grid, key), policy=policy)(x, key)


def _loop(blocks: Sequence[Any], x: Tokens, keys: Sequence[Array | None], call: Callable) -> Tokens:
    """Runs equal blocks, none of which changes the grid, as one loop over stacked parameters."""
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(b) for b in blocks))
    rates = [[module.drop_path for module in _with_rate(block)] for block in blocks]
    drawn = None if keys[0] is None else jnp.stack([key for key in keys if key is not None])
    run = _loop_body(blocks[0], call)

    def body(x, each):
        return keep_batch_sharded(run(x, each)), None

    return jax.lax.scan(body, x, (weights, jnp.asarray(rates, jnp.float32), drawn))[0]


def _loop_body(block: Any, call: Callable) -> Callable[..., Tokens]:
    graph, _ = nnx.split(block)

    def run(x, each):
        state, rates, key = each
        block = nnx.merge(graph, state)
        for module, rate in zip(_with_rate(block), rates, strict=True):
            module.drop_path = rate
        return call(block, x, key)

    return run


def on_its_grid(x: Tokens, grid: Triple) -> Float[Array, "batch time height width channels"]:
    """Returns the tokens on their grid, without a class token."""
    batch, tokens, channels = x.shape
    return x[:, tokens - math.prod(grid) :].reshape(batch, *grid, channels)
