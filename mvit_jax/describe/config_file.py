"""Generation of a config file with every key of an experiment. Imports no JAX."""

import json
import textwrap
from typing import Any

from mvit_jax.config import KEYS, SECTIONS, Config, Key, value
from mvit_jax.describe import comments
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.variants import variant

_WIDTH = 100
_HEAD = '''"""{source}, with every key.

    python -m mvit_jax.train --config=FILE --workdir=DIR
"""

from mvit_jax import config


def get_config():
    c = config.base()
'''


def text(config: Config, source: str) -> str:
    """Returns a config file that reproduces `config`; its docstring names `source`."""
    meaning = meanings()
    defaults = variant(config.model.variant)
    lines, last = [_HEAD.format(source=source).rstrip()], None
    for name, key in KEYS.items():
        section, _, field = name.rpartition(".")
        if section != last:
            lines += ["", *_comment(f"-- {section}: {SECTIONS[section]}".replace("-- :", "--"))]
            last = section
        setting = value(config, name)
        if section == "model" and setting is None:  # the variant's value, in a comment
            assignment = f"# c.{name} = {_literal(getattr(defaults, field, None))}"
        else:
            assignment = f"c.{name} = {_literal(setting)}"
        lines += _with_comment(assignment, f"{meaning[name]}{_limits(key, meaning[name])}")
    return "\n".join(lines) + "\n    return c\n"


def meanings() -> dict[str, str]:
    """Returns the meaning of every key, for architecture keys from comments in `MViTConfig`."""
    of_field = comments.of_class(MViTConfig)
    return {
        name: key.meaning or of_field[name.removeprefix("model.")] for name, key in KEYS.items()
    }


def _limits(key: Key, meaning: str) -> str:
    """Returns unit and range in brackets; choices are left out if the meaning lists them."""
    explained = key.choices and all(str(choice) in meaning for choice in key.choices)
    limits = ", ".join(part for part in (key.unit, "" if explained else key.limits) if part)
    return f" [{limits}]" if limits else ""


def _literal(setting: Any) -> str:
    """Returns a value as a Python literal, strings in double quotes."""
    if isinstance(setting, str):
        return json.dumps(setting, ensure_ascii=False)
    return repr(tuple(setting) if isinstance(setting, list) else setting)


def _with_comment(assignment: str, meaning: str) -> list[str]:
    """Returns an assignment with a comment beside it, or above it if the line would be too long."""
    line = f"    {assignment}  # {meaning}".removesuffix("  # ")
    return [line] if len(line) <= _WIDTH else [*_comment(meaning), f"    {assignment}"]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="    # ", subsequent_indent="    # ", break_on_hyphens=False
    )
