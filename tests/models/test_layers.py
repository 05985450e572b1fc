"""The classification head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.models.layers import ClassificationHead
from mvit_jax.models.plan import MViTConfig


def test_dropout_is_before_the_classifier_and_in_training_only():
    pooled = jnp.ones((5000, 4))
    config = MViTConfig(num_classes=4, dropout=0.25)
    head = ClassificationHead(config, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    head.classifier.kernel[...] = jnp.eye(4)
    head.classifier.bias[...] = jnp.array([0.0, 0.0, 0.0, 10.0])
    np.testing.assert_array_equal(head(pooled)[:, :3], 1)
    logits = np.array(head(pooled, jax.random.key(0)))
    assert np.unique(logits[:, :3]).tolist() == pytest.approx([0, 4 / 3])
    # The bias is not dropped.
    assert np.unique(logits[:, 3]).tolist() == pytest.approx([10, 10 + 4 / 3])
    assert logits[:, :3].mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(logits, head(pooled, jax.random.key(0)))
    assert (logits != np.array(head(pooled, jax.random.key(1)))).any()
