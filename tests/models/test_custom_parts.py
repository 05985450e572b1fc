"""Custom blocks, attentions and poolings, scanned and rematerialised as accelerators run them."""

import ast
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import functional, params_of
from mvit_jax.models.mvit import Block, MViT
from mvit_jax.models.ops import pooling
from mvit_jax.models.ops.attention import on_grid
from mvit_jax.models.plan import MViTConfig, Pool, plan
from mvit_jax.models.pooling import AvgPool, ConvPool
from tests.support import drawn, tiny
from tests.support.marks import nightly, slow

# Three blocks with equal plans, whose drop path rates differ.
CONFIG = MViTConfig(
    frames=2, size=8, width=4, depths=(3,), num_classes=3, kv_stride=(1, 2, 2), drop_path=0.4,
    pool_kernel=(1, 3, 3),
)  # fmt: skip
CLIP = np.random.default_rng(0).standard_normal((2, 2, 8, 8, 3))


class Mixing(nnx.Module):
    """A replacement of attention: a linear layer of the mean token."""

    def __init__(self, plan, *, pooling, dtype, rngs):
        self.plan = plan
        self.mix = nnx.Linear(plan.width, plan.attention_width, dtype=dtype, rngs=rngs)

    def __call__(self, x, grid):
        tokens = 1 + math.prod(self.plan.output(grid))
        mean = self.mix(x.mean(1, keepdims=True))
        return jnp.broadcast_to(mean, (x.shape[0], tokens, mean.shape[-1]))


class LocalBlock(nnx.Module):
    """A wrapper of `Block`: it has no `attn`, and the drop path rate is a level deeper."""

    def __init__(self, plan, drop_path, **rest):
        self.block = Block(plan, drop_path, **rest)
        self.taps = nnx.Param(jnp.full((1, 3, 3, plan.width), 0.1))

    def __call__(self, x, grid, key=None):
        window, taps = Pool("conv", (1, 3, 3), (1, 1, 1)), self.taps[...].astype(x.dtype)
        x = on_grid(lambda tokens: tokens + pooling.pool(tokens, window, taps), x, grid)
        return self.block(x, grid, key)


class Gated(nnx.Module):
    """A pooling with additional weights, one of them weakly typed."""

    def __init__(self, pool, channels, *, dtype, rngs):
        self.pool = ConvPool(pool, channels, dtype=dtype, rngs=rngs)
        self.gate = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.share = nnx.Param(jnp.full((1, 1, channels), 0.1))

    def __call__(self, tokens, grid):
        gate = nnx.sigmoid(self.gate(tokens.mean(1, keepdims=True)))
        return self.pool(tokens * gate * self.share[...].astype(tokens.dtype), grid)


class MeanSquare(AvgPool):
    """A pooling without weights."""

    def __call__(self, tokens, grid):
        return jnp.sqrt(super().__call__(tokens**2, grid) + 1e-3)


class Deciding(Block):
    """A block that branches in Python on its rate, which must therefore be a float."""

    def __call__(self, x, grid, key=None):
        x = super().__call__(x, grid, key)
        return x + 1 if self.drop_path > 0.2 else x


class Numbered(Block):
    """A block whose instances differ by more than weights."""

    made = 0

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self.number, Numbered.made = Numbered.made % 3, Numbered.made + 1

    def __call__(self, x, grid, key=None):
        return super().__call__(x, grid, key) * (1 + self.number)


class Counting(Block):
    """A block with state besides weights, which a loop would not update."""

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x, grid, key=None):
        self.calls[...] += 1
        return super().__call__(x, grid, key) * self.calls[...]


class Cached(Block):
    """A block that uses its rate as no array can be used."""

    def __call__(self, x, grid, key=None):
        x = super().__call__(x, grid, key)
        return x * float(np.sqrt(1 - self.drop_path)) * {self.drop_path: 1.0}[self.drop_path]


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
    """Returns the same function for every block, without weights."""
    return double


def double(x, grid, key=None):
    return 2 * x


class Widening(Block):
    """A block that returns float32 for any input, as modules that ignore `dtype` do."""

    def __call__(self, x, grid, key=None):
        return super().__call__(x, grid, key).astype(jnp.float32)


def guide():
    """Returns the classes of docs/variants.md."""
    page = (tiny.ROOT / "docs" / "variants.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    kinds = ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef
    # The page imports its classes from the file that it writes.
    code = re.sub(r"^from my_ideas import .*$", "", code, flags=re.MULTILINE)
    nodes = [node for node in ast.parse(code).body if isinstance(node, kinds)]
    namespace = {}
    exec(compile(ast.Module(nodes, []), "variants.md", "exec"), namespace)
    return namespace


GUIDE = guide()
LOOPED = {
    "ours": {},
    "attention": {"attention": Mixing},
    "block": {"block": LocalBlock},
    "pooling": {"pooling": Gated},
    "pooling without weights": {"pooling": MeanSquare},
    "pooling that wraps ours": {"pooling": functools.partial(ConvPool)},
    "guide's block": {"block": GUIDE["LayerScale"]},
    "guide's attention": {"attention": GUIDE["LinearAttention"]},
    "guide's pooling": {"pooling": GUIDE["SqueezeExcite"]},
    "all three": {
        "block": GUIDE["LayerScale"],
        "attention": GUIDE["LocalInTime"],
        "pooling": Gated,
    },
}
NOT_LOOPED = {
    "block that reads its rate": {"block": Deciding},
    "blocks that differ": {"block": Numbered},
    "block that uses its rate as a number": {"block": Cached},
    "block with a property": {"block": Property},
    "block that is a function": {"block": plain_block},
}
MODULES = LOOPED | NOT_LOOPED


WAYS = [
    {"scan": True, "remat": "blocks"},
    slow({"scan": True}),
    *(nightly(way) for way in ({"remat": "blocks"}, {"scan": True, "remat": "cheap"})),
]


@functools.lru_cache
def weights(name):
    """Returns weights, and the loss and gradients with them."""
    params = drawn.weights(functional(CONFIG, **MODULES[name]))
    return params, jax.jit(jax.value_and_grad(loss(name)))(params)


def loss(name, **way):
    def run(params):
        clip = jnp.asarray(CLIP)
        model = functional(CONFIG, dtype=clip.dtype, **MODULES[name])
        logits, _ = model.apply(params, clip, key=jax.random.key(3), **way)
        return (logits * jnp.arange(1.0, 4)[None]).sum()

    return run


QUICK = ("block", "all three")
MORE = (
    "attention", "pooling", "guide's attention", "block that reads its rate", "blocks that differ",
)  # fmt: skip
NAMES = [
    name if name in QUICK else slow(name) if name in MORE else nightly(name) for name in MODULES
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_custom_modules_have_equal_gradients_however_blocks_are_run(name, way):
    with jax.enable_x64(True):
        params, expected = weights(name)
        results = jax.jit(jax.value_and_grad(loss(name, **way)))(params)
        for actual, correct in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
            np.testing.assert_allclose(actual, correct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name if name in (*QUICK, *NOT_LOOPED) else slow(name) for name in MODULES]
)
def test_custom_modules_are_scanned_and_lowered_for_accelerators(name):
    params = drawn.shapes(functional(CONFIG, **MODULES[name]))
    traced = jax.jit(jax.grad(loss(name, scan=True, remat="blocks"))).trace(params)
    assert ("length=3" in str(traced.jaxpr)) == (name in LOOPED)
    for platform in ("tpu", "cuda"):
        assert "func.func" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_state_besides_weights_is_updated_with_scan():
    for scan in (False, True):
        model = MViT(CONFIG, rngs=nnx.Rngs(0), block=Counting)
        run = nnx.jit(functools.partial(MViT.forward, scan=scan))
        for _ in range(2):
            run(model, jnp.array(CLIP, jnp.float32))
        assert [float(block.calls[...]) for block in model.blocks] == [2, 2, 2]


def test_blocks_are_scanned_after_one_that_changes_the_dtype():
    """In bfloat16 the first of three equal blocks casts to float32, the others do not."""
    clip = jnp.array(CLIP, jnp.float32)
    model = functional(CONFIG, block=Widening, dtype=jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0))
    plain, looped = (
        jax.jit(functools.partial(model.apply, scan=scan)).trace(params, clip)
        for scan in (False, True)
    )
    assert "length=2" in str(looped.jaxpr) and "length=3" not in str(looped.jaxpr)
    (scanned, _), (expected, _) = (
        traced.lower().compile()(params, clip) for traced in (looped, plain)
    )
    np.testing.assert_allclose(scanned, expected, rtol=0, atol=2e-2 * np.std(expected))


@pytest.mark.parametrize("name", [slow("ours"), "attention", slow("guide's block"), "pooling"])
def test_custom_modules_are_used_by_the_module_and_the_functions(name):
    model = functional(CONFIG, **LOOPED[name])
    params = drawn.weights(model)
    clip = jnp.array(CLIP, jnp.float32)
    logits = jax.jit(model.module(params))(clip)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, jax.jit(model.apply)(params, clip)[0])
    fresh = jax.eval_shape(lambda: MViT(CONFIG, rngs=nnx.Rngs(0), **LOOPED[name]))
    assert jax.tree.structure(params_of(fresh)) == jax.tree.structure(params)
    attention = params["blocks"]["0"]["attn"]
    if name == "attention":
        assert attention.keys() == {"mix"}
    elif name == "pooling":
        assert attention["pool_k"].keys() == attention["pool_v"].keys() == {"pool", "gate", "share"}


def test_initial_weights_are_not_weakly_typed():
    """An update would make the types strong, and the step would be compiled again."""
    model = functional(CONFIG, block=LocalBlock, pooling=Gated)
    for params in (jax.eval_shape(model.init, jax.random.key(0)), model.init(jax.random.key(0))):
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))


def test_q_k_and_v_have_separate_poolings():
    pools = []

    class Strided(nnx.Module):
        def __init__(self, pool, channels, *, dtype, rngs):
            self.pool = pool
            pools.append((pool, channels))

        def __call__(self, tokens, grid):
            t, h, w = self.pool.stride
            return on_grid(lambda x: x[:, ::t, ::h, ::w], tokens, grid)

    config = dataclasses.replace(CONFIG, depths=(1, 1))
    first, second = plan(config)
    model = functional(config, pooling=Strided)
    params = drawn.shapes(model)
    assert pools == [
        (first.kv_pool, 4), (first.kv_pool, 4),
        (second.q_pool, 8), (second.kv_pool, 8), (second.kv_pool, 8),
    ]  # fmt: skip
    assert not any("pool" in name for name in params["blocks"]["1"]["attn"])
    jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct(CLIP.shape, jnp.float32))


class Losing(Block):
    def __call__(self, x, grid, key=None):
        return super().__call__(x, grid, key)[:, 1:]


class Unpooled(nnx.Module):
    def __init__(self, pool, channels, *, dtype, rngs):
        pass

    def __call__(self, tokens, grid):
        return tokens


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"block": Losing},
            r"block 0 \(Losing\) returns 4 tokens, .* grid \(1, 2, 2\) .* requires 5",
        ),
        ({"pooling": Unpooled}, r"Unpooled returns 5 tokens, .* grid \(1, 1, 1\) requires 2"),
    ],
)
def test_a_wrong_number_of_tokens_is_named(modules, message):
    model = functional(CONFIG, **modules)
    clip = jax.ShapeDtypeStruct(CLIP.shape, jnp.float32)
    for scan in (False, True):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(functools.partial(model.apply, scan=scan), drawn.shapes(model), clip)


def test_equal_handles_share_a_compilation():
    """Handles are static arguments; those of other implementations are not equal."""
    ours, again = (functional(CONFIG, pooling=Gated, dtype=d) for d in ("float32", jnp.float32))
    assert ours == again and hash(ours) == hash(again)
    assert ours != functional(CONFIG, pooling=Gated, ops="reference")
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params, clip):
        traces.append(model)
        return model.apply(params, clip)[0]

    params = drawn.weights(ours)
    for model in (ours, again):
        logits(model, params, jnp.array(CLIP, jnp.float32))
    assert len(traces) == 1
