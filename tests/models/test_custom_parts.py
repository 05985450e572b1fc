"""Custom blocks, attentions and poolings, scanned and rematerialised as accelerators run them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.models import mvit
from mvit_jax.models.mvit import Block, MViT, PooledAttention
from mvit_jax.models.ops import pooling
from mvit_jax.models.ops.attention import join_heads, on_grid, split_heads
from mvit_jax.models.plan import MViTConfig, Pool

# Three blocks with equal plans, whose drop path rates differ.
CONFIG = MViTConfig(
    frames=2, size=8, width=4, depths=(3,), num_classes=3, kv_stride=(1, 2, 2), drop_path=0.4
)
CLIP = np.random.default_rng(0).standard_normal((2, 2, 8, 8, 3))


class Mixing(nnx.Module):
    """In the place of attention: a linear layer of the mean token."""

    def __init__(self, plan, *, pool, dtype, rngs):
        self.plan = plan
        self.mix = nnx.Linear(plan.width, plan.attention_width, dtype=dtype, rngs=rngs)

    def __call__(self, x, grid):
        if self.plan.q_pool is not None:
            grid = self.plan.q_pool.output(grid)
        mean = self.mix(x.mean(1, keepdims=True))
        return jnp.broadcast_to(mean, (x.shape[0], 1 + math.prod(grid), mean.shape[-1])), grid


class LinearAttention(PooledAttention):
    def attend(self, q, k, v, relative, record):
        q, k, v = (split_heads(x, self.plan.heads) for x in (q, k, v))
        q, k = nnx.elu(q) + 1, nnx.elu(k) + 1
        weights = jnp.einsum("bqhd,bhd->bqh", q, k.sum(1))
        y = jnp.einsum("bqhd,bhde->bqhe", q, jnp.einsum("bkhd,bkhe->bhde", k, v))
        return join_heads(y / weights[..., None])


class Doubling(Block):
    def __call__(self, x, grid, key=None):
        x, grid = super().__call__(x, grid, key)
        return 2 * x, grid


class LocalBlock(nnx.Module):
    """Not a `Block`, though it has one: no `attn`, and the drop path rate is a level deeper."""

    def __init__(self, plan, drop_path, **rest):
        self.block = Block(plan, drop_path, **rest)
        self.taps = nnx.Param(jnp.full((1, 3, 3, plan.width), 0.1))

    def __call__(self, x, grid, key=None):
        window, taps = Pool("conv", (1, 3, 3), (1, 1, 1)), self.taps[...].astype(x.dtype)
        x, _ = on_grid(lambda tokens: tokens + pooling.pool(tokens, window, taps), x, grid)
        return self.block(x, grid, key)


def forgetful_pool(grid, plan, weight):
    return 0 * pooling.pool(grid, plan, weight) + 1


class Deciding(Block):
    """Decides in Python on its rate, which must therefore stay a number."""

    def __call__(self, x, grid, key=None):
        x, grid = super().__call__(x, grid, key)
        return (x + 1 if self.drop_path > 0.2 else x), grid


class Numbered(Block):
    """Differs from block to block by more than its weights."""

    made = 0

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self.number, Numbered.made = Numbered.made % 3, Numbered.made + 1

    def __call__(self, x, grid, key=None):
        x, grid = super().__call__(x, grid, key)
        return x * (1 + self.number), grid


class Turning(Block):
    """Returns tokens of the same number on another grid."""

    def __call__(self, x, grid, key=None):
        t, h, w = grid
        x, _ = super().__call__(x, grid, key)
        return x, (h, t, w)


class Counting(Block):
    """Has state besides weights, which a loop would not update."""

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x, grid, key=None):
        self.calls[...] += 1
        x, grid = super().__call__(x, grid, key)
        return x * self.calls[...], grid


class Cached(Block):
    """Uses its rate in ways that no array allows."""

    def __call__(self, x, grid, key=None):
        x, grid = super().__call__(x, grid, key)
        return x * float(np.sqrt(1 - self.drop_path)) * {self.drop_path: 1.0}[self.drop_path], grid


class Property(nnx.Module):
    """A block whose rate cannot be set."""

    def __init__(self, plan, drop_path, **rest):
        self.inner, self.rate = Block(plan, drop_path, **rest), drop_path

    @property
    def drop_path(self):
        return self.rate

    def __call__(self, x, grid, key=None):
        return self.inner(x, grid, key)


def plain_block(plan, drop_path, **rest):
    """A block without weights that is no module: the same function at every place."""
    return double


def double(x, grid, key=None):
    return 2 * x, grid


class Widening(Block):
    """Returns float32 whatever it gets, as a part that ignores `dtype` does."""

    def __call__(self, x, grid, key=None):
        x, grid = super().__call__(x, grid, key)
        return x.astype(jnp.float32), grid


LOOPED = {
    "ours": {},
    "attention": {"attention": Mixing},
    "attention derived from ours": {"attention": LinearAttention},
    "block derived from ours": {"block": Doubling},
    "block": {"block": LocalBlock},
    "pool": {"pool": forgetful_pool},
    "pool that wraps ours": {"pool": functools.partial(pooling.pool)},
}
NOT_LOOPED = {
    "block that reads its rate": {"block": Deciding},
    "blocks that differ": {"block": Numbered},
    "block that turns the grid": {"block": Turning},
    "block that uses its rate as a number": {"block": Cached},
    "block with a property": {"block": Property},
    "block that is a function": {"block": plain_block},
}


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def nightly(value):
    return pytest.param(value, marks=pytest.mark.nightly)


WAYS = [
    {"scan": True, "remat": "blocks"},
    *(slow(way) for way in ({"scan": True}, {"remat": "blocks"}, {"scan": True, "remat": "cheap"})),
]


@functools.lru_cache
def weights(name):
    """Weights of which none is zero or one, and a program's value and gradients with them."""
    parts = (LOOPED | NOT_LOOPED)[name]
    abstract = jax.eval_shape(lambda: mvit.init(CONFIG, jax.random.key(0), **parts))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape) + (len(x.shape) == 1)), abstract
    )
    return params, jax.jit(jax.value_and_grad(loss(name)))(params)


def loss(name, **way):
    parts = (LOOPED | NOT_LOOPED)[name]
    training = {"train": True, "key": jax.random.key(3)}

    def run(params):
        clip = jnp.asarray(CLIP)
        options = {"config": CONFIG, "dtype": clip.dtype} | training | way | parts
        logits, _ = mvit.apply(params, clip, **options)
        return (logits * jnp.arange(1.0, 4)[None]).sum()

    return run


QUICK = ("attention", "block", "pool")
MORE = ("attention derived from ours", "block that reads its rate", "blocks that differ")
NAMES = [
    name if name in QUICK else slow(name) if name in MORE else nightly(name)
    for name in LOOPED | NOT_LOOPED
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_custom_parts_train_alike_however_blocks_are_run(name, way):
    with jax.enable_x64(True):
        params, expected = weights(name)
        ours = jax.jit(jax.value_and_grad(loss(name, **way)))(params)
        for mine, plain in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            np.testing.assert_allclose(mine, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOOPED | NOT_LOOPED)
def test_custom_parts_are_scanned_and_lowered_for_accelerators(name):
    parts = (LOOPED | NOT_LOOPED)[name]
    params = jax.eval_shape(lambda: mvit.init(CONFIG, jax.random.key(0), **parts))
    traced = jax.jit(jax.grad(loss(name, scan=True, remat="blocks"))).trace(params)
    assert ("length=3" in str(traced.jaxpr)) == (name in LOOPED)
    for platform in ("tpu", "cuda"):
        assert "func.func" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_state_besides_weights_is_updated_where_blocks_are_scanned():
    for scan in (False, True):
        model = MViT(CONFIG, rngs=nnx.Rngs(0), block=Counting)
        run = nnx.jit(functools.partial(MViT.forward, scan=scan))
        for _ in range(2):
            run(model, jnp.array(CLIP, jnp.float32))
        assert [float(block.calls[...]) for block in model.blocks] == [2, 2, 2]


def test_a_block_that_changes_the_dtype_is_looped_over_where_it_no_longer_does():
    """In bfloat16 the first of three equal blocks widens its tokens, the others keep float32."""
    clip = jnp.array(CLIP, jnp.float32)
    params = jax.jit(lambda: mvit.init(CONFIG, jax.random.key(0), block=Widening))()
    options = {"config": CONFIG, "block": Widening, "dtype": jnp.bfloat16}
    plain, looped = (
        jax.jit(functools.partial(mvit.apply, **options, scan=scan)).trace(params, clip)
        for scan in (False, True)
    )
    assert "length=2" in str(looped.jaxpr) and "length=3" not in str(looped.jaxpr)
    (ours, _), (theirs, _) = (traced.lower().compile()(params, clip) for traced in (looped, plain))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2 * np.std(theirs))


@pytest.mark.parametrize(
    "name", ["attention", *(slow(name) for name in ("block derived from ours", "pool"))]
)
def test_custom_parts_go_into_the_module_and_into_the_functions(name):
    parts = LOOPED[name]
    params = jax.jit(lambda: mvit.init(CONFIG, jax.random.key(0), **parts))()
    model = mvit.from_params(params, CONFIG, **parts)
    clip = jnp.array(CLIP, jnp.float32)
    logits = jax.jit(model)(clip)
    pure, _ = jax.jit(functools.partial(mvit.apply, config=CONFIG, **parts))(params, clip)
    np.testing.assert_array_equal(logits, pure)
    fresh = jax.eval_shape(lambda: MViT(CONFIG, rngs=nnx.Rngs(0), **parts))
    assert jax.tree.structure(mvit.params_of(fresh)) == jax.tree.structure(params)
    if "attention" in parts:
        assert params["blocks"]["0"]["attn"].keys() == {"mix"}
    else:
        ours, _ = jax.jit(functools.partial(mvit.apply, config=CONFIG))(params, clip)
        assert np.abs(logits - ours).max() > 1e-3
