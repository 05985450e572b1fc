"""Custom modules that a config names: their import, and digests of their source.

`config.model.block = "my_ideas.layer_scale:Block"`, likewise `attention` and `pooling`; what these
classes are is in docs/variants.md. A run's folder records the digests: a module whose source has
changed since is another model.
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

KINDS = ("block", "attention", "pooling")  # of `functional`, and keys of `config.model`


def load(config: Config) -> dict[str, Any]:
    """Imports the classes that `config.model` names, by kind.

    Raises:
      UserError: a name is not MODULE:CLASS, or cannot be imported.
    """
    named = {kind: config.model[kind] for kind in KINDS if config.model[kind]}
    return {kind: _load(f"model.{kind}", name) for kind, name in named.items()}


def check(model: Functional) -> None:
    """Builds the model in the abstract, so that custom modules fail before anything is written.

    Raises:
      UserError: a custom module cannot be built, or a clip does not go through the model.
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
    except Exception as error:  # whatever the user's own code raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the model with custom modules fails ({type(error).__name__}: {first_line(error)}; "
            f"{where.filename}:{where.lineno}): docs/variants.md has the signature of each"
        ) from error


def digests(config: Config) -> dict[str, str]:
    """Returns a digest of the source file that each custom module is named in, by kind.

    Of what that file imports, nothing is known: a change there goes unnoticed.
    """
    found = {}
    for kind in load(config):
        name = config.model[kind]
        file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
        source = Path(file).read_bytes() if file else b""
        found[kind] = hashlib.sha256(name.encode() + source).hexdigest()[:16]
    return found


def _load(key: str, name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"{key}={name} must be MODULE:CLASS, like my_ideas.layer_scale:Block")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"{key}={name} cannot be imported ({type(error).__name__}: {first_line(error)}): start "
            f"in the folder that holds {module.partition('.')[0]}, or add that folder to PYTHONPATH"
        ) from error
    custom = getattr(found, attribute, None)
    if not callable(custom):
        raise UserError(f"{key}={name}: the module {module} has no class {attribute}")
    return custom
