"""Parameters for tests of models: shapes, and random weights without exact zeros or ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mvit_jax.models.functional import Functional


def shapes(model: Functional) -> dict[str, Any]:
    """Returns the parameters as shapes in float32, for `jax.eval_shape`."""
    leaves = model.shapes().items()
    return unflatten_dict({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in leaves}, sep="/")


def weights(model: Functional) -> dict[str, Any]:
    """Returns parameters in JAX's widest type: tables about zero, scales and biases about one."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape) + (len(leaf.shape) == 1))

    return jax.tree.map(draw, shapes(model))
