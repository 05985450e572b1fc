"""Short training runs without a workdir, for notebooks.

The runs use the same data pipeline, training step and test as the commands. In a notebook:

    config = in_memory.read_config("moving_digits", **{"data.folder": "data/moving_digits"})
    result = in_memory.run(config, pooling=MyPool)
    result.scores.metrics()["top1"]
"""

import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.config import Config, change, check, load
from mvit_jax.data.source import Source
from mvit_jax.models.plan import MViTConfig
from mvit_jax.training import build
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import testing
from mvit_jax.training.evaluation.boxes import BoxScores
from mvit_jax.training.evaluation.classification import Scores
from mvit_jax.training.run import runtime
from mvit_jax.training.state import with_params


@dataclass(frozen=True)
class Trial:
    """The result of an in-memory run.

    Attributes:
      params: parameters after the last step, averaged if the config has `optim.ema`.
      model: the architecture.
      history: arrays with one value per step: "loss", "accuracy" (percent, on the augmented
        clips), "grad_norm".
      scores: scores of the test videos; `scores.metrics()` returns "top1", "confusion" and others.
      seconds_per_step: median time of the steps after the first, which compiles; NaN for a run of
        one step.
    """

    params: Any
    model: MViTConfig
    history: dict[str, np.ndarray]
    scores: Scores | BoxScores
    seconds_per_step: float


def read_config(name: str, arg: str | None = None, **changes: Any) -> Config:
    """Returns the locked config of the experiment `configs/NAME.py`.

    Args:
      name: NAME, or a path that ends with .py.
      arg: the argument of `get_config`, after the colon on the command line.
      changes: values by dotted keys: `read_config("moving_digits", **{"optim.lr": 1e-3})`.

    Raises:
      UserError: there is no such experiment or key, or a value is not of the key's type.
    """
    try:
        config = load(name, arg)
    except ValueError as error:  # raised by `get_config`
        raise UserError(str(error)) from None
    change(config, changes)
    return config.lock()


def run(config: Config, *, params: Any = None, **modules: Any) -> Trial:
    """Trains and tests the experiment `config` without a workdir, checkpoints or logs.

    Compiled programs are cached on disk, so that a run in another process need not recompile.

    Args:
      config: a config from `read_config`; `config.epochs` sets the length of the run.
      params: initial parameters (see `weights.adapt.convert_params`); None initialises new ones.
      modules: custom modules: the arguments `block`, `attention` and `pooling` of `functional`.

    Raises:
      UserError: the config or the data is invalid, the loss is not finite, or `config` names
        initial weights or a run to resume from.
    """
    check(config)
    runtime.cache_compiled_programs()
    for name, value in (("resume", config.resume), ("init.checkpoint", config.init.checkpoint)):
        if value:
            raise UserError(
                f"in-memory runs read no checkpoint: unset {name}={value} and pass `params`"
            )
    videos = build.videos(config, "train")
    training = build.training(config, videos, **modules)
    for sentence in build.warnings(config, len(videos)):
        warnings.warn(sentence, stacklevel=2)
    settings, mesh, program = training.settings, training.mesh, training.program
    with jax.set_mesh(mesh), jax.default_matmul_precision(config.precision):
        state = program.initial_state()
        if params is not None:
            state = with_params(state, params)
        history, ends = [], []
        batches, steps = training.batches(), training.steps
        bar = tqdm(batches, "training", total=steps, unit="step", file=sys.stdout)
        for batch in bar:
            _warn_broken(videos, batch["broken"])
            rate = np.float32(training.learning_rate(len(history)))
            state, metrics = program.step(state, sharding.to_devices(batch, mesh), rate)
            history.append({k: float(total / count) for k, (total, count) in metrics.items()})
            if not np.isfinite(history[-1]["loss"]):
                raise UserError(f"the loss is {history[-1]['loss']} at step {len(history)}")
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}")
            ends.append(time.perf_counter())
        [scores] = testing.evaluate(
            program.predict,
            state.eval_params,
            build.videos(config, "test"),
            settings.clips,
            settings.test,
            mesh=mesh,
            loader=settings.loader,
        )
    columns = {k: np.array([row[k] for row in history]) for k in ("loss", "accuracy", "grad_norm")}
    seconds = float(np.median(np.diff(ends))) if len(ends) > 1 else float("nan")
    return Trial(jax.device_get(state.eval_params), settings.model.config, columns, scores, seconds)


def _warn_broken(videos: Source, broken: np.ndarray) -> None:
    for index in broken[broken >= 0]:
        text = f"{videos.item(int(index))} cannot be decoded and is replaced by another video"
        warnings.warn(text, stacklevel=3)
