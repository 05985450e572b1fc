"""Compiled programs are kept on disk, so that a program's second start need not compile again."""

import os
import tempfile
from pathlib import Path

import jax

FOLDER = "JAX_COMPILATION_CACHE_DIR"


def keep() -> None:
    """Turns on JAX's persistent compilation cache, for programs: before the first computation.

    It is in the folder of the variable JAX_COMPILATION_CACHE_DIR, by default `mvit_jax/compiled` in
    the user's folder for caches ($XDG_CACHE_HOME, or ~/.cache). JAX_ENABLE_COMPILATION_CACHE=0
    turns it off. Where the folder cannot be written it stays off. It is never tidied up: delete it
    when it has grown too large.
    """
    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        folder = default_folder()
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))


def default_folder() -> Path | None:
    """The user's own folder for it, made where it is missing; None where it cannot be written."""
    try:
        above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(above) / "mvit_jax" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the latter: a user without a home
        return None
