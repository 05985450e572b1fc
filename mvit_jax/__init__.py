"""Multiscale Vision Transformers (MViT) in JAX; public names are imported on first use."""

import importlib
from typing import TYPE_CHECKING

from mvit_jax.common import absent_tpu, extras

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mvit_jax.common.errors import UserError as UserError
    from mvit_jax.data.preprocess import preprocess as preprocess
    from mvit_jax.models.functional import Functional as Functional
    from mvit_jax.models.functional import create_model as create_model
    from mvit_jax.models.functional import functional as functional
    from mvit_jax.models.functional import params_of as params_of
    from mvit_jax.models.inference import Inference as Inference
    from mvit_jax.models.mvit import Block as Block
    from mvit_jax.models.mvit import MViT as MViT
    from mvit_jax.models.mvit import PooledAttention as PooledAttention
    from mvit_jax.models.plan import MViTConfig as MViTConfig
    from mvit_jax.models.plan import plan as plan
    from mvit_jax.models.pooling import AvgPool as AvgPool
    from mvit_jax.models.pooling import ConvPool as ConvPool
    from mvit_jax.models.pooling import MaxPool as MaxPool
    from mvit_jax.models.variants import VARIANTS as VARIANTS
    from mvit_jax.models.variants import variant as variant
    from mvit_jax.training.run_folder import TrainedModel as TrainedModel
    from mvit_jax.training.run_folder import load_run as load_run
    from mvit_jax.weights.export import save_torch as save_torch
    from mvit_jax.weights.load import load_torch as load_torch
    from mvit_jax.weights.stablehlo import save_stablehlo as save_stablehlo

_HOME = {
    "UserError": "mvit_jax.common.errors",
    "create_model": "mvit_jax.models.functional",
    "functional": "mvit_jax.models.functional",
    "Functional": "mvit_jax.models.functional",
    "params_of": "mvit_jax.models.functional",
    "Block": "mvit_jax.models.mvit",
    "MViT": "mvit_jax.models.mvit",
    "PooledAttention": "mvit_jax.models.mvit",
    "ConvPool": "mvit_jax.models.pooling",
    "MaxPool": "mvit_jax.models.pooling",
    "AvgPool": "mvit_jax.models.pooling",
    "MViTConfig": "mvit_jax.models.plan",
    "plan": "mvit_jax.models.plan",
    "Inference": "mvit_jax.models.inference",
    "load_run": "mvit_jax.training.run_folder",
    "TrainedModel": "mvit_jax.training.run_folder",
    "load_torch": "mvit_jax.weights.load",
    "save_torch": "mvit_jax.weights.export",
    "save_stablehlo": "mvit_jax.weights.stablehlo",
    "VARIANTS": "mvit_jax.models.variants",
    "variant": "mvit_jax.models.variants",
    "preprocess": "mvit_jax.data.preprocess",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

absent_tpu.skip()  # before JAX initialises its backends
extras.explain_to_programs()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mvit_jax' has no attribute {name!r}")
    with extras.explained():
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
