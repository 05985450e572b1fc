"""Process-wide settings: JAX's compilation cache, and reuse of freed memory on CPUs."""

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
    """Turns on JAX's persistent compilation cache; call before the first computation.

    The training step of the default experiment then loads in 2 s instead of compiling in 33 s (2
    cores, both busy, 2026-11-23). The folder is $JAX_COMPILATION_CACHE_DIR, by default
    one for each processor in `mvit_jax/compiled` in $XDG_CACHE_HOME or ~/.cache. Without a writable
    folder there is no cache. JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off. Entries are never
    removed (a training step takes 1 MB): delete the folder if it grows too large.

    The cache is on for any number of devices. On eight simulated devices, a sharded training step
    from the cache has the same losses, bit for bit, as a compiled one. With many dispatched steps
    and few cores, simulated devices may hang, but they do so without a cache too (jax 0.10.2).
    """
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return  # set by the user
    if jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        folder = default_folder()
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))


def default_folder() -> Path | None:
    """Returns the default cache folder, created if missing; None if it is not writable."""
    try:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(parent) / "mvit_jax" / "compiled" / processor()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return None


def processor() -> str:
    """Returns a short hash of this machine's instruction set.

    Machines with different instruction sets may share a home folder, and code that is compiled for
    one machine could crash on another.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    lines = re.findall(r"^(?:model name|flags|CPU part|Features)\s*:.*$", text, re.MULTILINE)
    features = sorted({platform.machine(), platform.processor(), *lines})
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed memory, for processes that run a compiled program many times.

    XLA allocates a program's memory anew in each run: 1.5 GB for a training step of MViT-B 16x4
    with one clip. By default glibc maps blocks of this size from the system, and each page costs a
    page fault. Negating 38 MB takes 48 ms with these page faults, and 6 ms without (2 cores of a
    virtual machine, 2026-11-23).

    Returns:
      True if the setting was applied; False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def run_in_calling_thread() -> None:
    """Disables async dispatch on CPU, so that glibc can reuse freed memory; call before using JAX.

    With async dispatch XLA runs programs in its own thread. In such threads glibc keeps no blocks
    above 64 MB, and `keep_freed_memory` has no effect on them. A training step of MViT-B 16x4 with
    one clip had 410,000 page faults with async dispatch. Without async dispatch the step has none,
    and takes 0.86 of the time (2026-11-23).
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def release_freed_memory() -> None:
    """Returns freed memory to the operating system: up to a gigabyte after compilation."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
