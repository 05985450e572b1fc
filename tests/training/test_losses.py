import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models.functional import functional
from mvit_jax.training import build
from mvit_jax.training.step import (
    StepConfig,
    augment,
    binary_cross_entropy,
    cross_entropy,
    keys,
    soft_targets,
)
from tests.training import test_step


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


def test_class_weights_are_inverse_frequencies_of_mean_one():
    labels = np.array([0, 0, 0, 3, 3, 1, -1], np.int32)  # the last cannot be read
    weights = build.class_weights(labels, 5)
    inverse = [1 / 3, 1, 0, 1 / 2, 0]  # two classes have no videos
    mean = sum(inverse) / 3
    np.testing.assert_allclose(weights, [value / mean for value in inverse])


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_class_weights_multiply_the_terms_of_soft_and_mixed_targets(mixup):
    """In a loop over clips and classes, with the targets of the step."""
    weights = (0.5, 2.0, 0.0, 1.5)
    run, state = test_step.make(mixup=mixup, class_weights=weights)
    changes = {"mixup": mixup, "dtype": jnp.float32}
    recipe = StepConfig(**test_step.RECIPE | changes)
    batch = test_step.batch()
    clip, targets = augment(batch, keys(0, 0)[0], recipe)
    logits = jax.jit(functional(test_step.CONFIG).apply)(state.params, clip)[0]
    total = 0.0
    for row, target in zip(np.asarray(logits, np.float64), np.asarray(targets), strict=True):
        scale = sum(math.exp(value) for value in row)
        for value, share, weight in zip(row, target, weights, strict=True):
            total -= weight * share * math.log(math.exp(value) / scale)
    loss, clips = run(state, batch)[1]["loss"]
    assert float(loss) == pytest.approx(total, rel=1e-5) and int(clips) == 8
    if mixup:  # the loss of a mixed clip is the mix of weighted losses
        assert np.count_nonzero(np.asarray(targets)[0] > 0.05) == 2
