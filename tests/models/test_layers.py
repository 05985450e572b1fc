"""The classification head on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.models.layers import ClassificationHead
from mvit_jax.models.plan import MViTConfig

CONFIG = MViTConfig(num_classes=4, dropout=0.25)


def identity_head(config, dtype=jnp.float32):
    head = ClassificationHead(config, 4, dtype=dtype, rngs=nnx.Rngs(0))
    head.classifier.kernel[...] = jnp.eye(4)
    assert head.classifier.bias is not None
    head.classifier.bias[...] = jnp.array([0.0, 0.0, 0.0, 10.0])
    return head


def test_dropout_is_before_the_classifier_and_in_training_alone():
    pooled = jnp.ones((5000, 4))
    head = identity_head(CONFIG)
    np.testing.assert_array_equal(head(pooled)[:, :3], 1)
    logits = np.array(head(pooled, jax.random.key(0)))
    assert np.unique(logits[:, :3]).tolist() == pytest.approx([0, 4 / 3])
    assert np.unique(logits[:, 3]).tolist() == pytest.approx([10, 10 + 4 / 3])  # bias is kept
    assert logits[:, :3].mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(logits, head(pooled, jax.random.key(0)))
    assert (logits != np.array(head(pooled, jax.random.key(1)))).any()


def test_logits_of_bfloat16_are_float32():
    logits = identity_head(CONFIG, jnp.bfloat16)(jnp.ones((2, 4), jnp.bfloat16))
    assert logits.dtype == jnp.float32
