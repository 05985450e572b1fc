import jax.numpy as jnp
import numpy as np

from mvit_jax.training.step import binary_cross_entropy, cross_entropy, soft_targets


def test_label_smoothing_is_shared_among_all_classes():
    targets = soft_targets(jnp.array([2, 0]), 4, 0.1)
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    np.testing.assert_allclose(targets, expected, atol=1e-7)


def test_cross_entropy_of_targets_that_do_not_sum_to_one():
    logits = np.array([[1.0, -2.0, 0.5], [3.0, 3.0, -1.0]])
    targets = np.array([[0.2, 0.3, 0.1], [0.0, 1.0, 0.5]])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -(targets * np.log(shares)).sum(1)
    np.testing.assert_allclose(cross_entropy(jnp.array(logits), jnp.array(targets)), expected, 1e-6)


def test_binary_cross_entropy_is_the_mean_over_all_classes():
    """The definition in float64; logits whose exponential overflows have a finite loss."""
    logits = np.array([[1.0, -2.0, 0.5], [3.0, 3.0, -1.0]])
    targets = np.array([[1.0, 0.0, 1.0], [0.0, 0.3, 0.0]])
    p = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(-1)
    ours = binary_cross_entropy(jnp.array(logits), jnp.array(targets))
    np.testing.assert_allclose(ours, expected, 1e-6)
    extreme = binary_cross_entropy(jnp.array([[200.0, -200.0]]), jnp.array([[0.0, 0.0]]))
    np.testing.assert_allclose(extreme, [100.0])
