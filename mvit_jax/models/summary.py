"""Summary tables of an architecture by stages, as in the papers."""

import math
from itertools import groupby

from mvit_jax.common.text import join_sizes, table
from mvit_jax.models.cost import Cost, block_cost, cost, embedding_cost, head_cost
from mvit_jax.models.plan import MViTConfig, Triple, grids, patch_grid, plan
from mvit_jax.models.variants import PUBLISHED, VARIANTS, preprocessing

Row = tuple[str, ...]

HEADER: Row = ("stage", "operations", "tokens", "width", "heads", "keys", "parameters", "mult-adds")


def stages(config: MViTConfig) -> list[Row]:
    """Returns the rows of a summary table, with the columns of `HEADER`.

    The rows are the clip, the patch embedding ("cubes"), each stage, the head, and the total.
    """
    sizes = grids(config, config.frames, config.size, config.size)
    first = patch_grid(config, config.frames, config.size, config.size)
    cube = f"{join_sizes(config.patch_kernel)} conv, stride {join_sizes(config.patch_stride)}"
    rows: list[Row] = [
        ("clip", "", f"{config.frames}x{config.size}x{config.size}", "3", "", "", "", ""),
        ("cubes", cube, _tokens(first, config), str(config.width), "", "",
         *_cost(embedding_cost(config))),
    ]  # fmt: skip
    blocks = zip(plan(config), sizes, strict=True)
    for stage, group in groupby(blocks, key=lambda pair: pair[0].stage):
        members = list(group)
        block, block_grids = members[-1]
        total = Cost(0, 0)
        for member, member_grids in members:
            total += block_cost(member, member_grids, config.class_token)
        heads, width = str(block.heads), str(block.attention_width)
        keys = join_sizes(block_grids.keys)
        rows.append(
            (f"stage {stage + 1}", f"{len(members)} x (attention {width}, MLP {block.mlp_width})",
             _tokens(block_grids.output, config), width, heads, keys, *_cost(total))
        )  # fmt: skip
    rows.append(
        ("head", f"{config.num_classes} classes", "", "", "", "", *_cost(head_cost(config)))
    )
    return [*rows, ("total", "", "", "", "", "", *_cost(cost(config)))]


def totals(total: Cost) -> str:
    """Returns the parameters and multiply-adds as text."""
    billions = total.multiply_adds / 1e9
    rounded = f"{billions:.1f}" if billions >= 1 else f"{billions:.3f}"
    return (
        f"{total.parameters:,} parameters, {rounded} G multiply-adds a clip "
        f"({total.multiply_adds:,})"
    )


def describe(name: str, config: MViTConfig) -> str:
    """Returns a variant's summary as text: a table by stages, totals, published row, input."""
    lines = [name, "", table(HEADER, stages(config)), "", totals(cost(config))]
    if name in PUBLISHED and config == VARIANTS[name]:
        p = PUBLISHED[name]
        lines.append(
            f"published: {p.parameters} M parameters, {p.multiply_adds} G multiply-adds, "
            f"{p.top1} % top-1 on {p.data} ({p.source})" + (f"; {p.note}" if p.note else "")
        )
    if name in VARIANTS:
        lines.append(_input(name, config))
    return "\n".join(lines)


def _input(name: str, config: MViTConfig) -> str:
    p = preprocessing(name, frames=config.frames, size=config.size)
    video = f"{p.frames} frames with a stride of {p.stride} at 30 frames a second"
    clip = video if p.frames > 1 else "one image"
    return (
        f"input: {clip}; short side to {p.short_side} pixels ({p.interpolation}), centre crop of "
        f"{p.size}; (value / 255 - {_rgb(p.mean)}) / {_rgb(p.std)}"
    )


def _rgb(values: tuple[float, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values)


def _cost(cost: Cost) -> tuple[str, str]:
    return f"{cost.parameters:,}", f"{cost.multiply_adds / 1e9:.3f}G"


def _tokens(grid: Triple, config: MViTConfig) -> str:
    tokens = math.prod(grid) + config.class_token
    return f"{join_sizes(grid)}{' + 1' if config.class_token else ''} = {tokens}"
