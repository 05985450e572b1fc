"""An experiment as a config file with every key, to copy and change. Loads without JAX."""

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
    """Returns Python whose `get_config()` gives `config`; `source` names the experiment."""
    meaning = meanings()
    own = variant(config.model.variant)
    lines, last = [_HEAD.format(source=source).rstrip()], None
    for name, key in KEYS.items():
        section, _, field = name.rpartition(".")
        if section != last:
            lines += ["", *_comment(f"-- {section}: {SECTIONS[section]}".replace("-- :", "--"))]
            last = section
        found = value(config, name)
        if section == "model" and found is None:  # a comment with the variant's own value
            assignment = f"# c.{name} = {_literal(getattr(own, field, None))}"
        else:
            assignment = f"c.{name} = {_literal(found)}"
        lines += _with_comment(assignment, f"{meaning[name]}{_limits(key, meaning[name])}")
    return "\n".join(lines) + "\n    return c\n"


def meanings() -> dict[str, str]:
    """Returns the meaning of every key; of the architecture's, the comments in `MViTConfig`."""
    of_field = comments.of_class(MViTConfig)
    return {
        name: key.meaning or of_field[name.removeprefix("model.")] for name, key in KEYS.items()
    }


def _limits(key: Key, meaning: str) -> str:
    """Returns unit and range in brackets; of choices those that the meaning does not name."""
    explained = key.choices and all(str(choice) in meaning for choice in key.choices)
    words = ", ".join(part for part in (key.unit, "" if explained else key.limits) if part)
    return f" [{words}]" if words else ""


def _literal(found: Any) -> str:
    """Returns a value as Python, text in double quotes."""
    if isinstance(found, str):
        return json.dumps(found, ensure_ascii=False)
    return repr(tuple(found) if isinstance(found, list) else found)


def _with_comment(assignment: str, meaning: str) -> list[str]:
    """Returns an assignment with a comment beside it, or above it where the line is too short."""
    line = f"    {assignment}  # {meaning}".removesuffix("  # ")
    return [line] if len(line) <= _WIDTH else [*_comment(meaning), f"    {assignment}"]


def _comment(words: str) -> list[str]:
    return textwrap.wrap(
        words, _WIDTH, initial_indent="    # ", subsequent_indent="    # ", break_on_hyphens=False
    )
