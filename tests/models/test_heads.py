"""The classification head on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.models.heads import ClassificationHead
from mvit_jax.models.plan import MViTConfig

CONFIG = MViTConfig(num_classes=4, dropout=0.25)


def identity_head(config, dtype=jnp.float32):
    head = ClassificationHead(config, 4, dtype=dtype, rngs=nnx.Rngs(0))
    head.classifier.kernel[...] = jnp.eye(4)
    assert head.classifier.bias is not None
    head.classifier.bias[...] = jnp.array([0.0, 0.0, 0.0, 10.0])
    return head


def test_the_head_reads_the_class_token_or_the_mean():
    tokens = jax.random.normal(jax.random.key(0), (2, 7, 4))
    bias = np.array([[0, 0, 0, 10]])
    logits = identity_head(CONFIG)(tokens)
    np.testing.assert_allclose(logits, np.array(tokens)[:, 0] + bias, rtol=1e-6)
    logits = identity_head(dataclasses.replace(CONFIG, class_token=False))(tokens)
    np.testing.assert_allclose(logits, np.array(tokens).mean(1) + bias, rtol=1e-5)


def test_dropout_is_before_the_classifier_and_in_training_alone():
    tokens = jnp.ones((5000, 1, 4))
    head = identity_head(CONFIG)
    np.testing.assert_array_equal(head(tokens)[:, :3], 1)
    logits = np.array(head(tokens, jax.random.key(0)))
    assert np.unique(logits[:, :3]).tolist() == pytest.approx([0, 4 / 3])
    assert np.unique(logits[:, 3]).tolist() == pytest.approx([10, 10 + 4 / 3])  # bias is kept
    assert logits[:, :3].mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(logits, head(tokens, jax.random.key(0)))
    assert (logits != np.array(head(tokens, jax.random.key(1)))).any()


def test_logits_of_bfloat16_are_float32():
    logits = identity_head(CONFIG, jnp.bfloat16)(jnp.ones((2, 3, 4), jnp.bfloat16))
    assert logits.dtype == jnp.float32
