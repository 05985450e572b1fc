"""What a benchmark's figures are of: stands in its JSON and above its table."""

import importlib.metadata
import importlib.util
import os
import platform
from datetime import date

import jax

from mvit_jax.training.run import runtime


def about() -> dict[str, str]:
    """The machine, today's date, and the versions of what is measured."""
    return {
        "machine": f"{platform.processor() or platform.machine()}, {cores()} cores",
        "date": str(date.today()),
        "versions": versions(),
    }


def as_in_training() -> None:
    """Keeps memory as the training program does on CPUs; before anything else uses JAX."""
    runtime.run_in_calling_thread()
    if jax.default_backend() == "cpu":
        runtime.keep_freed_memory()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> str:
    names = ("jax", "torch", "torchvision", "timm")
    found = [name for name in names if importlib.util.find_spec(name) is not None]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
