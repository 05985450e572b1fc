"""MViT: the modules that people read and replace, and the pure form that programs use.

Top to bottom, as a clip goes: `MViT` -> `CubeEmbedding` -> `Positions` -> `Block`s (each a
`PooledAttention` and an `Mlp`) -> norm -> `ClassificationHead`. What each block does is in its
`BlockPlan`; nothing here decides on strides or widths.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Shaped

from mvit_jax.common.errors import UserError
from mvit_jax.models import run_blocks
from mvit_jax.models.activations import gelu
from mvit_jax.models.heads import INITIAL_STD, ClassificationHead
from mvit_jax.models.layers import LayerNorm
from mvit_jax.models.ops import pooling
from mvit_jax.models.ops.attention import (
    Record,
    Tokens,
    attend,
    join_heads,
    keep,
    on_grid,
    relative_features,
    split_heads,
)
from mvit_jax.models.ops.dispatch import keep_batch_sharded
from mvit_jax.models.ops.patch_conv import convolve
from mvit_jax.models.plan import (
    BlockPlan,
    MViTConfig,
    Pool,
    Triple,
    drop_path_rates,
    grids,
    plan,
)
from mvit_jax.models.positions import Positions, RelativePositions
from mvit_jax.models.run_blocks import draw_clips, drop_clips
from mvit_jax.models.trees import Params, first_difference, flat
from mvit_jax.models.variants import variant

PoolFunction = Callable[[Array, Pool, Array | None], Array]

_linear_init = nnx.initializers.truncated_normal(INITIAL_STD)
# What PyTorch gives a convolution, weight and bias alike: uniform within 1 / sqrt(fan in).
_conv_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, use_bias=bias, kernel_init=_linear_init, dtype=dtype, rngs=rngs
    )


def _columns(linear: nnx.Linear, x: Array, columns: slice) -> Array:
    """Some of the channels that a linear layer gives."""
    kernel = linear.kernel[...][:, columns].astype(linear.dtype)
    y = x @ kernel
    if linear.bias is None:
        return y
    return y + jnp.expand_dims(linear.bias[...][columns].astype(linear.dtype), range(x.ndim - 1))


def _norm(width: int, dtype, eps: float = 1e-6) -> LayerNorm:
    return LayerNorm(width, eps=eps, dtype=dtype)


class MViT(nnx.Module):
    """A Multiscale Vision Transformer.

    `block`, `attention` and `pool` are where a variant of your own is plugged in: classes (or any
    callables) with the signatures of `Block` and `PooledAttention`, and a function with that of
    `pooling.pool`; `None` means ours. Parameters are float32; the model computes in `dtype`.
    """

    def __init__(
        self,
        config: MViTConfig,
        *,
        rngs: nnx.Rngs,
        block: Callable[..., Any] | None = None,
        attention: Callable[..., Any] | None = None,
        pool: PoolFunction | None = None,
        dtype=jnp.float32,
    ) -> None:
        block, attention = block or Block, attention or PooledAttention
        blocks = plan(config)
        self.config = config
        self.patch_embed = CubeEmbedding(config, dtype=dtype, rngs=rngs)
        self.positions = Positions(config, dtype=dtype, rngs=rngs)
        if config.stem_norm:
            self.stem_norm = _norm(config.width, dtype)
        self.blocks = nnx.List(
            block(p, rate, attention=attention, pool=pool, dtype=dtype, rngs=rngs)
            for p, rate in zip(blocks, drop_path_rates(config), strict=True)
        )
        self.norm = _norm(blocks[-1].width_out, dtype)
        self.head = ClassificationHead(config, blocks[-1].width_out, dtype=dtype, rngs=rngs)

    def __call__(self, clip: Shaped[Array, "..."]) -> Float[Array, "batch num_classes"]:
        """Logits of normalised clips `[batch, T, H, W, 3]`, or images `[batch, H, W, 3]`.

        T, H and W may be any that leave a token; positions are interpolated.
        """
        return self.forward(clip)[0]

    def forward(
        self,
        clip: Shaped[Array, "..."],
        *,
        key: Array | None = None,
        capture: bool = False,
        scan: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "batch num_classes"], dict[str, Any]]:
        """Logits and features. With a `key`, drop path and dropout are on, as in training.

        Features: "stages", a list of the grids `[batch, T, H, W, channels]` after each stage, and
        "tokens", the normalised tokens that the head reads. With `capture`, lists with an entry for
        each block besides: "attention", the probabilities `[batch, heads, queries, keys]`, float32;
        "queries", "keys" and "values", `[batch, tokens, heads, channels of a head]`, as they meet:
        pooled and normalised, class token first where there is one, and not yet scaled. What is not
        used is not computed under `jit`, so take only what you need out of the jitted function.

        `scan` and `remat` are how the blocks are run, see `models/run_blocks.py`; with `capture`,
        none are looped over.
        """
        keys = run_blocks.fold(key, len(self.blocks) + 1)
        x, grid = self.embed(clip)
        x, grid, after, records = run_blocks.run(
            list(self.blocks), plan(self.config), x, grid, keys,
            capture=capture, scan=scan, remat=remat,
        )  # fmt: skip
        logits, tokens = self.classify(x, grid, keys[-1])
        names = [n for n in records[0] if all(n in record for record in records)] if capture else []
        captured = {name: [record[name] for record in records] for name in names}
        return logits, {"stages": after, "tokens": tokens} | captured

    def embed(self, clip: Shaped[Array, "..."]) -> tuple[Tokens, Triple]:
        """What the first block takes: tokens with their positions, and the grid they lie on."""
        embedded = self.patch_embed(_as_video(clip, self.config))
        t, h, w = embedded.shape[1:4]
        x = self.positions(embedded)
        if self.config.stem_norm:
            x = self.stem_norm(x)
        return keep_batch_sharded(x), (t, h, w)

    def classify(
        self, x: Tokens, grid: Triple, key: Array | None = None
    ) -> tuple[Float[Array, "batch num_classes"], Tokens]:
        """Logits from what the last block gives, and the normalised tokens."""
        tokens = self.norm(x)
        return self.head(self._pooled(x, tokens, grid), key), tokens

    def _pooled(self, x: Tokens, tokens: Tokens, grid: Triple) -> Float[Array, "batch channels"]:
        """What the head reads: the class token, or the mean of all tokens where there is none."""
        if self.config.mean_pooling:
            return self.norm(x[:, x.shape[1] - math.prod(grid) :].mean(1))
        return tokens[:, 0] if self.config.class_token else tokens.mean(1)


class CubeEmbedding(nnx.Module):
    """A strided convolution turns cubes of pixels into tokens, overlapping in all but the ViT."""

    def __init__(self, config: MViTConfig, *, dtype, rngs: nnx.Rngs) -> None:
        self.stride, self.padding = config.patch_stride, config.patch_padding
        self.dtype = dtype
        fan_in = 3 * math.prod(config.patch_kernel)
        bound = fan_in**-0.5
        self.proj = nnx.Conv(
            3,
            config.width,
            config.patch_kernel,
            strides=config.patch_stride,
            padding=[(p, p) for p in config.patch_padding],
            kernel_init=_conv_init,
            bias_init=lambda key, shape, dtype: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, clip: Float[Array, "batch T H W 3"]
    ) -> Float[Array, "batch time height width channels"]:
        assert self.proj.bias is not None
        clip, kernel, bias = (
            x.astype(self.dtype) for x in (clip, self.proj.kernel[...], self.proj.bias[...])
        )
        grid = jnp.asarray(convolve(clip, kernel, self.stride, self.padding))
        return grid + bias.reshape(1, 1, 1, 1, -1)


class Block(nnx.Module):
    """Pre-norm transformer block whose attention, and with it the skip, may shrink the grid."""

    def __init__(
        self,
        plan: BlockPlan,
        drop_path: float,
        *,
        attention: Callable[..., Any],
        pool: PoolFunction | None,
        dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.plan, self.drop_path = plan, drop_path
        self.norm1 = _norm(plan.width, dtype)
        self.attn = attention(plan, pool=pool, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(plan.attention_width, dtype)
        self.mlp = Mlp(plan, dtype=dtype, rngs=rngs)
        if plan.width_out != plan.width and plan.skip != "none":
            self.proj = _linear(plan.width, plan.width_out, dtype, rngs)

    def __call__(
        self, x: Tokens, grid: Triple, key: Array | None = None, record: Record | None = None
    ) -> tuple[Tokens, Triple]:
        """Tokens on `grid` to tokens on the grid that comes back; a `key` turns drop path on.

        A `record` is passed on to the attention, which may be one that takes none.
        """
        kept = draw_clips(key, self.drop_path, x.shape[0])
        y = self.norm1(x)
        attended, grid_out = self.attn(y, grid, **({} if record is None else {"record": record}))
        skip = self._skip(x, y, self.plan.attention_width)
        if self.plan.skip_pool is not None:
            skip_pool = functools.partial(pooling.max_pool, plan=self.plan.skip_pool)
            skip, _ = on_grid(skip_pool, skip, grid)
        x = keep(skip + drop_clips(attended, self.drop_path, kept[0]))
        y = self.norm2(x)
        mlp = drop_clips(self.mlp(y), self.drop_path, kept[1])
        return self._skip(x, y, self.plan.width_out) + mlp, grid_out

    def _skip(self, x: Tokens, normalised: Tokens, width: int) -> Tokens:
        """Where the width changes, the skip is a linear layer of the *normalised* tensor: 2.6
        points better than of the tensor itself (MViT, Table A.1)."""
        if x.shape[-1] == width:
            return x
        if self.plan.skip == "none":
            return jnp.zeros((*x.shape[:2], width), x.dtype)
        return self.proj(normalised if self.plan.skip == "normalised" else x)


class PooledAttention(nnx.Module):
    """Q, K and V are projected, pooled on the grid, normalised, and attend (MViT, section 3.1).

    With `pool_first` they are pooled first, the input each time, and then projected.
    """

    def __init__(
        self, plan: BlockPlan, *, pool: PoolFunction | None = None, dtype, rngs: nnx.Rngs
    ) -> None:
        self.plan, self.pool = plan, pool
        width = plan.attention_width
        if plan.separate_qkv:
            self.q = _linear(plan.width, width, dtype, rngs, plan.qkv_bias)
            self.k = _linear(plan.width, width, dtype, rngs, plan.qkv_bias)
            self.v = _linear(plan.width, width, dtype, rngs, plan.qkv_bias)
        else:
            self.qkv = _linear(plan.width, 3 * width, dtype, rngs, plan.qkv_bias)
        self.pool_q = _pool_weights(plan, plan.q_pool, dtype, rngs)
        self.pool_k = _pool_weights(plan, plan.kv_pool, dtype, rngs)
        self.pool_v = _pool_weights(plan, plan.kv_pool, dtype, rngs)
        if plan.relative_time or plan.relative_space:
            self.relative = RelativePositions(plan, dtype=dtype, rngs=rngs)
        self.proj = _linear(width, width, dtype, rngs)

    def __call__(
        self, x: Tokens, grid: Triple, record: Record | None = None
    ) -> tuple[Tokens, Triple]:
        """Tokens on `grid` to tokens on the grid of the pooled queries.

        A `record` gets what `MViT.forward` captures.
        """
        plan = self.plan
        q, kv = (x, jnp.concatenate([x, x], -1)) if plan.pool_first else self._project(x)
        q, kv = keep(q), keep(kv)
        q, query_grid = self._pool(q, grid, plan.q_pool, [self.pool_q])
        kv, key_grid = self._pool(kv, grid, plan.kv_pool, [self.pool_k, self.pool_v])
        k, v = jnp.split(kv, 2, axis=-1)
        if plan.pool_first:
            q, k, v = self.q(q), self.k(k), self.v(v)
        relative = None
        if hasattr(self, "relative"):
            tables = self.relative(query_grid, key_grid)
            relative = relative_features(q, tables, query_grid, key_grid, plan.heads)
        if record is not None:
            for name, tokens in (("queries", q), ("keys", k), ("values", v)):
                record[name] = split_heads(tokens, plan.heads)
        y = keep(self.attend(q, k, v, relative, record))
        if plan.residual_pool != "none":
            y = y + self._residual(q, query_grid)
        return self.proj(y), query_grid

    def attend(self, q: Tokens, k: Tokens, v: Tokens, relative, record: Record | None) -> Tokens:
        """What pooled queries make of pooled keys and values: the place for another attention."""
        return attend(q, k, v, self.plan.heads, relative, record)

    def _project(self, x: Tokens) -> tuple[Tokens, Tokens]:
        """Q; and K and V side by side, since they are pooled together."""
        if self.plan.separate_qkv:
            return self.q(x), jnp.concatenate([self.k(x), self.v(x)], axis=-1)
        # Channels of the fused projection: all of Q, then all of K, then all of V. Its weights are
        # cut, not its result, which would be copied.
        width = self.plan.attention_width
        return _columns(self.qkv, x, slice(None, width)), _columns(self.qkv, x, slice(width, None))

    def _pool(
        self, x: Tokens, grid: Triple, pool_plan: Pool | None, weights: "list[PoolWeights | None]"
    ) -> tuple[Tokens, Triple]:
        """Pools Q, or K and V side by side in one go, each part with its own weights.

        The class token is not pooled, but normalised like every other one.
        """
        if pool_plan is None:
            return x, grid
        own = [part for part in weights if part is not None]
        width = self.plan.pooled_width
        taps = jnp.concatenate([part.taps(width) for part in own], axis=-1) if own else None
        due = pool_plan.output(grid)
        pool = self.pool
        if pool is None:
            x, grid = pooling.pool_tokens(x, grid, pool_plan, taps)
        else:
            x, grid = on_grid(lambda tokens: pool(tokens, pool_plan, taps), x, grid)
        if grid != due:
            raise UserError(f"the pool gives a grid of {grid} where {due} is due: see {pool_plan}")
        x = keep(x)
        if own:
            parts = jnp.split(x, len(own), axis=-1)
            normed = [w.normalise(p) for w, p in zip(own, parts, strict=True)]
            x = jnp.concatenate(normed, axis=-1)
        return x, grid

    def _residual(self, q: Tokens, grid: Triple) -> Tokens:
        """The pooled queries, with zeros for the class token where it takes no part."""
        first = q.shape[1] - math.prod(grid)
        if first == 0 or self.plan.residual_pool == "all":
            return q
        return jnp.pad(q[:, first:], [(0, 0), (first, 0), (0, 0)])


class PoolWeights(nnx.Module):
    """Taps of one pooling convolution, shared by all heads, and the norm that follows it."""

    def __init__(self, kernel, dim: int, eps: float, *, dtype, rngs: nnx.Rngs) -> None:
        # [kt, kh, kw, 1, dim] for the initialiser's fan in: one input channel per group.
        shape = (*kernel, 1, dim)
        self.kernel = nnx.Param(_conv_init(rngs.params(), shape, jnp.float32).squeeze(3))
        self.norm = _norm(dim, dtype, eps)
        self.dtype, self.dim = dtype, dim

    def taps(self, width: int) -> Float[Array, "kt kh kw channels"]:
        return jnp.tile(self.kernel[...].astype(self.dtype), width // self.dim)

    def normalise(self, x: Tokens) -> Tokens:
        return join_heads(self.norm(split_heads(x, x.shape[-1] // self.dim)))


def _pool_weights(plan: BlockPlan, pool: Pool | None, dtype, rngs: nnx.Rngs) -> PoolWeights | None:
    """Maximum and average have no weights, and no norm follows them (reference code)."""
    if pool is None or pool.mode in ("max", "avg"):
        return None
    dim = plan.pool_dim(pool)
    return PoolWeights(pool.kernel, dim, plan.pool_norm_eps, dtype=dtype, rngs=rngs)


class Mlp(nnx.Module):
    """Linear, exact GELU, linear; MViT's last one of a stage doubles the channels (section 3.2)."""

    def __init__(self, plan: BlockPlan, *, dtype, rngs: nnx.Rngs) -> None:
        self.fc1 = _linear(plan.attention_width, plan.mlp_width, dtype, rngs)
        self.fc2 = _linear(plan.mlp_width, plan.width_out, dtype, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(gelu(keep(self.fc1(x))))


def create_model(
    name: str,
    *,
    rngs: nnx.Rngs,
    dtype=jnp.float32,
    block=None,
    attention=None,
    pool: PoolFunction | None = None,
    **overrides: Any,
) -> MViT:
    """A published variant with fresh weights, in inference mode.

    `create_model("mvit_b_16x4", num_classes=10, rngs=nnx.Rngs(0))`; any field of `MViTConfig` can
    be overridden, and `block`, `attention`, `pool` replaced (see `MViT`).
    """
    config = variant(name, **overrides)
    return MViT(config, rngs=rngs, dtype=dtype, block=block, attention=attention, pool=pool)


# The pure form: parameters are a nested dict with string keys, `params["blocks"]["3"]["attn"]`.


def init(config: MViTConfig, key: Array, **plugs: Any) -> Params:
    """Fresh float32 parameters. `plugs` are the `block`, `attention`, `pool` of `MViT`."""
    return params_of(MViT(config, rngs=_Keys(key), **plugs))


def apply(
    params: Params,
    clip: Shaped[Array, "..."],
    *,
    config: MViTConfig,
    train: bool = False,
    key: Array | None = None,
    capture: bool = False,
    scan: bool = False,
    remat: str = "none",
    dtype=jnp.float32,
    **plugs: Any,
) -> tuple[Float[Array, "batch num_classes"], dict[str, Any]]:
    """Logits and features (see `MViT.forward`) of normalised clips, computed in `dtype`.

    With `train=True`, drop path and dropout draw from `key`, block i from `fold_in(key, i)`. With
    `capture=True`, features hold attention probabilities and pooled queries, keys and values too.
    `scan` makes equal blocks one loop, which compiles faster, and `remat` ("none", "cheap",
    "first_stage", "blocks") trades arithmetic for memory in training; neither changes results.
    """
    if train and key is None:
        raise ValueError("apply(train=True) needs a key for drop path and dropout")
    model = _with_params(params, config, dtype, tuple(sorted(plugs.items())))
    return model.forward(clip, key=key if train else None, capture=capture, scan=scan, remat=remat)


def params_of(model: nnx.Module) -> Params:
    """The parameters of a module as a nested dict with string keys, sharing its arrays."""
    return _string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def from_params(params: Params, config: MViTConfig, dtype=jnp.float32, **plugs: Any) -> MViT:
    """The module with these parameters; a `UserError` where they are of another architecture."""
    return _with_params(params, config, dtype, tuple(sorted(plugs.items())))


def shapes(config: MViTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path, "blocks/3/attn/qkv/kernel"."""
    _, abstract = _structure(config, jnp.float32, ())
    tree = _string_keys(nnx.to_pure_dict(abstract))
    return {path: tuple(leaf.shape) for path, leaf in flat(tree).items()}


class _Keys(nnx.Rngs):
    """The keys of `nnx.Rngs(params=key)`, the same ones, counted in Python.

    The counter of `nnx.Rngs` is an array: under a trace each draw takes longer than the one before,
    two minutes in all for the shapes of MViTv2-H (flax 0.12.8).
    """

    def __init__(self, key: Array) -> None:
        draws = (jax.random.fold_in(key, count) for count in itertools.count())
        self.params = nnx.static(functools.partial(next, draws))


@functools.lru_cache(maxsize=64)
def _structure(config: MViTConfig, dtype, plugs: tuple):
    model = nnx.eval_shape(
        lambda: MViT(config, rngs=_Keys(jax.random.key(0)), dtype=dtype, **dict(plugs))
    )
    return nnx.split(model)


def _with_params(params: Params, config: MViTConfig, dtype, plugs: tuple) -> MViT:
    graphdef, abstract = _structure(config, dtype, plugs)
    difference = first_difference(_string_keys(nnx.to_pure_dict(abstract)), params)
    if difference:
        raise UserError(f"these parameters are of another architecture: {difference}")
    state = jax.tree.map(lambda x: x, abstract)  # a copy: replacing is in place
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
    return nnx.merge(graphdef, state)


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(k): _string_keys(v) for k, v in tree.items()}


def _as_video(clip: Array, config: MViTConfig) -> Array:
    given = list(clip.shape)
    if clip.ndim == 4 and config.frames == 1:
        clip = rearrange(clip, "batch height width rgb -> batch 1 height width rgb")
    if clip.ndim != 5 or clip.shape[-1] != 3:
        what = "[batch, H, W, 3] images" if config.frames == 1 else "[batch, T, H, W, 3] clips"
        raise UserError(f"the model takes {what}; this input has shape {given}")
    grids(config, *clip.shape[1:4])
    if not jnp.issubdtype(clip.dtype, jnp.floating):
        raise UserError(
            f"the model takes normalised floating-point clips; this input has {clip.dtype}: "
            "divide by 255, then subtract the mean and divide by the deviation"
        )
    return clip
