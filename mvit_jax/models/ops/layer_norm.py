"""Layer norm with a gradient that is fast on CPUs."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mvit_jax.models.ops.dispatch import uses_reference

Rows = Float[Array, "*rows channels"]
Channels = Float[Array, " channels"]


def layer_norm(x: Rows, scale: Channels, bias: Channels, eps: float) -> Rows:
    """Returns the layer norm of `x` over its last axis, in float32 at least."""
    return (reference if uses_reference() else _layer_norm)(x, scale, bias, eps)


def reference(x: Rows, scale: Channels, bias: Channels, eps: float) -> Rows:
    """Returns `layer_norm`; its gradients are derived by autodiff."""
    return _save(x, scale, bias, eps)[0]


_layer_norm = jax.custom_vjp(reference, nondiff_argnums=(3,))


def _save(x, scale, bias, eps: float):
    # Two values per row are saved; rematerialising them would take two passes over x.
    x_wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x_wide.mean(-1, keepdims=True)
    # The faster E[x^2] - E[x]^2 cancels in float32, which loses parity with the original models.
    inverse = lax.rsqrt(jnp.square(x_wide - mean).mean(-1, keepdims=True) + eps)
    out = (x_wide - mean) * (inverse * _as_row(scale, x)) + _as_row(bias, x)
    return out, (x, scale, bias, mean, inverse)


def _backward(eps: float, saved, gradient):
    return lax.platform_dependent(*saved, gradient, cpu=_gradients_cpu, default=_gradients)


_layer_norm.defvjp(_save, _backward)


def _gradients(x, scale, bias, mean, inverse, gradient) -> tuple[Array, Array, Array]:
    normal = (x - mean) * inverse
    by_scale = gradient * _as_row(scale, x)
    first = by_scale.mean(-1, keepdims=True)
    second = (by_scale * normal).mean(-1, keepdims=True)
    dx = inverse * (by_scale - first - normal * second)
    rows = tuple(range(x.ndim - 1))
    return (
        dx.astype(x.dtype),
        (gradient * normal).sum(rows).astype(scale.dtype),
        gradient.sum(rows).astype(bias.dtype),
    )


def _gradients_cpu(x, scale, bias, mean, inverse, gradient) -> tuple[Array, Array, Array]:
    """Returns the gradients by operations that are fast on CPUs.

    On CPUs XLA writes every broadcast operand of a sum to memory, and sums products of rows slowly.
    Here sums over channels are matrix-vector products with the scale. Barriers keep XLA from
    computing an operand of two sums twice. This takes 0.1 to 0.3 of the processor time of XLA's
    gradients (float32, from 1,569 tokens of 384 channels to 25,089 of 96, 2026-11-23).
    """
    normal = lax.optimization_barrier((x - mean) * inverse)
    product = lax.optimization_barrier(gradient * normal)
    by_scale = [
        lax.dot_general(rows, scale.astype(rows.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        for rows in (gradient, product)
    ]
    first, second = (jnp.expand_dims(rows, -1) / x.shape[-1] for rows in by_scale)
    dx = inverse * (gradient * _as_row(scale, x) - first - normal * second)
    rows = tuple(range(x.ndim - 1))
    return (
        dx.astype(x.dtype),
        product.sum(rows).astype(scale.dtype),
        gradient.sum(rows).astype(bias.dtype),
    )


def _as_row(channels, x):
    return channels.reshape((1,) * (x.ndim - 1) + (-1,))
