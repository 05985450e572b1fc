"""A tiny training run: a model of 2 blocks on clips of 4 x 32 x 32 pixels."""

import importlib.util
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

ROOT = Path(__file__).parents[2]


def load_config_file(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODEL = {
    "frames": 4,
    "size": 32,
    "width": 16,
    "depths": (1, 1),
    "patch_stride": (2, 8, 8),
    "kv_stride": (1, 2, 2),
}
SMALL = {f"model.{key}": value for key, value in MODEL.items()} | {
    "data.short_side": 32, "batch": 8, "eval.batch": 8, "eval.clips": 2, "log_every": 2,
}  # fmt: skip

# The recipe of tests of whole runs, which share its compiled step and one run: 24 videos in batches
# of 8 are 9 steps.
RECIPE = {
    "epochs": 3.0, "checkpoint.every": 2, "eval.every_epochs": 1.0, "optim.ema": 0.5,
    "model.drop_path": 0.3,
}  # fmt: skip

# The same as flags of the training program.
RECIPE_FLAGS = [f"--config.{k}={v}".replace(" ", "") for k, v in (SMALL | RECIPE).items()]
FLAGS = RECIPE_FLAGS[: len(SMALL)]


def config(folder: str | Path, **changes) -> ConfigDict:
    """Returns the default config with a tiny model; `changes` are flattened keys."""
    c = load_config_file("moving_digits").get_config()
    c.update_from_flattened_dict(SMALL | {"data.folder": str(folder)} | changes)
    return c
