"""Multiscale Vision Transformers (MViT) in JAX. Names are imported when they are first used."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mvit_jax.data.preprocess import preprocess as preprocess
    from mvit_jax.errors import UserError as UserError
    from mvit_jax.models.inference import Inference as Inference
    from mvit_jax.models.mvit import Block as Block
    from mvit_jax.models.mvit import MViT as MViT
    from mvit_jax.models.mvit import PooledAttention as PooledAttention
    from mvit_jax.models.mvit import apply as apply
    from mvit_jax.models.mvit import create_model as create_model
    from mvit_jax.models.mvit import init as init
    from mvit_jax.models.mvit import params_of as params_of
    from mvit_jax.models.plan import MViTConfig as MViTConfig
    from mvit_jax.models.plan import plan as plan
    from mvit_jax.models.variants import VARIANTS as VARIANTS
    from mvit_jax.models.variants import variant as variant
    from mvit_jax.weights.exporting import save_torch as save_torch
    from mvit_jax.weights.loading import load_torch as load_torch
    from mvit_jax.weights.stablehlo import save_stablehlo as save_stablehlo

_HOME = {
    "UserError": "mvit_jax.errors",
    "Block": "mvit_jax.models.mvit",
    "MViT": "mvit_jax.models.mvit",
    "PooledAttention": "mvit_jax.models.mvit",
    "apply": "mvit_jax.models.mvit",
    "create_model": "mvit_jax.models.mvit",
    "init": "mvit_jax.models.mvit",
    "params_of": "mvit_jax.models.mvit",
    "MViTConfig": "mvit_jax.models.plan",
    "plan": "mvit_jax.models.plan",
    "Inference": "mvit_jax.models.inference",
    "load_torch": "mvit_jax.weights.loading",
    "save_torch": "mvit_jax.weights.exporting",
    "save_stablehlo": "mvit_jax.weights.stablehlo",
    "VARIANTS": "mvit_jax.models.variants",
    "variant": "mvit_jax.models.variants",
    "preprocess": "mvit_jax.data.preprocess",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


# Environment variables by which a user or a TPU machine chooses the platform.
_CHOICES = (
    "JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES",
    "TPU_ACCELERATOR_TYPE",
)  # fmt: skip
_TPUS = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")
_GPUS = ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg", "dev/kfd")
_GOOGLE = "0x1ae0"  # the PCI vendor of TPUs, and of virtual disks and network cards
_DISKS_AND_NETWORK = ("0x01", "0x02")  # PCI classes


def _skip_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU where libtpu is installed and no TPU is attached.

    JAX would load libtpu (700 MB), lose seconds and print lines of errors. Compilation for TPUs
    ahead of time (`training.ahead`) still loads it."""
    if importlib.util.find_spec("libtpu") is None or any(name in os.environ for name in _CHOICES):
        return
    if _any_exists(_TPUS) or any(map(_is_tpu, Path("/sys/bus/pci/devices").glob("*"))):
        return
    if (
        _any_exists(_GPUS)
        or importlib.util.find_spec("jax_plugins") is not None
        or importlib.metadata.entry_points(group="jax_plugins")
    ):  # JAX chooses among other platforms, and libtpu prints nothing where it has these names
        os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")  # has read the variable already
    if jax is not None and jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")


def _any_exists(patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in Path("/").glob(pattern))


def _is_tpu(device: Path) -> bool:
    vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    return vendor == _GOOGLE and not kind.startswith(_DISKS_AND_NETWORK)


_skip_absent_tpu()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mvit_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
