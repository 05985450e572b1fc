"""Targets and losses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def soft_targets(
    labels: Int[Array, " batch"], num_classes: int, smoothing: float
) -> Float[Array, "batch num_classes"]:
    """One-hot targets with `smoothing` spread evenly over all classes (label smoothing)."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def cross_entropy(
    logits: Float[Array, "batch num_classes"], targets: Float[Array, "batch num_classes"]
) -> Float[Array, " batch"]:
    """Soft-target cross-entropy per clip, in nats; targets are not renormalised."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "batch num_classes"], targets: Float[Array, "batch num_classes"]
) -> Float[Array, " batch"]:
    """Mean over the classes of each class's own yes or no (a sigmoid), per clip, in nats.

    For videos of any number of classes. Its mean over clips is PyTorch's BCEWithLogitsLoss.
    """
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.mean(targets * yes + (1 - targets) * no, axis=-1)
