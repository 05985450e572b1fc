"""What the C library does with memory that XLA has freed on a CPU."""

import ctypes

import jax

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


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
