"""Exact GELU whose gradient saves only its input."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mvit_jax.models.ops.dispatch import uses_reference


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x times the standard normal distribution function of x, in x's dtype.

    `jax.nn.gelu` uses erfc, for which XLA computes two approximations and an exponential. The
    gradient of `jax.nn.gelu` saves or rematerialises all three. This function takes 0.4 of the
    processor time of `jax.nn.gelu` forward, and 0.3 to 0.6 with the gradient (6,273 tokens of 768
    channels and 1,569 tokens of 1,536 channels, 2026-11-23).
    """
    return reference(x) if uses_reference() else _gelu(x)


def reference(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `gelu(x)`; its gradient is derived by autodiff."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _probability(wide)).astype(x.dtype)


_gelu = jax.custom_vjp(reference)


def _backward(x, gradient):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    return ((gradient * (_probability(wide) + wide * density)).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _backward)


def _probability(x):
    return 0.5 + 0.5 * lax.erf(x * 0.5**0.5)
