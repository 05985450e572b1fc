"""Attention benchmark: materialised scores against the model's fused implementation.

    python -m benchmarks.attention [--models=mvit_b_16x4] [--clips=1] [--json=FILE]

Shapes are those of a variant's blocks. Arrays are float32 on CPUs and bfloat16 elsewhere. The two
implementations alternate within one run, as machines are shared: compare the ratios.
"""

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from mvit_jax.common.files import write_atomically
from mvit_jax.models.ops import attention
from mvit_jax.models.plan import BlockGrids, BlockPlan, grids, plan
from mvit_jax.models.variants import variant

_MODELS = flags.DEFINE_list("models", ["mvit_b_16x4", "mvitv2_s_16x4"], "Variants.")
_CLIPS = flags.DEFINE_integer("clips", 1, "Clips per batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the results as JSON.")

FORMS = {"materialised": attention.materialised, "fused": attention.fused}


def main(argv: list[str]) -> None:
    machine.use_training_settings()
    print(
        "| variant | block | queries x keys x heads | fused, ms: forward, with gradients "
        "| fused / materialised |\n|" + " --- |" * 5,
        flush=True,
    )
    rows = []
    for name in _MODELS.value:
        config = variant(name)
        sizes = grids(config, config.frames, config.size, config.size)
        seen: set[tuple] = set()
        for i, (block, block_grids) in enumerate(zip(plan(config), sizes, strict=True)):
            key = (block_grids.output, block_grids.keys, block.heads)
            if key in seen:
                continue
            seen.add(key)
            row = {"variant": name, "block": i} | measure(block, block_grids, config.class_token)
            rows.append(row)
            print(as_table(row), flush=True)
    if _JSON.value:
        write_atomically(
            Path(_JSON.value), json.dumps(machine.about() | {"rows": rows}, indent=1) + "\n"
        )


def measure(block: BlockPlan, sizes: BlockGrids, class_token: bool) -> dict[str, Any]:
    queries, keys = (math.prod(grid) + class_token for grid in (sizes.output, sizes.keys))
    arrays = draw(block, queries, keys, sizes.keys)
    runs = {}
    for name, form in FORMS.items():
        forward = functools.partial(form, heads=block.heads)
        gradients = jax.grad(lambda *x, f=forward: jnp.sin(f(*x)).sum(), (0, 1, 2))
        runs[name] = [jax.jit(f).lower(*arrays).compile() for f in (forward, gradients)]
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(_ROUNDS.value + 1):
        for name, functions in runs.items():
            for part, function in enumerate(functions):
                began = time.perf_counter()
                jax.block_until_ready(function(*arrays))
                seconds.setdefault((name, part), []).append(time.perf_counter() - began)
    ms = {
        name: [1000 * float(np.median(seconds[name, part][1:])) for part in (0, 1)]
        for name in FORMS
    }
    return {"queries": queries, "keys": keys, "heads": block.heads, "ms": ms}


def draw(block: BlockPlan, queries: int, keys: int, key_grid) -> list:
    random = np.random.default_rng(0)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    make = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    clips, width = _CLIPS.value, block.attention_width
    arrays = [make(clips, n, width) for n in (queries, keys, keys)]
    if not (block.relative_time or block.relative_space):
        return [*arrays, None, None]
    positions = sum(key_grid)
    return [*arrays, make(clips, queries, block.heads * positions), make(keys, positions)]


def as_table(row: dict[str, Any]) -> str:
    fused, materialised = row["ms"]["fused"], row["ms"]["materialised"]
    cells = [
        row["variant"], str(row["block"]), f"{row['queries']} x {row['keys']} x {row['heads']}",
        ", ".join(f"{x:.1f}" for x in fused),
        ", ".join(f"{a / b:.2f}" for a, b in zip(fused, materialised, strict=True)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    app.run(main)
