"""Depthwise pooling benchmark: forward pass and gradients of all implementations.

    python -m benchmarks.pooling [--json=FILE]

The input is one clip in float32 at the shapes of MViT-B 16x4, with K and V concatenated. The
implementations alternate within one run, as machines are shared: compare the ratios. Compile times
are those of the gradients.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks import machine
from mvit_jax.common.files import write_atomically
from mvit_jax.models.ops import pooling
from mvit_jax.models.plan import Pool, grids, plan
from mvit_jax.models.variants import variant

_JSON = flags.DEFINE_string("json", None, "File for the results as JSON.")

ROUNDS = 7
FORMS: dict[str, Callable] = {
    "custom gradient": pooling.depthwise_slices,
    # The same sum of slices, without its custom gradient.
    "autodiff": pooling.depthwise_slices.fun,  # pyright: ignore[reportAttributeAccessIssue]
    "convolution": pooling.depthwise_conv,
}


def main(argv: list[str]) -> None:
    machine.use_training_settings()
    print(
        "| block | grid | channels | stride | custom gradient, ms: forward, with gradients "
        "| autodiff / custom gradient | convolution / custom gradient | compile, s |\n|"
        + " --- |"
        * 8,
        flush=True,
    )
    config = variant("mvit_b_16x4")
    seen: set[tuple] = set()
    rows = []
    sizes = grids(config, config.frames, config.size, config.size)
    for i, (block, block_grids) in enumerate(zip(plan(config), sizes, strict=True)):
        if block.kv_pool is None:
            continue
        case = (block.kv_pool, block_grids.input, 2 * block.attention_width)
        if case in seen:
            continue
        seen.add(case)
        rows.append(row(i, *case))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    if _JSON.value:
        columns = ["block", "grid", "channels", "stride", "ms"]
        columns += ["autodiff", "convolution", "compile"]
        table = [dict(zip(columns, cells, strict=True)) for cells in rows]
        write_atomically(
            Path(_JSON.value), json.dumps(machine.about() | {"rows": table}, indent=1) + "\n"
        )


def row(block: int, pool: Pool, grid: tuple[int, int, int], channels: int) -> list[str]:
    random = np.random.default_rng(0)
    x = jax.numpy.asarray(random.normal(size=(1, *grid, channels)), "float32")
    weight = jax.numpy.asarray(random.normal(size=(*pool.kernel, channels)), "float32")
    compiled, compile_seconds = {}, []
    for name, form in FORMS.items():
        forward = jax.jit(lambda x, weight, form=form: form(x, weight, pool))
        both = jax.jit(
            lambda x, weight, form=form: jax.grad(
                lambda x, weight: jax.numpy.sin(form(x, weight, pool)).sum(), (0, 1)
            )(x, weight)
        )
        forward = forward.lower(x, weight).compile()
        began = time.perf_counter()
        both = both.lower(x, weight).compile()
        compile_seconds.append(time.perf_counter() - began)
        compiled[name] = forward, both
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for name, functions in compiled.items():
            for which, function in enumerate(functions):
                began = time.perf_counter()
                jax.block_until_ready(function(x, weight))
                times.setdefault((name, which), []).append(time.perf_counter() - began)
    ms = {key: 1000 * float(np.median(values[1:])) for key, values in times.items()}
    ratios = [
        ", ".join(f"{ms[name, part] / ms['custom gradient', part]:.1f}" for part in (0, 1))
        for name in ("autodiff", "convolution")
    ]
    return [
        str(block), "x".join(map(str, grid)), str(channels), "x".join(map(str, pool.stride)),
        f"{ms['custom gradient', 0]:.1f}, {ms['custom gradient', 1]:.1f}", *ratios,
        ", ".join(f"{s:.1f}" for s in compile_seconds),
    ]  # fmt: skip


if __name__ == "__main__":
    app.run(main)
