import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.models import mvit
from mvit_jax.models.variants import variant
from mvit_jax.training import optimizer


def test_learning_rate_is_linear_and_then_half_a_cosine():
    schedule = optimizer.learning_rate(
        lr=1.0, start_lr=0.1, end_lr=0.01, warmup_steps=10, steps=110
    )
    for step in (0, 3, 10, 35, 60, 109, 110):
        if step < 10:
            expected = 0.1 + 0.9 * step / 10
        else:
            expected = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5), step


def test_biases_norms_and_only_those_are_not_decayed():
    config = variant("mvit_b_16x4", frames=4, size=32, width=8, depths=(1, 1), kv_stride=(1, 2, 2))
    params = mvit.init(config, jax.random.key(0))
    mask = optimizer.decayed(params)
    names = {
        "/".join(k.key for k in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(mask)
    }
    decayed = {name for name, value in names.items() if value}
    # Positions, class token and pooling kernels are decayed in every published recipe.
    assert {"positions/class_token", "positions/space", "positions/time"} <= decayed
    assert {"blocks/0/attn/pool_k/kernel", "blocks/1/mlp/fc1/kernel"} <= decayed
    undecayed = names.keys() - decayed
    assert all(n.endswith(("/bias", "/scale")) for n in undecayed)
    assert {"norm/scale", "patch_embed/proj/bias", "blocks/0/attn/pool_k/norm/scale"} <= undecayed


def test_ten_steps_equal_adamw_written_out():
    """AdamW (Loshchilov & Hutter 2019) after clipping to a global norm, in float64 numpy."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=4)}
        gradients = [{k: random.normal(size=v.shape) for k, v in params.items()} for _ in range(10)]
        rates = np.linspace(1e-2, 1e-3, 10)
        transform = optimizer.adamw(
            lambda step: jnp.asarray(rates)[step], weight_decay=0.1, clip_norm=1.5
        )
        ours = jax.tree.map(jnp.asarray, params)
        state = transform.init(ours)
        for gradient in gradients:
            updates, state = transform.update(jax.tree.map(jnp.asarray, gradient), state, ours)
            ours = jax.tree.map(jnp.add, ours, updates)

        m = {k: np.zeros_like(v) for k, v in params.items()}
        v2 = {k: np.zeros_like(v) for k, v in params.items()}
        clipped = 0
        for step, gradient in enumerate(gradients):
            norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
            clipped += norm > 1.5
            for k in params:
                g = gradient[k] * min(1, 1.5 / norm)
                m[k] = 0.9 * m[k] + 0.1 * g
                v2[k] = 0.999 * v2[k] + 0.001 * g**2
                step_m = m[k] / (1 - 0.9 ** (step + 1))
                step_v = v2[k] / (1 - 0.999 ** (step + 1))
                decay = 0.1 * params[k] if k == "kernel" else 0
                params[k] = params[k] - rates[step] * (step_m / (np.sqrt(step_v) + 1e-8) + decay)
        assert clipped > 0
        for k in params:
            np.testing.assert_allclose(ours[k], params[k], rtol=0, atol=1e-9)
