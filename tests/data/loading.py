"""Keyword arguments of the pipeline's generators."""

from dataclasses import fields
from typing import Any

from mvit_jax.data.loader import LoaderOptions

_NAMES = {field.name for field in fields(LoaderOptions)}


def loading(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments with `threads`, `processes` and `timeout` as one `loader`."""
    options = {k: v for k, v in arguments.items() if k in _NAMES}
    arguments = {k: v for k, v in arguments.items() if k not in _NAMES}
    return arguments | {"loader": LoaderOptions(**options)}
