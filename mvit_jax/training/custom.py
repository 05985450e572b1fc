"""Custom modules of a config: import, check, and digests of their source.

A config names them as `config.model.block = "my_ideas.layer_scale:Block"`, likewise `attention` and
`pooling`; docs/variants.md describes these classes. A workdir records the digests, because a
changed source may define another model.
"""

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import first_line
from mvit_jax.config import Config
from mvit_jax.models.functional import Functional

# Stack frames in these libraries do not show where a user's code fails.
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(jax.__file__).parents[1]))
KINDS = ("block", "attention", "pooling")  # arguments of `functional` and keys of `config.model`


def load(config: Config) -> dict[str, Any]:
    """Imports the custom classes that `config.model` names.

    Returns:
      The classes by kind, see `KINDS`.

    Raises:
      UserError: a name is not MODULE:CLASS, or cannot be imported.
    """
    names = {kind: config.model[kind] for kind in KINDS if config.model[kind]}
    return {kind: _load(f"model.{kind}", name) for kind, name in names.items()}


def check(model: Functional) -> None:
    """Traces a model with custom modules, so that they fail before anything is written.

    Raises:
      UserError: the model cannot be initialised or applied to a clip.
    """
    if not model.is_custom:
        return
    c = model.config
    clip = jax.ShapeDtypeStruct((1, c.frames, c.size, c.size, 3), jnp.float32)
    try:
        params = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(model.apply, params, clip)
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        frame = ([f for f in frames if not f.filename.startswith(_LIBRARIES)] or frames)[-1]
        raise UserError(
            f"the model with custom modules fails ({type(error).__name__}: {first_line(error)}; "
            f"{frame.filename}:{frame.lineno}): docs/variants.md lists the required signatures"
        ) from error


def digests(config: Config) -> dict[str, str]:
    """Returns a digest of the source file of each custom module, by kind.

    A digest does not cover the modules that the source file imports.
    """
    result = {}
    for kind in load(config):
        name = config.model[kind]
        file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
        source = Path(file).read_bytes() if file else b""
        result[kind] = hashlib.sha256(name.encode() + source).hexdigest()[:16]
    return result


def _load(key: str, name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"{key}={name} must be MODULE:CLASS, like my_ideas.layer_scale:Block")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"{key}={name} cannot be imported ({type(error).__name__}: {first_line(error)}): start "
            f"in the folder that holds {module.partition('.')[0]}, or add that folder to PYTHONPATH"
        ) from error
    custom = getattr(imported, attribute, None)
    if not callable(custom):
        raise UserError(f"{key}={name}: the module {module} has no class {attribute}")
    return custom
