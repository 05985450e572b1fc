"""Packages that only some uses need, and the sentence about the absence of one.

The model, its weights and StableHLO files need the package's own dependencies. Every other package
is in an extra of `pyproject.toml`.
"""

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from types import TracebackType

# Modules by extra, and the packages that have them where the names differ.
_EXTRAS = {
    "train": (
        "array_record", "av", "clu", "cv2", "grain", "jinja2", "markupsafe", "matplotlib",
        "ml_collections", "msgpack", "optax", "orbax", "PIL", "sklearn", "tensorboard", "tqdm",
    ),
    "tfds": ("tensorflow_datasets", "importlib_resources"),
    "gcs": ("google.cloud", "google.api_core", "google.auth", "tensorflow"),
    "prepare": ("apache_beam",),
    "demo": ("gradio", "fastapi", "starlette", "uvicorn"),
    "onnx": ("onnxruntime",),
    "tpu": ("libtpu",),
}  # fmt: skip
_PACKAGES = {
    "av": "PyAV", "cv2": "OpenCV", "PIL": "Pillow", "sklearn": "scikit-learn",
    "apache_beam": "Apache Beam", "google.cloud": "google-cloud-storage",
}  # fmt: skip


def pip_line(extra: str) -> str:
    """Returns the command that installs an extra, for a clone of the project."""
    return f"pip install -e '.[{extra}]'"


def absence(module: str) -> str | None:
    """Returns the sentence about an absent module, or None if the module is in no extra."""
    for extra, modules in _EXTRAS.items():
        for name in modules:
            if f"{module}.".startswith(f"{name}."):
                return f"{_PACKAGES.get(name, name)} is not installed: {pip_line(extra)}"
    return None


def require(module: str) -> None:
    """Raises `UserError` with the pip line if a module of an extra is absent; imports nothing."""
    if importlib.util.find_spec(module) is None:
        from mvit_jax.common.errors import UserError

        raise UserError(absence(module) or f"{module} is not installed")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns the absence of an extra's module into a `UserError` with the pip line."""
    try:
        yield
    except ModuleNotFoundError as error:
        sentence = absence(error.name or "")
        if sentence is None:
            raise
        from mvit_jax.common.errors import UserError

        raise UserError(sentence) from error


def explain_to_programs() -> None:
    """Ends a program that cannot be imported with one sentence, in place of a traceback."""
    if sys.argv[:1] == ["-m"] and _program(sys.orig_argv):  # Python imports the parent package
        sys.excepthook = _excepthook


def _program(command: list[str]) -> bool:
    pairs = itertools.pairwise(command)
    return any(option == "-m" and name.startswith("mvit_jax.") for option, name in pairs)


def _excepthook(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    sentence = absence(error.name or "") if isinstance(error, ModuleNotFoundError) else None
    if sentence is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
