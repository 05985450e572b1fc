"""The model as flax NNX modules.

In the order of the forward pass: `MViT` -> `CubeEmbedding` -> `Positions` -> `Block`s (each a
`PooledAttention` and an `Mlp`) -> norm -> `ClassificationHead`. Each block reads its strides and
widths from its `BlockPlan`. `functional.py` has the model as pure functions of its parameters.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Shaped

from mvit_jax.common.errors import UserError
from mvit_jax.models import run_blocks
from mvit_jax.models.detection import Boxes, box_features, total_stride
from mvit_jax.models.layers import (
    ClassificationHead,
    LayerNorm,
    apply_drop_path,
    conv_init,
    drop_path_masks,
    fold_keys,
    linear,
)
from mvit_jax.models.ops import dispatch
from mvit_jax.models.ops.attention import (
    KeyFeatures,
    QueryFeatures,
    Record,
    Tokens,
    attend,
    mark_saved,
    relative_features,
    split_heads,
)
from mvit_jax.models.ops.gelu import gelu
from mvit_jax.models.ops.patch_conv import convolve
from mvit_jax.models.plan import BlockPlan, MViTConfig, Pool, Triple, drop_path_rates, grids, plan
from mvit_jax.models.pooling import POOLINGS, MaxPool, apply_pooling, apply_pooling_pair
from mvit_jax.models.positions import Positions, RelativePositions


class MViT(nnx.Module):
    """A Multiscale Vision Transformer.

    `block`, `attention` and `pooling` take custom modules: classes, or other callables, with the
    signatures of `Block`, `PooledAttention` and `ConvPool`. `None` selects the built-in modules.
    Parameters are float32; the model computes in `dtype`. `ops="reference"` selects the reference
    implementation of every operation, which forward-mode differentiation needs.
    """

    def __init__(
        self,
        config: MViTConfig,
        *,
        rngs: nnx.Rngs,
        block: Callable[..., Any] | None = None,
        attention: Callable[..., Any] | None = None,
        pooling: Callable[..., Any] | None = None,
        dtype=jnp.float32,
        ops: str = "auto",
    ) -> None:
        if ops not in dispatch.OPS:
            raise UserError(f"ops must be one of {', '.join(dispatch.OPS)}, not {ops!r}")
        block, attention = block or Block, attention or PooledAttention
        blocks = plan(config)
        self.ops = ops
        self.config = config
        self.patch_embed = CubeEmbedding(config, dtype=dtype, rngs=rngs)
        self.positions = Positions(config, dtype=dtype, rngs=rngs)
        if config.stem_norm:
            self.stem_norm = LayerNorm(config.width, dtype)
        self.blocks = nnx.List(
            block(p, rate, attention=attention, pooling=pooling, dtype=dtype, rngs=rngs)
            for p, rate in zip(blocks, drop_path_rates(config), strict=True)
        )
        self.norm = LayerNorm(blocks[-1].width_out, dtype)
        self.head = ClassificationHead(config, blocks[-1].width_out, dtype=dtype, rngs=rngs)

    def __call__(
        self, clip: Shaped[Array, "..."], boxes: Shaped[Array, "..."] | None = None
    ) -> Float[Array, "batch *boxes num_classes"]:
        """Returns logits of normalised clips `[batch, T, H, W, 3]` or images `[batch, H, W, 3]`.

        With `task="detection"` these are the logits of `boxes [batch, boxes, 4]`; see `forward`.
        T, H and W may differ from the configured sizes, as positional embeddings are interpolated.
        Every block must be left with at least one token (see `plan.smallest_clip`).
        """
        return self.forward(clip, boxes)[0]

    def forward(
        self,
        clip: Shaped[Array, "..."],
        boxes: Shaped[Array, "..."] | None = None,
        *,
        key: Array | None = None,
        capture: bool = False,
        scan: bool = False,
        remat: str = "none",
        frozen_blocks: int = 0,
    ) -> tuple[Float[Array, "batch *boxes num_classes"], dict[str, Any]]:
        """Returns logits and features.

        Args:
          clip: normalised clips `[batch, T, H, W, 3]` or images `[batch, H, W, 3]`.
          boxes: for `task="detection"` alone: x1, y1, x2, y2 of persons at the middle frame, in
            pixels of `clip`. Clips have the same number of boxes; zeros stand for a missing one,
            whose logits the caller ignores.
          key: a PRNG key that turns drop path and dropout on, as in training.
          capture: captures each block's intermediates; turns `scan` off.
          scan: runs identical blocks as one loop, which compiles faster. Results stay the same.
          remat: the rematerialisation policy, one of `run_blocks.REMAT`: trades arithmetic for
            memory in training. Results stay the same.
          frozen_blocks: number of first blocks that the caller does not differentiate. No loop has
            both frozen and trained blocks, as it differentiates the weights of all its blocks.

        Returns:
          The logits and a dict of features. "stages" is a list of the grids
          `[batch, T, H, W, channels]` after each stage. "tokens" are the last block's
          tokens after the final norm, and "pooled" is the vector `[batch, channels]` that the head
          classifies, or the vectors `[batch, boxes, channels]`.

          With `capture`, the dict also has lists with an entry per block. "attention" holds the
          probabilities `[batch, heads, queries, keys]`, float32. "queries", "keys" and "values",
          `[batch, tokens, heads, head dim]`, are taken after pooling and its norm, and before
          scaling. The class token, if any, is the first token.

          Under `jit`, features that the jitted function does not return are not computed.

        Raises:
          UserError: the clips have an unsupported shape or dtype, or boxes are missing or given
            for a model of another task.
        """
        self._check_boxes(clip, boxes)
        options = {"key": key, "capture": capture, "scan": scan, "remat": remat}
        if clip.ndim > 0 and clip.shape[0] == 0:
            return self._forward_none(_as_video(clip, self.config), boxes, options)
        keys = fold_keys(key, len(self.blocks) + 1)
        with self.operations():
            x, grid = self.embed(clip)
            x, after, records = run_blocks.run(
                list(self.blocks), plan(self.config), x, grid, keys,
                capture=capture, scan=scan, remat=remat, frozen_blocks=frozen_blocks,
            )  # fmt: skip
            _, *grid, _ = after[-1].shape
            logits, tokens, pooled = self.classify(x, keys[-1], grid, boxes)
        names = [n for n in records[0] if all(n in record for record in records)] if capture else []
        captured = {name: [record[name] for record in records] for name in names}
        return logits, {"stages": after, "tokens": tokens, "pooled": pooled} | captured

    def _forward_none(
        self,
        clips: Float[Array, "0 T H W 3"],
        boxes: Float[Array, "0 boxes 4"] | None,
        options: dict[str, Any],
    ) -> tuple[Float[Array, "0 *boxes num_classes"], dict[str, Any]]:
        """Returns the empty outputs of `forward` for no clips."""
        # An empty array cannot be reshaped to an inferred length, which many operations do.
        inputs = [clips] if boxes is None else [clips, boxes]
        one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs]
        shapes = jax.eval_shape(lambda *inputs: self.forward(*inputs, **options), *one)
        return jax.tree.map(lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), shapes)

    def operations(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context for calling parts of the model, such as `embed`, directly."""
        return dispatch.operations(self.ops)

    def embed(self, clip: Shaped[Array, "..."]) -> tuple[Tokens, Triple]:
        """Returns the first block's input tokens, with positional embeddings, and their grid."""
        embedded = self.patch_embed(_as_video(clip, self.config))
        t, h, w = embedded.shape[1:4]
        x = self.positions(embedded)
        if self.config.stem_norm:
            x = self.stem_norm(x)
        return dispatch.keep_batch_sharded(x), (t, h, w)

    def classify(
        self,
        x: Tokens,
        key: Array | None = None,
        grid: Sequence[int] = (),
        boxes: Boxes | None = None,
    ) -> tuple[
        Float[Array, "batch *boxes num_classes"], Tokens, Float[Array, "batch *boxes channels"]
    ]:
        """Returns logits of the last block's tokens, normalised tokens, and the head's input.

        Args:
          x: the last block's tokens.
          key: a PRNG key that turns dropout on.
          grid: the grid of `x`; required with `boxes` alone.
          boxes: as for `forward`.
        """
        tokens = self.norm(x)
        if boxes is None:
            pooled = self._representation(x, tokens)
        else:
            t, h, w = grid
            on_grid = run_blocks.unflatten(tokens, (t, h, w))
            pooled = box_features(on_grid, boxes, total_stride(self.config))
        return self.head(pooled, key), tokens, pooled

    def _check_boxes(self, clip: Shaped[Array, "..."], boxes: Shaped[Array, "..."] | None) -> None:
        detects = self.config.task == "detection"
        if detects and boxes is None:
            raise UserError('a model with task="detection" requires boxes [batch, boxes, 4]')
        if not detects and boxes is not None:
            raise UserError('boxes require a model with task="detection"')
        if boxes is not None and (boxes.shape[:1], boxes.shape[2:]) != (clip.shape[:1], (4,)):
            raise UserError(
                f"boxes must have the shape [batch, boxes, 4] with the {clip.shape[0]} clips, not "
                f"{list(boxes.shape)}"
            )

    def _representation(self, x: Tokens, tokens: Tokens) -> Float[Array, "batch channels"]:
        """Returns the vector that the head classifies: the class token or a mean of tokens."""
        if self.config.mean_pooling:
            return self.norm(x[:, int(self.config.class_token) :].mean(1))
        return tokens[:, 0] if self.config.class_token else tokens.mean(1)


class CubeEmbedding(nnx.Module):
    """The cube embedding of clips, or patch embedding of images: a strided convolution."""

    def __init__(self, config: MViTConfig, *, dtype, rngs: nnx.Rngs) -> None:
        self.stride, self.padding = config.patch_stride, config.patch_padding
        self.dtype = dtype
        bound = (3 * math.prod(config.patch_kernel)) ** -0.5  # 1 / sqrt(fan in), as in `conv_init`
        self.proj = nnx.Conv(
            3,
            config.width,
            config.patch_kernel,
            strides=config.patch_stride,
            padding=[(p, p) for p in config.patch_padding],
            kernel_init=conv_init,
            bias_init=functools.partial(jax.random.uniform, minval=-bound, maxval=bound),
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
    """A pre-norm transformer block; its attention and its skip connection may pool the grid.

    A custom block is built by `block(plan, drop_path, attention=, pooling=, dtype=, rngs=)`.
    """

    def __init__(
        self,
        plan: BlockPlan,
        drop_path: float,
        *,
        attention: Callable[..., Any],
        pooling: Callable[..., Any] | None = None,
        dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.plan, self.drop_path = plan, drop_path
        self.norm1 = LayerNorm(plan.width, dtype)
        self.attn = attention(plan, pooling=pooling, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(plan.attention_width, dtype)
        self.mlp = Mlp(plan, dtype=dtype, rngs=rngs)
        if plan.width_out != plan.width and plan.skip != "none":
            self.proj = linear(plan.width, plan.width_out, dtype, rngs)

    def __call__(
        self, x: Tokens, grid: Triple, key: Array | None = None, record: Record | None = None
    ) -> Tokens:
        """Maps tokens on `grid` to tokens on `plan.output(grid)`; a `key` turns drop path on.

        `record` is passed to the attention only if it is not None, as custom attentions may lack
        the argument.
        """
        masks = drop_path_masks(key, self.drop_path, x.shape[0])
        y = self.norm1(x)
        attended = self.attn(y, grid) if record is None else self.attn(y, grid, record=record)
        skip = self._skip(x, y, self.plan.attention_width)
        if self.plan.skip_pool is not None:
            skip = MaxPool(self.plan.skip_pool)(skip, grid)
        x = mark_saved(skip + apply_drop_path(attended, self.drop_path, masks[0]))
        y = self.norm2(x)
        mlp = apply_drop_path(self.mlp(y), self.drop_path, masks[1])
        return self._skip(x, y, self.plan.width_out) + mlp

    def _skip(self, x: Tokens, normalised: Tokens, width: int) -> Tokens:
        """Returns the skip connection with `width` channels.

        Where the width changes, the *normalised* tensor is projected by default. Projecting the
        tensor itself instead lowers top-1 accuracy by 2.6 points (MViT, Table A.1).
        """
        if x.shape[-1] == width:
            return x
        if self.plan.skip == "none":
            return jnp.zeros((*x.shape[:2], width), x.dtype)
        return self.proj(normalised if self.plan.skip == "normalised" else x)


class PooledAttention(nnx.Module):
    """Pooled attention: Q, K and V are projected, pooled and normalised (MViT, section 3.1).

    With `plan.pool_first` the input is pooled first, separately for Q, K and V, then projected. A
    custom attention is built by `attention(plan, pooling=, dtype=, rngs=)`. `pooling` is a class
    like those in `models/pooling.py`; `None` selects the class for the plan's pooling mode.
    """

    def __init__(
        self, plan: BlockPlan, *, pooling: Callable[..., Any] | None = None, dtype, rngs: nnx.Rngs
    ) -> None:
        def pool(part: Pool | None):
            if part is None:
                return None
            return (pooling or POOLINGS[part.mode])(part, plan.pooled_width, dtype=dtype, rngs=rngs)

        self.plan = plan
        width = plan.attention_width
        if plan.separate_qkv:
            self.q = linear(plan.width, width, dtype, rngs, plan.qkv_bias)
            self.k = linear(plan.width, width, dtype, rngs, plan.qkv_bias)
            self.v = linear(plan.width, width, dtype, rngs, plan.qkv_bias)
        else:
            self.qkv = linear(plan.width, 3 * width, dtype, rngs, plan.qkv_bias)
        self.pool_q, self.pool_k, self.pool_v = map(pool, (plan.q_pool, plan.kv_pool, plan.kv_pool))
        if plan.relative_time or plan.relative_space:
            self.relative = RelativePositions(plan, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype, rngs)

    def __call__(self, x: Tokens, grid: Triple, record: Record | None = None) -> Tokens:
        """Maps tokens on `grid` to tokens on the grid of the pooled queries, `plan.output(grid)`.

        `record` is filled with the block's captured intermediates (see `MViT.forward`).
        """
        plan = self.plan
        query_grid, key_grid = plan.output(grid), plan.keys(grid)
        q, k, v = (mark_saved(x),) * 3 if plan.pool_first else self._project(x)
        q = apply_pooling(self.pool_q, plan.q_pool, q, grid)
        k, v = apply_pooling_pair(self.pool_k, self.pool_v, plan.kv_pool, k, v, grid)
        if plan.pool_first:
            q, k, v = self.q(q), self.k(k), self.v(v)
        relative = None
        if hasattr(self, "relative"):
            tables = self.relative(query_grid, key_grid)
            relative = relative_features(q, tables, query_grid, key_grid, plan.heads)
        if record is not None:
            for name, tokens in (("queries", q), ("keys", k), ("values", v)):
                record[name] = split_heads(tokens, plan.heads)
        y = self.attend(
            q, k, v, query_grid=query_grid, key_grid=key_grid, relative=relative, record=record
        )
        y = mark_saved(y)
        if plan.residual_pool != "none":
            y = y + self._residual(q, query_grid)
        return self.proj(y)

    def attend(
        self,
        q: Tokens,
        k: Tokens,
        v: Tokens,
        *,
        query_grid: Triple,
        key_grid: Triple,
        relative: "tuple[QueryFeatures, KeyFeatures] | None" = None,
        record: Record | None = None,
    ) -> Tokens:
        """Returns the attention output of pooled queries, keys and values.

        Override this method to replace the attention operation alone.

        Args:
          q: `[batch, queries, attention_width]`, head-major (see `split_heads`), not scaled.
          k: `[batch, keys, attention_width]`.
          v: shaped like `k`.
          query_grid: (T, H, W) of the queries. If `q.shape[1]` is T * H * W + 1, the first query
            is the class token.
          key_grid: (T, H, W) of keys and values.
          relative: the result of `relative_features`; None without relative positional embeddings.
          record: if not None, the method sets `record["attention"]` to the probabilities
            `[batch, heads, queries, keys]`.
        """
        return attend(q, k, v, self.plan.heads, relative, record)

    def _project(self, x: Tokens) -> tuple[Tokens, Tokens, Tokens]:
        if self.plan.separate_qkv:
            return mark_saved(self.q(x)), mark_saved(self.k(x)), mark_saved(self.v(x))
        # The fused projection's output channels are Q's, then K's, then V's. Slicing the weights
        # avoids copying the output. K and V stay in one tensor and are pooled at once.
        width = self.plan.attention_width
        q, kv = (_columns(self.qkv, x, part) for part in (slice(width), slice(width, None)))
        k, v = jnp.split(mark_saved(kv), 2, axis=-1)
        return mark_saved(q), k, v

    def _residual(self, q: Tokens, grid: Triple) -> Tokens:
        """Returns the queries that residual pooling adds; "grid" excludes the class token's."""
        first = q.shape[1] - math.prod(grid)
        if first == 0 or self.plan.residual_pool == "all":
            return q
        return jnp.pad(q[:, first:], [(0, 0), (first, 0), (0, 0)])


def _columns(linear: nnx.Linear, x: Array, columns: slice) -> Array:
    """Returns the output channels `columns` of a linear layer applied to `x`."""
    kernel = linear.kernel[...][:, columns].astype(linear.dtype)
    y = x @ kernel
    if linear.bias is None:
        return y
    return y + jnp.expand_dims(linear.bias[...][columns].astype(linear.dtype), range(x.ndim - 1))


class Mlp(nnx.Module):
    """Linear, exact GELU, linear; in MViT a stage's last MLP doubles the width (section 3.2)."""

    def __init__(self, plan: BlockPlan, *, dtype, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(plan.attention_width, plan.mlp_width, dtype, rngs)
        self.fc2 = linear(plan.mlp_width, plan.width_out, dtype, rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(gelu(mark_saved(self.fc1(x))))


def _as_video(clip: Array, config: MViTConfig) -> Array:
    shape = list(clip.shape)
    if clip.ndim == 4 and config.frames == 1:
        clip = rearrange(clip, "batch height width rgb -> batch 1 height width rgb")
    if clip.ndim != 5 or clip.shape[-1] != 3:
        expected = "[batch, H, W, 3] images" if config.frames == 1 else "[batch, T, H, W, 3] clips"
        raise UserError(f"the model requires {expected}, but the input has shape {shape}")
    grids(config, *clip.shape[1:4])
    if not jnp.issubdtype(clip.dtype, jnp.floating):
        raise UserError(
            f"the model requires normalised floating-point clips, but the input is {clip.dtype}: "
            "divide by 255, subtract the mean, and divide by the standard deviation"
        )
    return clip
