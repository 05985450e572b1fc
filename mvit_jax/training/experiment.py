"""From a config to the things that it describes. Besides the programs, only this reads configs."""

import importlib.util
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp

from mvit_jax.common.errors import UserError
from mvit_jax.data import randaugment
from mvit_jax.data.augmentation import Interpolation
from mvit_jax.data.sampling import Sampling
from mvit_jax.data.source import SOURCES
from mvit_jax.models.run_blocks import REMAT
from mvit_jax.training.evaluation import Ensemble
from mvit_jax.training.run import nan_policy
from mvit_jax.weights import adapt

Config = Any  # an ml_collections ConfigDict: no type checker knows its keys

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PRECISIONS = ("default", "high", "highest")
CHOICES = {
    "dtype": tuple(DTYPES),
    "precision": PRECISIONS,
    "remat": REMAT,
    "on_nan": nan_policy.POLICIES,
    "data.interpolation": get_args(Interpolation),
    "data.source": SOURCES,
    "data.sampling": get_args(Sampling),
    "augment.erase_mode": ("pixel", "const"),
    "eval.ensemble": get_args(Ensemble),
    "eval.crops": (1, 3),
    "init.inflate": (None, *adapt.INFLATIONS),
    "optim.name": ("adamw", "sgd"),
}
INF = float("inf")
RANGES = {  # smallest and largest value
    "seed": (0, 2**31 - 1),
    "batch": (1, INF),
    "accumulate": (1, INF),
    "log_every": (1, INF),
    "data.stride": (1, INF),
    "data.short_side": (1, INF),
    "data.threads": (0, INF),
    "data.processes": (0, INF),
    "data.timeout": (0, 1e6),  # of seconds; the operating system takes few more
    "data.repeats": (1, INF),
    "data.max_broken": (0, 1),
    "augment.erase": (0, 1),
    "augment.flip": (0, 1),
    "augment.mixup": (0, INF),
    "augment.cutmix": (0, INF),
    "augment.switch": (0, 1),
    "augment.group": (1, INF),
    "augment.label_smoothing": (0, 1),
    "augment.short_side": (1, INF),
    "eval.every_epochs": (0, INF),
    "optim.lr": (0, INF),
    "optim.start_lr": (0, INF),
    "optim.end_lr": (0, INF),
    "optim.warmup_epochs": (0, INF),
    "optim.weight_decay": (0, INF),
    "optim.lr_batch": (1, INF),
    "optim.layer_decay": (0, 1),
    "optim.momentum": (0, 1),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.clip_norm": (0, INF),
    "optim.ema": (0, 1),
    "checkpoint.every": (1, INF),
    "checkpoint.keep": (1, INF),
    "eval.batch": (1, INF),
    "eval.clips": (1, INF),
}


def check(config: Config) -> None:
    """One sentence for each value that no part of the program could work with."""
    for key, allowed in CHOICES.items():
        if _value(config, key) not in allowed:
            known = ", ".join(str(value) for value in allowed if value is not None)
            raise UserError(f"{key} must be one of {known}, not {_value(config, key)!r}")
    for key, (low, high) in RANGES.items():
        value = _value(config, key)
        if value is not None and not low <= value <= high:  # None: a key without a default
            limits = f"at least {low}" if high == INF else f"from {low} to {high}"
            raise UserError(f"{key} must be {limits}, not {value}")
    if config.epochs <= 0:
        raise UserError(f"epochs must be above 0, not {config.epochs}")
    _check_augmentation(config)
    if config.eval.whole_image and config.eval.crops != 1:
        raise UserError("eval.whole_image leaves nothing to crop: set eval.crops=1")
    if config.data.sampling == "segments" and config.eval.clips != 1:
        raise UserError("segments make one clip of the whole video: set eval.clips=1")
    if config.data.multi_label and config.augment.mixup + config.augment.cutmix > 0:
        raise UserError("sets of classes (data.multi_label) are not mixed: set mixup and cutmix 0")


def _check_augmentation(config: Config) -> None:
    area, jitter = config.augment.crop_area, config.augment.jitter
    if area is not None and not (len(area) == 2 and 0 < area[0] <= area[1] <= 1):
        raise UserError(f"augment.crop_area must be two shares, 0 < low <= high <= 1, not {area}")
    if jitter is not None and not (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]):
        raise UserError(f"augment.jitter must be two sides, 0 < low <= high pixels, not {jitter}")
    if area is not None and jitter is not None:
        raise UserError(
            "augment.crop_area and augment.jitter are two ways to crop: set one of them to None"
        )
    if config.augment.randaugment:
        randaugment.parse(config.augment.randaugment)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


def check_start(config: Config) -> None:
    """A recipe that starts from weights must be given some."""
    if missing_weights(config):
        raise UserError(
            f"this experiment starts from {config.init.needed}: give them with "
            "--config.init.checkpoint=DIR, a run's folder or one that mvit_jax.convert made "
            "(or start without them, by --config.init.needed=)"
        )


def missing_weights(config: Config) -> bool:
    given = config.init.checkpoint is not None or config.resume is not None
    return bool(config.init.needed) and not given


def check_batch(config: Config, devices: int) -> None:
    """The batch must cut evenly into devices, accumulated parts, and groups that mix."""
    share = devices * config.accumulate
    if config.batch % (devices * config.data.repeats):
        raise UserError(
            f"batch={config.batch} does not divide into {devices} devices x "
            f"data.repeats={config.data.repeats}; set a multiple of {devices * config.data.repeats}"
        )
    if config.batch % share:
        raise UserError(
            f"batch={config.batch} does not divide into {devices} devices x "
            f"accumulate={config.accumulate}; set a multiple of {share}"
        )
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    if mixes and (config.batch // devices) % config.augment.group:
        raise UserError(
            f"augment.group={config.augment.group} does not divide the {config.batch // devices} "
            "clips of a device; set a divisor of it"
        )


def read_config(name: str, arg: str | None = None) -> Config:
    """The experiment `configs/NAME.py`, where the package stands beside that folder."""
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.parent.is_dir():
        raise UserError(
            f"{path.parent} is missing: install mvit_jax from a clone, `pip install -e .`"
        )
    if spec is None or spec.loader is None or not path.exists():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.py")))
        raise UserError(f"there is no config {name!r} in {path.parent}: it has {known}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if arg is None else module.get_config(arg)


def base() -> Config | None:
    """All keys with their defaults; None in an installation without configs/."""
    try:
        return read_config("base")
    except UserError:
        return None
