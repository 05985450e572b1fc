"""Step times of the models of configs/moving_digits.py: MViT and its ViT baseline.

    python -m benchmarks.default_models

The models alternate within one run, as machines are shared: compare the ratio.
"""

import functools
import importlib.util
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mvit_jax.models.cost import cost
from mvit_jax.models.functional import functional
from mvit_jax.training import build, optimizer
from mvit_jax.training.distributed import sharding
from mvit_jax.training.state import init_state
from mvit_jax.training.step import train_step

ROUNDS = 10
CONFIG = Path(__file__).parents[1] / "configs" / "moving_digits.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("moving_digits", CONFIG)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs = {name: prepare(module.get_config(name)) for name in ("mvit", "vit")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {1000 * median:.0f} ms a step, {median / medians['mvit']:.2f} x mvit")


def prepare(config):
    """Returns a compiled, blocking function that runs a train step on a batch of noise."""
    settings = build.settings(config, 8)
    model = settings.model.config
    transform = optimizer.adamw(weight_decay=0.05, clip_norm=1.0)
    step = jax.jit(
        functools.partial(
            train_step,
            learning_rate=1e-3,
            apply=build.model_apply(config, settings.model, sharding.make_mesh()),
            optimizer=transform,
            recipe=settings.step,
        ),
        donate_argnums=0,
    )
    random = np.random.default_rng(0)
    size = (config.batch, model.frames, model.size, model.size, 3)
    batch = {
        "clip": jnp.asarray(random.integers(0, 256, size, np.uint8)),
        "label": jnp.asarray(random.integers(0, 8, config.batch), jnp.int32),
        "broken": jnp.full(config.batch, -1, jnp.int32),
    }
    state = init_state(functional(model).init(jax.random.key(0)), transform, 0.0)
    began = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    total = cost(model)
    print(
        f"{config.model.variant}: {total.parameters:,} parameters, {total.multiply_adds:,} "
        f"multiply-adds a clip, first step after {time.perf_counter() - began:.0f} s"
    )

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    return run


if __name__ == "__main__":
    main()
