"""From the last block's tokens to class scores."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mvit_jax.models.plan import MViTConfig

INITIAL_STD = 0.02  # of linear weights, positions and class token (reference code)


class ClassificationHead(nnx.Module):
    """Dropout and a linear layer, on one vector for each clip."""

    def __init__(self, config: MViTConfig, width: int, *, dtype, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout
        self.classifier = nnx.Linear(
            width,
            config.num_classes,
            kernel_init=nnx.initializers.truncated_normal(INITIAL_STD),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, pooled: Float[Array, "batch channels"], key: Array | None = None
    ) -> Float[Array, "batch num_classes"]:
        """Logits in float32 (float64 where the input is); with a `key`, dropout is on."""
        if key is not None and self.rate > 0:
            keep = jax.random.bernoulli(key, 1 - self.rate, pooled.shape)
            pooled = jnp.where(keep, pooled / (1 - self.rate), 0)
        logits = self.classifier(pooled)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
