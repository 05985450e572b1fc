"""The architecture as data: the configuration of each block and the token grid it runs on.

Pure Python without JAX. `plan` implements the papers' rules for stages, channel expansion, pooled
queries, adaptive key/value strides, skip connections and relative positional embeddings:

* MViT, Fan et al. 2021 (arXiv 2104.11227), section 3;
* MViTv2, Li et al. 2022 (arXiv 2112.01526), section 4 and appendix B.1.

`cost.py` counts the parameters and multiply-adds of an architecture, and
`python -m mvit_jax.describe` prints these counts.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import join_sizes

Triple = tuple[int, int, int]  # along time, height, width
KernelRule = Literal["stride", "stride + 1", "2 stride + 1"]


Task = Literal["classification", "detection"]


@dataclass(frozen=True)
class MViTConfig:
    """An architecture. Image models have `frames=1` and kernels and strides of 1 along time.

    Strides and kernels are (time, height, width). Rates are probabilities in [0, 1). `frames` and
    `size` set the sizes of the positional embeddings; a model runs on clips of other sizes too.
    """

    frames: int = 16  # frames per clip
    size: int = 224  # side of the square crop, pixels
    num_classes: int = 400
    # "detection" classifies boxes of a clip (AVA) from the mean of the last grid over time.
    task: Task = "classification"
    patch_kernel: Triple = (3, 7, 7)  # kernel of the patch embedding
    patch_stride: Triple = (2, 4, 4)  # stride of the patch embedding
    patch_padding: Triple = (1, 3, 3)  # zeros on either side of the clip
    class_token: bool = True  # without a class token, the head reads the mean of the tokens
    # Absolute positional embeddings (MViT, Table 11); "sincos" has no parameters (reference code).
    positions: Literal["none", "space", "separate", "joint", "sincos"] = "separate"
    stem_norm: bool = False  # layer norm after the positional embeddings
    width: int = 96  # channels of the first stage
    heads: int = 1  # attention heads of the first stage
    growth: int = 2  # factor of width and heads from stage to stage
    depths: tuple[int, ...] = (1, 2, 11, 2)  # blocks per stage
    # Growth of the width: in the last MLP of a stage (MViT), or in the attention of a stage's first
    # block (MViTv2, appendix B.1).
    expand: Literal["mlp", "attention"] = "mlp"
    # Skip connection where the width grows: a projection of the normalised tensor, of the tensor
    # itself, or no skip connection (MViT, Table A.1).
    skip: Literal["normalised", "plain", "none"] = "normalised"
    mlp_ratio: int = 4  # hidden channels of the MLP, as a multiple of the width
    # "conv" shares its weights between heads; "conv_unshared" does not, and requires pool_first.
    pool_mode: Literal["conv", "conv_unshared", "max", "avg"] = "conv"
    # None selects the papers' kernel: 3x3x3 for convolutions (1x3x3 for images), stride + 1 for
    # "max" and "avg" (MViT, Table 15). A rule such as "stride + 1" applies to each axis with a
    # stride above 1; the kernel is 1 along the other axes.
    pool_kernel: Triple | KernelRule | None = None
    # Pooling kernel of Q in each block. An empty tuple selects pool_kernel.
    q_kernels: tuple[Triple, ...] = ()
    # Pooling kernel of K and V in each block. (1, 1, 1) with stride 1 means no pooling. An empty
    # tuple selects pool_kernel.
    kv_kernels: tuple[Triple, ...] = ()
    q_stride: Triple = (1, 2, 2)  # pooling stride of Q in the first block of stages 2, 3, ...
    full_q_pool: bool = False  # pool queries in every block, also with stride 1 (MViTv2, 4.1)
    kv_stride: Triple = (1, 8, 8)  # pooling stride of K and V in the first stage
    kv_adaptive: bool = True  # divide kv_stride by each q_stride (MViT, section 3.2, Table 14)
    pool_first: bool = False  # pool before the projections to Q, K and V
    pool_norm_eps: float = 1e-6  # epsilon of the norms after pooling; 1e-5 in PyTorchVideo 0.1
    separate_qkv: bool = False  # three linear layers for Q, K and V; implied by pool_first
    qkv_bias: bool = True  # biases of the projections to Q, K and V
    # Decomposed relative positional embeddings (MViTv2, equation 4); "space" means along height and
    # along width.
    relative_positions: Literal["none", "space", "time", "both"] = "none"
    # Library whose order of float32 operations decides how distances are truncated. The order
    # matters only if neither the query grid nor the key grid is a multiple of the other.
    relative_distances: Literal["slowfast", "torchvision"] = "slowfast"
    # Relative positions on a frame that is no square: "stretch" interpolates each axis's embeddings
    # to its length. "clamp" has the shorter axis's distances for both, and repeats the end values
    # beyond them (reference code of MeMViT).
    relative_resize: Literal["stretch", "clamp"] = "stretch"
    # Residual pooling adds the pooled queries to the attention's output (MViTv2, section 4.1):
    # "grid" for all tokens but the class token, "all" for the class token too (timm).
    residual_pool: Literal["none", "grid", "all"] = "none"
    mean_pooling: bool = False  # the head reads the normalised mean of the grid (MaskFeat)
    drop_path: float = 0.2  # rate of the last block; rises linearly from 0 at the first
    dropout: float = 0.5  # dropout rate before the classifier

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Pool:
    """The pooling operator P(.; kernel, stride, padding) on a token grid (MViT, section 3.1).

    Padding is kernel // 2, or 0 with `padded=False`.
    """

    mode: str
    kernel: Triple
    stride: Triple
    padded: bool = True
    heads: int = 1  # heads that share the weights of a convolution and of its norm
    norm_eps: float = 1e-6  # epsilon of the norm after a convolution

    @property
    def padding(self) -> Triple:
        return _triple(k // 2 if self.padded else 0 for k in self.kernel)

    def output(self, grid: Triple) -> Triple:
        """Returns the grid that pooling `grid` results in."""
        return conv_output(grid, self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class BlockPlan:
    """The static description of a block; identical blocks compare equal.

    A pool of `None` means no pooling.
    """

    stage: int  # from 0
    width: int  # channels of the block's input
    attention_width: int  # channels of Q, K, V and the attention's output
    width_out: int  # channels of the block's output
    heads: int
    mlp_width: int
    q_pool: Pool | None
    kv_pool: Pool | None
    skip_pool: Pool | None
    skip: str = "normalised"
    pool_first: bool = False
    separate_qkv: bool = False
    qkv_bias: bool = True
    relative_time: int = 0  # rows of the relative positional embedding along time; 0 for none
    relative_space: int = 0  # likewise along height and along width
    relative_distances: str = "slowfast"
    relative_resize: str = "stretch"
    residual_pool: str = "none"

    @property
    def head_dim(self) -> int:
        return self.attention_width // self.heads

    @property
    def pooled_width(self) -> int:
        """The channels that pooling acts on: of Q, K and V, or of the input with `pool_first`."""
        return self.width if self.pool_first else self.attention_width

    def output(self, grid: Triple) -> Triple:
        """Returns the grid of the block's output and of its queries for an input on `grid`."""
        return self.q_pool.output(grid) if self.q_pool else grid

    def keys(self, grid: Triple) -> Triple:
        """Returns the grid of the block's keys and values for an input on `grid`."""
        return self.kv_pool.output(grid) if self.kv_pool else grid


@dataclass(frozen=True)
class BlockGrids:
    """The token grids (time, height, width) of a block, without the class token."""

    input: Triple
    keys: Triple
    output: Triple  # grid of the output and of the queries


def plan(config: MViTConfig) -> tuple[BlockPlan, ...]:
    """Returns the plans of all blocks, first to last (MViT, Table 2; MViTv2, Table 1)."""
    blocks = []
    kv_stride = config.kv_stride
    # The sizes of relative positional embeddings follow from integer division of the grid. A padded
    # convolution may leave one position more (39 -> 20, not 19); `RelativePositions` interpolates.
    size = (config.frames, config.size, config.size)
    grid = conv_output(size, config.patch_kernel, config.patch_stride, config.patch_padding)
    nominal = _triple(max(n, 1) for n in grid)  # `_check` rejects a size without a token
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            first = i == 0 and stage > 0
            q_stride = config.q_stride if first else (1, 1, 1)
            if config.kv_adaptive:
                # A smaller stride for the smaller grids of later stages keeps the number of keys
                # about the same. A stage's first block has more keys: its input grid is larger.
                kv_stride = _triple(
                    max(kv // q, 1) for kv, q in zip(kv_stride, q_stride, strict=True)
                )
            time, space = _relative_rows(config, nominal, q_stride, kv_stride)
            block, q, kv = len(blocks), config.q_kernels, config.kv_kernels
            q_kernel = q[block] if q else _kernel(config, q_stride)
            kv_kernel = kv[block] if kv else _kernel(config, kv_stride)
            pool_queries = config.full_q_pool or math.prod(q_stride) > 1
            width, attention_width, width_out, heads = _widths(config, stage, i)
            blocks.append(
                BlockPlan(
                    stage=stage,
                    width=width,
                    attention_width=attention_width,
                    width_out=width_out,
                    heads=heads,
                    mlp_width=config.mlp_ratio * attention_width,
                    q_pool=_pool(config, q_kernel, q_stride, heads) if pool_queries else None,
                    kv_pool=_pool(config, kv_kernel, kv_stride, heads),
                    skip_pool=_skip_pool(config, q_stride),
                    skip=config.skip,
                    pool_first=config.pool_first,
                    separate_qkv=config.separate_qkv or config.pool_first,
                    qkv_bias=config.qkv_bias,
                    relative_time=time,
                    relative_space=space,
                    relative_distances=config.relative_distances,
                    relative_resize=config.relative_resize,
                    residual_pool=config.residual_pool,
                )
            )
            nominal = _triple(n // q for n, q in zip(nominal, q_stride, strict=True))
    return tuple(blocks)


def drop_path_rates(config: MViTConfig) -> tuple[float, ...]:
    """Returns each block's drop path rate, linear from 0 to `config.drop_path`.

    Both branches of a block have the same rate.
    """
    depth = sum(config.depths)
    return tuple(config.drop_path * i / max(depth - 1, 1) for i in range(depth))


def patch_grid(config: MViTConfig, frames: int, height: int, width: int) -> Triple:
    """Returns the token grid of a clip after the patch embedding.

    Raises:
      UserError: the clip is too small and leaves no token.
    """
    size = (frames, height, width)
    grid = conv_output(size, config.patch_kernel, config.patch_stride, config.patch_padding)
    if min(grid) < 1:
        raise _too_small(config, size)
    return grid


def grids(config: MViTConfig, frames: int, height: int, width: int) -> tuple[BlockGrids, ...]:
    """Returns the token grids of every block for clips of `frames` x `height` x `width` pixels.

    Raises:
      UserError: the clip is too small and leaves some block no token.
    """
    rows = _grids(config, (frames, height, width))
    if rows is None:
        raise _too_small(config, (frames, height, width))
    return rows


def smallest_clip(config: MViTConfig) -> Triple:
    """Returns the smallest (frames, height, width) that leaves a token in every block."""
    sides = []
    for axis in range(3):  # no axis depends on another
        start = [4096] * 3
        for side in range(1, 4097):
            start[axis] = side
            if _grids(config, _triple(start)) is not None:
                break
        sides.append(start[axis])
    return _triple(sides)


def conv_output(size: Triple, kernel: Triple, stride: Triple, padding: Triple) -> Triple:
    """Returns the output size of a convolution or pooling, rounded down."""
    return _triple(
        (n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
    )


def _grids(config: MViTConfig, size: Triple) -> tuple[BlockGrids, ...] | None:
    grid = conv_output(size, config.patch_kernel, config.patch_stride, config.patch_padding)
    rows = []
    for block in plan(config):
        keys, output = block.keys(grid), block.output(grid)
        if min(*grid, *keys, *output) < 1:
            return None
        rows.append(BlockGrids(grid, keys, output))
        grid = output
    return tuple(rows)


def _too_small(config: MViTConfig, size: Triple) -> UserError:
    return UserError(
        f"a clip of {join_sizes(size)} (frames x height x width) is too small: this model requires "
        f"at least {join_sizes(smallest_clip(config))}"
    )


def _widths(config: MViTConfig, stage: int, i: int) -> tuple[int, int, int, int]:
    """Returns input width, attention width, output width and heads of block `i` of a stage."""
    width = config.width * config.growth**stage
    heads = config.heads * config.growth**stage
    if config.expand == "attention":
        return (width // config.growth if i == 0 and stage > 0 else width), width, width, heads
    grows = i == config.depths[stage] - 1 and stage < len(config.depths) - 1
    return width, width, width * config.growth if grows else width, heads


def _relative_rows(
    config: MViTConfig, grid: Triple, q_stride: Triple, kv_stride: Triple
) -> tuple[int, int]:
    """Returns the numbers of relative positional embeddings: along time, and per axis of space."""
    kind = config.relative_positions
    side = max(grid[1:])
    longest = max(side // q_stride[1], side // kv_stride[1], 1)
    time = 2 * grid[0] - 1 if kind in ("time", "both") else 0
    return time, 2 * longest - 1 if kind in ("space", "both") else 0


def _kernel(config: MViTConfig, stride: Triple) -> Triple:
    rule = config.pool_kernel
    if rule is None:
        three = (3 if config.frames > 1 else 1, 3, 3)
        rule = "stride + 1" if config.pool_mode in ("max", "avg") else three
    return _by_rule(rule, stride) if isinstance(rule, str) else rule


def _by_rule(rule: str, stride: Triple) -> Triple:
    factor, more = {"stride": (1, 0), "stride + 1": (1, 1), "2 stride + 1": (2, 1)}[rule]
    return _triple(factor * s + more if s > 1 else 1 for s in stride)


def _pool(config: MViTConfig, kernel: Triple, stride: Triple, heads: int) -> Pool | None:
    """Returns a pool, or None for kernel 1 and stride 1: no weights, no norm (reference code)."""
    if math.prod(kernel) == math.prod(stride) == 1:
        return None
    padded, eps = config.pool_kernel != "stride", config.pool_norm_eps
    shared = heads if config.pool_mode == "conv" else 1
    return Pool(config.pool_mode, kernel, stride, padded=padded, heads=shared, norm_eps=eps)


def _skip_pool(config: MViTConfig, q_stride: Triple) -> Pool | None:
    """Returns the skip connection's pool, or None for stride 1.

    The skip connection is max-pooled in every mode. The kernel is stride + 1 (reference code), or
    the stride if `pool_kernel` is "stride".
    """
    if math.prod(q_stride) == 1:
        return None
    disjoint = config.pool_kernel == "stride"
    kernel = _by_rule("stride" if disjoint else "stride + 1", q_stride)
    return Pool("max", kernel, q_stride, padded=not disjoint)


def _triple(values) -> Triple:
    t, h, w = values
    return (t, h, w)


# Checks of configured values. Without them, invalid values would fail later, in shape arithmetic.


def _check(config: MViTConfig) -> None:
    for name in MViTConfig.__dataclass_fields__:
        check_field(name, getattr(config, name))
    if config.width % config.heads:
        raise UserError(f"width {config.width} is not divisible by {config.heads} heads")
    if config.positions == "sincos" and config.width % 16:
        raise UserError(f'positions="sincos" requires a width divisible by 16, not {config.width}')
    if config.mean_pooling and config.task == "detection":
        raise UserError('mean_pooling requires task="classification"')
    if config.pool_mode == "conv_unshared" and not config.pool_first:
        raise UserError('pool_mode "conv_unshared" requires pool_first=True')
    for name in ("q_kernels", "kv_kernels"):
        count = len(getattr(config, name))
        if count not in (0, sum(config.depths)):
            raise UserError(f"{name} must be empty or have a kernel for each of the "
                            f"{sum(config.depths)} blocks, not {count} kernels")  # fmt: skip
    patch_grid(config, config.frames, config.size, config.size)  # raises if no token is left
    _check_skips(config)


def _check_skips(config: MViTConfig) -> None:
    # With padding kernel // 2, even kernels yield one position more than odd kernels on some grids.
    for i, block in enumerate(plan(config)):
        if block.skip_pool is None:
            if block.q_pool and any(k % 2 == 0 for k in block.q_pool.kernel):
                raise UserError(
                    f"block {i} pools its queries with an even kernel {block.q_pool.kernel} and "
                    "stride 1, so their grid differs from the skip connection's: use an odd kernel"
                )
            continue
        if block.q_pool is None:
            raise UserError(
                f"block {i} pools its skip connection but not its queries: check q_kernels"
            )
        kernels = zip(block.q_pool.kernel, block.skip_pool.kernel, strict=True)
        if any((q - s) % 2 for q, s in kernels):
            raise UserError(
                f"block {i} pools its queries by the kernel {block.q_pool.kernel} and its skip "
                f"connection by {block.skip_pool.kernel}, to different grids: leave q_kernels "
                'empty, and set pool_kernel="stride + 1"'
            )


def check_field(field: str, value: Any, name: str | None = None) -> None:
    """Checks the type and the range of a field of `MViTConfig`.

    Args:
      field: name of the field.
      value: its value.
      name: name of the field in the error, such as the key of a config; by default `field`.

    Raises:
      UserError: the value has another type, or is out of range.
    """
    name, kind = name or field, MViTConfig.__dataclass_fields__[field].type
    literals = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
    choices = [option for part in literals for option in get_args(part)]
    if kind in (int, float, bool):
        expected = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{name} must be {expected}, not {value!r}")
        _check_range(field, value, name)
    elif field == "pool_kernel":
        if value is not None and value not in choices:
            _check_triple(name, value)
    elif choices:
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    elif field in ("q_kernels", "kv_kernels"):
        if not isinstance(value, tuple):
            raise UserError(f"{name} must be kernels like ((3, 3, 3), (1, 3, 3)), not {value!r}")
        for kernel in value:
            _check_triple(name, kernel)
    elif field == "depths":
        if not isinstance(value, tuple) or not all(type(n) is int for n in value):
            raise UserError(f"{name} must be whole numbers like (1, 2, 11, 2), not {value!r}")
        if not value or min(value) < 1:
            raise UserError(
                f"{name} must be the number of blocks of each stage, at least 1, not {value}"
            )
    else:
        _check_triple(name, value, lowest=0 if field == "patch_padding" else 1)


def _check_range(field: str, value: Any, name: str) -> None:
    if MViTConfig.__dataclass_fields__[field].type is int and value < 1:
        raise UserError(f"{name} must be at least 1, not {value}")
    if field in ("drop_path", "dropout") and not 0 <= value < 1:
        raise UserError(f"{name} must be in [0, 1), not {value}")
    if field == "pool_norm_eps" and not 0 < value < math.inf:
        raise UserError(f"{name} must be above 0, not {value}")


def _check_triple(name: str, value: object, lowest: int = 1) -> None:
    if not isinstance(value, tuple) or not all(type(n) is int for n in value):
        raise UserError(f"{name} must be whole numbers like (1, 2, 2), not {value!r}")
    if len(value) != 3:
        raise UserError(f"{name} must be three numbers (t, h, w), not {value!r}")
    if min(value) < lowest:
        raise UserError(f"{name} must be at least {lowest} on every axis, not {value}")
