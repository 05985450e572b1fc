"""Process-wide settings of JAX: compilation cache, memory that XLA frees on a CPU."""

import ctypes
import hashlib
import os
import platform
import re
import tempfile
from pathlib import Path

import jax

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def cache_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, for programs: before the first computation.

    The training step of the default experiment then takes 2 s to load instead of 33 s to compile (2
    cores, both busy, 2026-11-23). The folder is that of JAX_COMPILATION_CACHE_DIR, by default
    `mvit_jax/compiled` in the user's folder for caches ($XDG_CACHE_HOME, or ~/.cache); without one
    that can be written, nothing is kept. JAX_ENABLE_COMPILATION_CACHE=0 turns it off. It is never
    tidied up (a training step takes 1 MB): delete it when it has grown too large.

    It is on for any number of devices. Eight simulated ones that load a sharded training step give
    the same losses, bit for bit, as when they compile it; where they hang, with many steps on their
    way and few cores, they do so without a cache as well (jax 0.10.2).
    """
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return  # the user's own
    if jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        folder = default_folder()
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))


def default_folder() -> Path | None:
    """The user's own folder for it, made where it is missing; None where it cannot be written."""
    try:
        above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(above) / "mvit_jax" / "compiled" / processor()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the latter: a user without a home
        return None


def processor() -> str:
    """A short name of this machine's instructions: a home may be shared by machines that differ in
    them, and code compiled for one would crash on the other."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    found = re.findall(r"^(?:model name|flags|CPU part|Features)\s*:.*$", text, re.MULTILINE)
    known = sorted({platform.machine(), platform.processor(), *found})
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def keep_freed_memory() -> bool:
    """Keeps freed memory in the process for what is computed next; False where that is not to be
    had (only glibc has it).

    XLA allocates anew what a program needs each time that it runs: 1.5 GB for a training step of
    MViT-B 16x4 with one clip. glibc takes anything that large from the system, which hands out
    zeroed pages one fault at a time: negating 38 MB takes 48 ms with those faults, 6 ms without
    (2 cores of a virtual machine, 2026-11-23). For a process that runs one program many times.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def run_in_calling_thread() -> None:
    """Makes CPUs run programs in the thread that asks, without which nothing is kept: to be called
    before anything else uses JAX.

    Otherwise XLA runs them in a thread of its own. Of those the C library keeps nothing larger than
    64 MB: the training step above took 410,000 faults each time, and takes none so, which is 0.86
    of the time (2026-11-23).
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def release_freed_memory() -> None:
    """Gives the system back what is free now; after compiling, that is up to a gigabyte."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
