"""Description of the machine and of versions, for a benchmark's JSON and table."""

import importlib.metadata
import importlib.util
import os
import platform
from datetime import date

import jax

from mvit_jax.training.run import runtime


def about() -> dict[str, str]:
    """Returns the machine, today's date, and library versions."""
    return {
        "machine": f"{platform.processor() or platform.machine()}, {cores()} cores",
        "date": str(date.today()),
        "versions": versions(),
    }


def use_training_settings() -> None:
    """Applies the training program's settings for memory on CPUs. Call before any use of JAX."""
    runtime.run_in_calling_thread()
    if jax.default_backend() == "cpu":
        runtime.keep_freed_memory()


def cores() -> int:
    """Returns the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> str:
    names = ("jax", "torch", "torchvision", "timm")
    installed = [name for name in names if importlib.util.find_spec(name) is not None]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)
