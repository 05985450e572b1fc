"""A variant's architecture, cost and published figures, as the papers' table.

    python -m mvit_jax.describe mvit_b_16x4
    python -m mvit_jax.describe mvit_b_16x4 frames=8 size=160 pool_mode=max
    python -m mvit_jax.describe --all

"Multiply-adds" are what the papers call FLOPs; XLA counts two operations for each.
"""

import ast
import math
from itertools import groupby

from absl import flags

from mvit_jax import errors
from mvit_jax.models.plan import (
    Cost,
    MViTConfig,
    Triple,
    block_cost,
    cost,
    embedding_cost,
    grids,
    head_cost,
    patch_grid,
    plan,
)
from mvit_jax.models.variants import PUBLISHED, VARIANTS, variant

_ALL = flags.DEFINE_bool("all", False, "All variants, beside what their papers report.")

Row = tuple[str, ...]


def main(argv: list[str]) -> None:
    if _ALL.value:
        print(table(("variant", "parameters", "multiply-adds", "published", "source"), _all_rows()))
        return
    if len(argv) < 2:
        raise errors.UserError(f"name a variant: {', '.join(VARIANTS)}; or give --all")
    overrides = dict(_override(text) for text in argv[2:])
    print(describe(argv[1], variant(argv[1], **overrides)))


def describe(name: str, config: MViTConfig) -> str:
    """The architecture by stages: tokens, width, heads, cost; and the totals."""
    sizes = grids(config, config.frames, config.size, config.size)
    first = patch_grid(config, config.frames, config.size, config.size)
    cube = f"{_x(config.patch_kernel)} conv, stride {_x(config.patch_stride)}"
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
        keys = _x(block_grids.keys)
        rows.append(
            (f"stage {stage + 1}", f"{len(members)} x (attention {width}, MLP {block.mlp_width})",
             _tokens(block_grids.output, config), width, heads, keys, *_cost(total))
        )  # fmt: skip
    rows.append(
        ("head", f"{config.num_classes} classes", "", "", "", "", *_cost(head_cost(config)))
    )
    total = cost(config)
    rows.append(("total", "", "", "", "", "", *_cost(total)))
    header = ("stage", "operations", "tokens", "width", "heads", "keys", "parameters", "mult-adds")
    lines = [name, "", table(header, rows), "", _totals(total)]
    if name in PUBLISHED and config == VARIANTS[name]:
        p = PUBLISHED[name]
        lines.append(
            f"published: {p.parameters} M parameters, {p.multiply_adds} G multiply-adds, "
            f"{p.top1} % top-1 on {p.data} ({p.source})"
        )
    return "\n".join(lines)


def table(header: Row, rows: list[Row]) -> str:
    """Rows in aligned columns; numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Row) -> str:
        cells = [
            cell.rjust(width) if cell[:1].isdigit() and " " not in cell else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _all_rows() -> list[Row]:
    rows = []
    for name, config in VARIANTS.items():
        ours, p = cost(config), PUBLISHED.get(name)
        if p is None:
            rows.append((name, *_cost(ours), "", ""))
            continue
        published = (
            f"{p.parameters} M ({_percent(ours.parameters / 1e6, p.parameters)}), "
            f"{p.multiply_adds} G ({_percent(ours.multiply_adds / 1e9, p.multiply_adds)})"
        )
        rows.append((name, *_cost(ours), published, p.source))
    return rows


def _totals(total: Cost) -> str:
    billions = total.multiply_adds / 1e9
    rounded = f"{billions:.1f}" if billions >= 1 else f"{billions:.3f}"
    return (
        f"{total.parameters:,} parameters, {rounded} G multiply-adds a clip "
        f"({total.multiply_adds:,})"
    )


def _percent(ours: float, published: float) -> str:
    return f"{100 * (ours / published - 1):+.1f} %"


def _cost(cost: Cost) -> tuple[str, str]:
    return f"{cost.parameters:,}", f"{cost.multiply_adds / 1e9:.3f}G"


def _tokens(grid: Triple, config: MViTConfig) -> str:
    return (
        f"{_x(grid)}{' + 1' if config.class_token else ''} = {math.prod(grid) + config.class_token}"
    )


def _x(size: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in size)


def _override(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise errors.UserError(f"{text!r} is no override: write field=value, like frames=8")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    errors.run(main)
