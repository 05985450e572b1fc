"""Execution of the blocks: scans over identical blocks, and rematerialisation policies.

Saved activations take most of the memory of a training step, and identical blocks most of its
compile time. Neither the scan nor the policy changes results.
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
from mvit_jax.models.ops.attention import SAVED, Record, Tokens
from mvit_jax.models.ops.dispatch import keep_batch_sharded
from mvit_jax.models.plan import BlockPlan, Triple

# Rematerialisation policies. "cheap" rematerialises norms, activation functions and drop path.
# "first_stage" rematerialises the blocks whose input is on the first stage's grid, which have most
# of the saved activations. "blocks" rematerialises all blocks.
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
    frozen_blocks: int = 0,
) -> tuple[Tokens, list[Array], list[Record]]:
    """Runs tokens on `grid` through all blocks.

    Args:
      blocks: callables of (tokens, grid, key); `capture` also passes `record=`.
      plans: the plan of each block.
      x: the tokens, class token first.
      grid: the grid of `x`.
      keys: a PRNG key for each block, or Nones for inference.
      capture: captures each block's intermediates; turns `scan` off.
      scan: runs consecutive identical blocks as one loop, which compiles faster. On CPUs, the
        backward pass of a loop is slow. Blocks that a loop cannot run (see `_loop_end`) run one by
        one.
      remat: a policy of `REMAT`.
      frozen_blocks: the number of first blocks whose weights are not differentiated. No loop has
        frozen and trained blocks: a loop differentiates the weights of all its blocks.

    Returns:
      The last block's tokens, the grids `[batch, T, H, W, channels]` after each stage, and with
      `capture` a record of intermediates per block.

    Raises:
      UserError: a block returns a number of tokens that does not fit its plan's output grid.
      ValueError: `remat` is not in `REMAT`.
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, not {remat!r}")
    stages: list[Array] = []
    records: list[Record] = []
    first_grid, start = grid, 0
    while start < len(blocks):
        plan = plans[start]
        rematerialised = remat == "blocks" or (remat == "first_stage" and grid == first_grid)
        call = functools.partial(_call, grid=grid, remat="blocks" if rematerialised else remat)
        stop = start + 1
        if scan and not capture:
            end = frozen_blocks if start < frozen_blocks else len(blocks)
            stop = _loop_end(blocks[:end], plans[:end], start, x, grid, keys[start], call)
        name = f"block{start}" if stop == start + 1 else f"blocks{start}-{stop - 1}"
        after = plan.output(grid)
        expected = x.shape[1] - math.prod(grid) + math.prod(after)
        with jax.named_scope(f"stage{plan.stage}/{name}"):
            if stop > start + 1:
                x = _loop(blocks[start:stop], x, keys[start:stop], call)
            else:
                record: Record = {}
                extra: dict[str, Any] = {"record": record} if capture else {}
                x = call(blocks[start], x, keys[start], **extra)
                records.append(record)
        if x.shape[1] != expected:
            raise UserError(
                f"block {start} ({type(blocks[start]).__name__}) returns {x.shape[1]} tokens, but "
                f"the output grid {after} of its plan requires {expected}"
            )
        x, grid = keep_batch_sharded(x), after
        stages[plan.stage :] = [unflatten(x, grid)]
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
    """Returns the index after the last block that one loop from block `start` can run.

    `start + 1` means no loop. Equal plans do not suffice for custom blocks: their modules must be
    equal except for weights and drop path rates. With rates that are arrays, as in the loop, a
    block must run and keep the shape and dtype of its tokens.
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
    except Exception:  # from a custom block: its call outside of a loop raises the clearer error
        return start + 1
    same = (after.shape, after.dtype) == (x.shape, x.dtype)
    return start + max(len(equal), 1) if same else start + 1


def _structure(block: Any) -> Any:
    """Returns a block's structure without weights and drop path rates, for comparison.

    A block that is not an `nnx.Module`, or has state other than weights, equals no other block. A
    loop would not update other state, such as statistics and counters.
    """
    if not isinstance(block, nnx.Module):
        return object()
    copy = nnx.merge(*nnx.split(block))
    for module in _with_rate(copy):
        module.drop_path = 0.0
    graph, weights, other_state = nnx.split(copy, nnx.Param, ...)
    if jax.tree.leaves(other_state):
        return object()
    leaves, tree = jax.tree.flatten(weights)
    return graph, tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _with_rate(block: Any) -> list[Any]:
    """Returns the modules of `block`, itself included, that have a drop path rate."""
    modules = [module for _, module in nnx.iter_modules(block)]
    return [m for m in modules if isinstance(vars(m).get("drop_path"), float | int)]


def _call(block, x: Tokens, key: Array | None, *, grid: Triple, remat: str, **record) -> Tokens:
    if remat not in ("cheap", "blocks") or record:
        return block(x, grid, key, **record)
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(SAVED) if remat == "cheap" else None
    return jax.checkpoint(lambda x, key: block(x, grid, key), policy=policy)(x, key)


def _loop(blocks: Sequence[Any], x: Tokens, keys: Sequence[Array | None], call: Callable) -> Tokens:
    """Runs identical blocks, which keep the grid, as one scan over stacked parameters."""
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(b) for b in blocks))
    rates = [[module.drop_path for module in _with_rate(block)] for block in blocks]
    stacked = None if keys[0] is None else jnp.stack([key for key in keys if key is not None])
    run = _loop_body(blocks[0], call)

    def body(x, each):
        return keep_batch_sharded(run(x, each)), None

    return jax.lax.scan(body, x, (weights, jnp.asarray(rates, jnp.float32), stacked))[0]


def _loop_body(block: Any, call: Callable) -> Callable[..., Tokens]:
    graph, _ = nnx.split(block)

    def run(x, each):
        state, rates, key = each
        block = nnx.merge(graph, state)
        for module, rate in zip(_with_rate(block), rates, strict=True):
            module.drop_path = rate
        return call(block, x, key)

    return run


def unflatten(x: Tokens, grid: Triple) -> Float[Array, "batch time height width channels"]:
    """Returns the tokens reshaped to their grid, without the class token."""
    batch, tokens, channels = x.shape
    return x[:, tokens - math.prod(grid) :].reshape(batch, *grid, channels)
