"""Formulas for an architecture's parameters and its multiply-adds per clip.

Papers print multiply-adds as "FLOPs". A multiplication and the addition after it count as one
multiply-add. Linear layers, convolutions and attention products count; norms, softmax and GELU do
not.
"""

import math
from dataclasses import dataclass
from typing import Any

from mvit_jax.models.plan import BlockGrids, BlockPlan, MViTConfig, grids, patch_grid, plan


@dataclass(frozen=True)
class Cost:
    """The number of parameters and the number of multiply-adds per clip."""

    parameters: int
    multiply_adds: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


def cost(config: MViTConfig) -> Cost:
    """Returns the cost of a model for one clip of the configured size."""
    sizes = grids(config, config.frames, config.size, config.size)
    total = embedding_cost(config) + head_cost(config)
    for block, block_grids in zip(plan(config), sizes, strict=True):
        total += block_cost(block, block_grids, config.class_token)
    return total


def embedding_cost(config: MViTConfig) -> Cost:
    """Returns the cost of patch embedding, class token, positional embeddings and stem norm."""
    t, h, w = patch_grid(config, config.frames, config.size, config.size)
    kernel = 3 * math.prod(config.patch_kernel) * config.width
    positions = {
        "none": 0,
        "sincos": 0,
        "space": h * w + config.class_token,
        "separate": t + h * w + config.class_token,
        "joint": t * h * w + config.class_token,
    }[config.positions]
    vectors = 1 + config.class_token + positions + 2 * config.stem_norm
    return Cost(kernel + config.width * vectors, kernel * t * h * w)


def block_cost(block: BlockPlan, grids: BlockGrids, class_token: bool) -> Cost:
    """Returns the cost of a block: pooled attention, MLP, skip projection, norms."""
    total = _attention_cost(block, grids, class_token) + _pools_cost(block, grids)
    tokens_in, tokens_out = (math.prod(g) + class_token for g in (grids.input, grids.output))
    a = block.attention_width
    total += _linear(a, block.mlp_width, tokens_out)
    total += _linear(block.mlp_width, block.width_out, tokens_out)
    if block.skip != "none" and block.width != a:
        total += _linear(block.width, a, tokens_in)
    if block.skip != "none" and block.width_out != a:
        total += _linear(a, block.width_out, tokens_out)
    return total + Cost(2 * block.width + 2 * a, 0)  # the norms before attention and MLP


def head_cost(config: MViTConfig) -> Cost:
    """Returns the cost of the final norm and the classifier."""
    width = plan(config)[-1].width_out
    return Cost(2 * width, 0) + _linear(width, config.num_classes, 1)


def _attention_cost(block: BlockPlan, grids: BlockGrids, class_token: bool) -> Cost:
    tokens_in, keys, queries = (
        math.prod(grid) + class_token for grid in (grids.input, grids.keys, grids.output)
    )
    a = block.attention_width
    total = _linear(a, a, queries)
    for projected in (queries, keys, keys) if block.pool_first else (tokens_in,) * 3:
        total += _linear(block.width, a, projected, bias=block.qkv_bias)
    total += Cost(0, 2 * a * queries * keys)  # scores, and their product with the values
    # Relative positional embeddings: a product of each query with one row per key index and axis.
    rows = block.relative_time + 2 * block.relative_space
    time, *space = grids.keys
    indices = (time if block.relative_time else 0) + (sum(space) if block.relative_space else 0)
    return total + Cost(rows * block.head_dim, math.prod(grids.output) * indices * a)


def _pools_cost(block: BlockPlan, grids: BlockGrids) -> Cost:
    total = Cost(0, 0)
    for pool, grid, copies in ((block.q_pool, grids.output, 1), (block.kv_pool, grids.keys, 2)):
        if pool and pool.mode.startswith("conv"):
            kernel = math.prod(pool.kernel)
            total += Cost(
                copies * block.pooled_width // pool.heads * (kernel + 2),  # kernel, norm
                copies * kernel * block.pooled_width * math.prod(grid),
            )
    return total


def _linear(inputs: int, outputs: int, tokens: int, bias: bool = True) -> Cost:
    return Cost((inputs + bias) * outputs, inputs * outputs * tokens)


def products(program: Any) -> int:
    """Returns the multiply-adds of matrix products and convolutions in a traced program.

    The body of a `scan` counts once per iteration. A `lax.cond` counts as its most expensive
    branch. The body of a `while` counts once, as its number of iterations is unknown. The product
    of the query and key features from `attention.relative_features` counts too; `cost` omits it.

    Args:
      program: a jaxpr, or an object with the attribute `jaxpr`.
    """
    jaxpr = getattr(program, "jaxpr", program)
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [
            products(value)
            for values in params.values()
            for value in (values if isinstance(values, tuple | list) else (values,))
            if hasattr(getattr(value, "jaxpr", value), "eqns")
        ]
        if inner:
            total += max(inner) if name == "cond" else params.get("length", 1) * sum(inner)
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            output = math.prod(equation.outvars[0].aval.shape)
            total += output * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape  # with the input channels of one group
            outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs
    return total
