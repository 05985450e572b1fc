"""Suppression of libtpu on machines without a TPU."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

# Environment variables with which a user or a TPU machine selects the platform.
_CHOICES = (
    "JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES",
    "TPU_ACCELERATOR_TYPE", "TPU_PROCESS_ADDRESSES", "TPU_VISIBLE_CHIPS",
)  # fmt: skip
_TPUS = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")
_GPUS = ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg", "dev/kfd")
_GOOGLE = "0x1ae0"  # PCI vendor ID of TPUs, but also of virtual disks and network cards
_DISKS_AND_NETWORK = ("0x01", "0x02")  # PCI classes


def skip() -> None:
    """Selects the CPU if no accelerator is attached, so that JAX does not load libtpu.

    Loading libtpu reads 700 MB, takes seconds and prints errors. On a machine with a GPU, JAX may
    still load libtpu, which then prints nothing. Ahead-of-time compilation for TPUs
    (`podplan.compile`) always loads libtpu.
    """
    if importlib.util.find_spec("libtpu") is None or any(name in os.environ for name in _CHOICES):
        return
    if _any_exists(_TPUS) or any(map(_is_tpu, Path("/sys/bus/pci/devices").glob("*"))):
        return
    if (
        _any_exists(_GPUS)
        or importlib.util.find_spec("jax_plugins") is not None
        or importlib.metadata.entry_points(group="jax_plugins")
    ):  # JAX chooses among the other platforms; these variables keep libtpu from printing errors
        os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")  # if imported, JAX has read the variable already
    if jax is not None and jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")


def _any_exists(patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in Path("/").glob(pattern))


def _is_tpu(device: Path) -> bool:
    try:
        if (device / "vendor").read_text().strip() != _GOOGLE:
            return False
        return not (device / "class").read_text().startswith(_DISKS_AND_NETWORK)
    except OSError:  # containers may hide these files
        return False
