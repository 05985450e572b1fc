"""The handle: reference operations with forward-mode derivatives, and counted costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.models.cost import cost
from mvit_jax.models.functional import functional
from mvit_jax.models.mvit import Block
from mvit_jax.models.plan import MViTConfig
from tests.support import drawn
from tests.support.marks import slow

V1 = MViTConfig(
    frames=2, size=8, num_classes=3, width=4, depths=(1, 1), kv_stride=(1, 2, 2),
    patch_kernel=(1, 4, 4), patch_stride=(1, 2, 2), patch_padding=(0, 1, 1),
)  # fmt: skip
V2 = dataclasses.replace(
    V1, positions="none", relative_positions="both", residual_pool="grid", full_q_pool=True,
    expand="attention",
)  # fmt: skip
CONFIGS = {
    "v1": V1,
    "v2": V2,
    "max": dataclasses.replace(V1, pool_mode="max"),
    "avg": dataclasses.replace(V1, pool_mode="avg", class_token=False),
}


NAMES = [slow("v1"), "v2", slow("max"), slow("avg")]


@functools.cache
def weights_and_loss(name):
    """Returns weights and a scalar loss of the model."""
    clip = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 8, 8, 3)))
    models = {
        ops: functional(CONFIGS[name], dtype=clip.dtype, ops=ops) for ops in ("auto", "reference")
    }

    def loss(params, ops):
        logits, _ = models[ops].apply(params, clip)
        return jnp.sin(logits * jnp.arange(1.0, 4)[None]).sum()

    return drawn.weights(models["auto"]), loss


def dot(one, other):
    return sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_reference_operations_have_forward_mode_derivatives(name):
    """Compares them in a random direction with reverse mode and with finite differences."""
    with jax.enable_x64(True):
        params, loss = weights_and_loss(name)
        auto, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, "auto")))(params)
        reference = functools.partial(loss, ops="reference")
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params)
        value, slope = jax.jit(lambda p, v: jax.jvp(reference, (p,), (v,)))(params, direction)
        np.testing.assert_allclose(value, auto, rtol=1e-10)
        np.testing.assert_allclose(slope, dot(gradient, direction), rtol=1e-9)
        run, step = jax.jit(reference), 1e-6
        up, down = (
            run(jax.tree.map(lambda x, v, s=sign * step: x + s * v, params, direction))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("name", [slow("v1"), slow("v2"), "max", slow("avg")])
def test_reference_operations_have_a_hessian(name):
    """Compares that of the patch embedding's bias with differences of gradients."""
    with jax.enable_x64(True):
        params, loss = weights_and_loss(name)

        def of_bias(bias, ops):
            proj = params["patch_embed"]["proj"] | {"bias": bias}
            return loss(params | {"patch_embed": {"proj": proj}}, ops)

        bias = params["patch_embed"]["proj"]["bias"]
        hessian = jax.jit(jax.hessian(functools.partial(of_bias, ops="reference")))(bias)
        gradient = jax.jit(jax.grad(functools.partial(of_bias, ops="auto")))
        step = 1e-5
        rows = [
            (gradient(bias + step * row) - gradient(bias - step * row)) / (2 * step)
            for row in np.eye(len(bias))
        ]
        np.testing.assert_allclose(hessian, rows, rtol=1e-4, atol=1e-6 * np.abs(rows).max())
        np.testing.assert_allclose(hessian, hessian.T, rtol=1e-9, atol=1e-9 * np.abs(rows).max())


def test_reference_operations_have_no_custom_gradients_or_kernels():
    for config in (V2, CONFIGS["max"]):
        clip = jax.ShapeDtypeStruct((2, 2, 8, 8, 3), jnp.float32)
        for ops in ("auto", "reference"):
            model = functional(config, ops=ops)
            program = str(jax.make_jaxpr(model.apply)(drawn.shapes(model), clip))
            for word in ("custom_vjp", "platform_index"):
                assert (word in program) == (ops == "auto")


def test_unknown_operations_are_refused():
    with pytest.raises(UserError, match="ops must be one of auto, reference, not 'fast'"):
        functional(V1, ops="fast").init(jax.random.key(0))


class DoubleMLP(Block):
    """A block that adds its MLP twice."""

    def __call__(self, x, grid, key=None, record=None):
        x = super().__call__(x, grid, key, record)
        return x if x.shape[-1] != self.plan.attention_width else x + self.mlp(x)


def test_costs_of_custom_modules_are_counted():
    config = dataclasses.replace(V1, depths=(2,))
    tokens, width = 1 + 2 * 4 * 4, 4
    assert functional(config).cost() == cost(config)
    more = functional(config, block=DoubleMLP).cost().multiply_adds - cost(config).multiply_adds
    assert more == 2 * tokens * 2 * width * 4 * width


@pytest.mark.parametrize("config", [slow(V1), dataclasses.replace(V2, class_token=False)])
def test_features_are_the_heads_input_and_means_over_the_grids(config):
    """Logits are the head's input times its weights; grids are those of all blocks' tokens."""
    model = functional(config)
    params = drawn.weights(model)
    clip = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 8, 8, 3)), jnp.float32)

    @jax.jit  # one program: XLA computes the equal parts once
    def run(params, clip):
        means = [model.features(params, clip, stage=stage) for stage in range(2)]
        return *model.apply(params, clip), model.features(params, clip), means

    logits, captured, features, means = run(params, clip)
    classifier = params["head"]["classifier"]
    assert features.shape == (2, classifier["kernel"].shape[0])
    expected = features @ classifier["kernel"] + classifier["bias"][None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for stage in range(2):
        grid = np.asarray(captured["stages"][stage])
        mean = grid.reshape(2, -1, grid.shape[-1]).mean(1)
        np.testing.assert_allclose(means[stage], mean, atol=1e-6)
    half = functools.partial(functional(config, dtype=jnp.bfloat16).features, stage=0)
    assert jax.eval_shape(half, params, clip.astype(jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(UserError, match="stage 2 must be from 0 to 1: the model has 2"):
        model.features(params, clip, stage=2)
