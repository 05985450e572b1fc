"""The architecture as data: what each block does, on which grid of tokens, at what cost.

Pure Python, no JAX. What the papers say in prose about stages, channel expansion, pooled queries,
adaptive key/value strides and skip connections is decided here, once:

* MViT, Fan et al. 2021 (arXiv 2104.11227), section 3;
* the counts agree with the published ones, see `variants.py` and `python -m mvit_jax.describe`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from mvit_jax.errors import UserError

Triple = tuple[int, int, int]  # along time, height, width

POOL_MODES = ("conv", "max", "avg")
POSITIONS = ("none", "space", "separate", "joint")


@dataclass(frozen=True)
class MViTConfig:
    """One architecture. Images are the case `frames=1` with kernels and strides of 1 along time.

    Strides and kernels are (time, height, width). Rates are probabilities in [0, 1).
    """

    frames: int = 16
    size: int = 224  # side of the square crop, pixels
    num_classes: int = 400
    patch_kernel: Triple = (3, 7, 7)
    patch_stride: Triple = (2, 4, 4)
    patch_padding: Triple = (1, 3, 3)
    width: int = 96  # channels of the first stage; each stage doubles them
    heads: int = 1  # of the first stage; each stage doubles them
    depths: tuple[int, ...] = (1, 2, 11, 2)  # blocks per stage
    mlp_ratio: int = 4
    pool_mode: Literal["conv", "max", "avg"] = "conv"
    # None is the papers' choice for the mode: 3x3x3 for "conv", stride + 1 for "max" and "avg"
    # (MViT, Table 15); "stride + 1" asks for the latter with "conv" too.
    pool_kernel: Triple | Literal["stride + 1"] | None = None
    q_stride: Triple = (1, 2, 2)  # in the first block of stages 2, 3, ...
    kv_stride: Triple = (1, 8, 8)  # in the first stage; each q_stride divides it (section 3.2)
    class_token: bool = True
    positions: Literal["none", "space", "separate", "joint"] = "separate"
    drop_path: float = 0.2  # of the last block; rises linearly from 0 at the first
    dropout: float = 0.5  # before the classifier

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Pool:
    """P(.; kernel, stride, padding) on a token grid, with padding = kernel // 2 (section 3.1)."""

    mode: str
    kernel: Triple
    stride: Triple

    @property
    def padding(self) -> Triple:
        return _triple(k // 2 for k in self.kernel)

    def output(self, grid: Triple) -> Triple:
        return conv_output(grid, self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class BlockPlan:
    """One block. Blocks that do the same compare equal. `None` for a pool means none at all."""

    stage: int  # from 0
    width: int  # channels of the block's input
    attention_width: int  # channels of Q, K, V and of the attention's output
    width_out: int  # channels of the block's output: doubled by a stage's last MLP
    heads: int
    mlp_width: int
    q_pool: Pool | None
    kv_pool: Pool | None
    skip_pool: Pool | None

    @property
    def head_dim(self) -> int:
        return self.attention_width // self.heads


@dataclass(frozen=True)
class BlockGrids:
    """Token grids (time, height, width) of one block, class token not counted."""

    input: Triple
    keys: Triple
    output: Triple  # also the grid of the queries


def plan(config: MViTConfig) -> tuple[BlockPlan, ...]:
    """The blocks of an architecture, first to last (MViT, section 3.2 and Table 2)."""
    blocks = []
    kv_stride = config.kv_stride
    for stage, depth in enumerate(config.depths):
        width, heads = config.width * 2**stage, config.heads * 2**stage
        last_stage = stage == len(config.depths) - 1
        for i in range(depth):
            first, last = i == 0 and stage > 0, i == depth - 1
            q_stride = config.q_stride if first else (1, 1, 1)
            # Adaptive: what the queries' pooling shrinks, the keys' need not shrink any more, so
            # that the number of keys stays about the same through the stages.
            kv_stride = _triple(max(kv // q, 1) for kv, q in zip(kv_stride, q_stride, strict=True))
            blocks.append(
                BlockPlan(
                    stage=stage,
                    width=width,
                    attention_width=width,
                    width_out=2 * width if last and not last_stage else width,
                    heads=heads,
                    mlp_width=config.mlp_ratio * width,
                    q_pool=_pool(config, q_stride) if math.prod(q_stride) > 1 else None,
                    kv_pool=_pool(config, kv_stride),
                    # Skips are max pooled whatever the mode (section 3.2, reference code).
                    skip_pool=_drop_identity(Pool("max", _stride_plus_1(q_stride), q_stride)),
                )
            )
    return tuple(blocks)


def drop_path_rates(config: MViTConfig) -> tuple[float, ...]:
    """Stochastic depth per block, linear from 0 to `config.drop_path`; one rate, both branches."""
    depth = sum(config.depths)
    return tuple(config.drop_path * i / max(depth - 1, 1) for i in range(depth))


def patch_grid(config: MViTConfig, frames: int, height: int, width: int) -> Triple:
    """The token grid after the cube embedding of a clip; an axis without a token is an error."""
    size = (frames, height, width)
    grid = conv_output(size, config.patch_kernel, config.patch_stride, config.patch_padding)
    if min(grid) < 1:
        smallest = tuple(
            max(k - 2 * p, 1)
            for k, p in zip(config.patch_kernel, config.patch_padding, strict=True)
        )
        raise UserError(
            f"a clip of {_x(size)} (frames x height x width) leaves no token; the smallest that "
            f"this model takes is {_x(smallest)}"
        )
    return grid


def grids(config: MViTConfig, frames: int, height: int, width: int) -> tuple[BlockGrids, ...]:
    """The token grids of every block for clips of `frames` x `height` x `width` pixels."""
    grid = patch_grid(config, frames, height, width)
    rows = []
    for block in plan(config):
        keys = block.kv_pool.output(grid) if block.kv_pool else grid
        output = block.q_pool.output(grid) if block.q_pool else grid
        rows.append(BlockGrids(grid, keys, output))
        grid = output
    return tuple(rows)


# Cost. Multiply-adds are what papers print as "FLOPs": one multiplication with its addition in a
# linear layer, a convolution or an attention product; norms, softmax and GELU are left out.


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds for one clip."""

    parameters: int
    multiply_adds: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


def embedding_cost(config: MViTConfig) -> Cost:
    """Cube embedding, class token and positions."""
    t, h, w = patch_grid(config, config.frames, config.size, config.size)
    kernel = 3 * math.prod(config.patch_kernel) * config.width
    positions = {
        "none": 0,
        "space": h * w + config.class_token,
        "separate": t + h * w + config.class_token,
        "joint": t * h * w + config.class_token,
    }[config.positions]
    parameters = kernel + config.width * (1 + config.class_token + positions)
    return Cost(parameters, kernel * t * h * w)


def block_cost(block: BlockPlan, grids: BlockGrids, class_token: bool) -> Cost:
    """One block: attention with its pools, MLP, skip projection, norms."""
    tokens_in, keys, tokens_out = (
        math.prod(grid) + class_token for grid in (grids.input, grids.keys, grids.output)
    )
    a = block.attention_width
    linears = [  # (inputs, outputs, tokens)
        (block.width, 3 * a, tokens_in),
        (a, a, tokens_out),
        (a, block.mlp_width, tokens_out),
        (block.mlp_width, block.width_out, tokens_out),
    ]
    if block.width_out != a:
        linears.append((a, block.width_out, tokens_out))
    parameters = sum((i + 1) * o for i, o, _ in linears)
    multiply_adds = sum(i * o * n for i, o, n in linears)
    multiply_adds += 2 * a * tokens_out * keys  # scores, and their product with the values
    parameters += 2 * block.width + 2 * a  # norms before attention and MLP
    for pool, grid, copies in (
        (block.q_pool, grids.output, 1),
        (block.kv_pool, grids.keys, 2),
    ):
        if pool and pool.mode == "conv":
            taps = math.prod(pool.kernel)
            parameters += copies * block.head_dim * (taps + 2)  # kernel shared by heads, norm
            multiply_adds += copies * taps * a * math.prod(grid)
    return Cost(parameters, multiply_adds)


def head_cost(config: MViTConfig) -> Cost:
    """Final norm and classifier."""
    width = plan(config)[-1].width_out
    return Cost(2 * width + (width + 1) * config.num_classes, width * config.num_classes)


def cost(config: MViTConfig) -> Cost:
    """Parameters, and multiply-adds for one clip of the nominal size."""
    sizes = grids(config, config.frames, config.size, config.size)
    total = embedding_cost(config) + head_cost(config)
    for block, block_grids in zip(plan(config), sizes, strict=True):
        total += block_cost(block, block_grids, config.class_token)
    return total


def conv_output(size: Triple, kernel: Triple, stride: Triple, padding: Triple) -> Triple:
    """Output size of a convolution or pooling, rounded down."""
    return _triple(
        (n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
    )


def _pool(config: MViTConfig, stride: Triple) -> Pool | None:
    return _drop_identity(Pool(config.pool_mode, _pool_kernel(config, stride), stride))


def _pool_kernel(config: MViTConfig, stride: Triple) -> Triple:
    kernel = config.pool_kernel
    if kernel == "stride + 1" or (kernel is None and config.pool_mode != "conv"):
        return _stride_plus_1(stride)
    return _triple(kernel or (3 if config.frames > 1 else 1, 3, 3))


def _drop_identity(pool: Pool) -> Pool | None:
    """A pool of kernel 1 and stride 1 does not exist: no weights, no norm (reference code)."""
    return None if math.prod(pool.kernel) == math.prod(pool.stride) == 1 else pool


def _stride_plus_1(stride: Triple) -> Triple:
    return _triple(s + 1 if s > 1 else 1 for s in stride)


def _triple(values) -> Triple:
    t, h, w = values
    return (t, h, w)


def _x(size: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in size)


def _check_type(name: str, kind: object, value: object) -> None:
    """A wrong type would otherwise end somewhere in the arithmetic."""
    integers = isinstance(value, tuple) and all(type(n) is int for n in value)
    fits = {
        int: type(value) is int,
        float: type(value) in (int, float),
        bool: type(value) is bool,
    }.get(kind, integers)  # pyright: ignore[reportArgumentType]
    if not fits:
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}.get(
            kind,  # pyright: ignore[reportArgumentType]
            "whole numbers like (1, 2, 2)",
        )
        raise UserError(f"{name} must be {wanted}, not {value!r}")


def _check(config: MViTConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("pool_mode", "positions", "pool_kernel"):
            _check_type(field.name, field.type, value)
        triple = field.type in (Triple, "Triple") or (
            field.name == "pool_kernel" and value not in (None, "stride + 1")
        )
        if not triple:
            continue
        if not isinstance(value, tuple) or len(value) != 3:
            raise UserError(f"{field.name} must be three numbers (t, h, w), not {value!r}")
        lowest = 0 if field.name == "patch_padding" else 1
        if min(value) < lowest:
            raise UserError(f"{field.name} must be at least {lowest} on every axis, not {value}")
    for name, value, allowed in (
        ("pool_mode", config.pool_mode, POOL_MODES),
        ("positions", config.positions, POSITIONS),
    ):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    for name in ("frames", "size", "num_classes", "width", "heads", "mlp_ratio"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
    if not config.depths or min(config.depths) < 1:
        raise UserError(f"depths must be blocks per stage, each at least 1, not {config.depths}")
    for name in ("drop_path", "dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    if config.width % config.heads:
        raise UserError(f"width {config.width} is not divisible by {config.heads} heads")
    # Padded by kernel // 2, an even kernel gives one place more than an odd one, on some grids.
    query_kernel, skip_kernel = (
        _pool_kernel(config, config.q_stride),
        _stride_plus_1(config.q_stride),
    )
    pooled = len(config.depths) > 1 and math.prod(config.q_stride) > 1
    if pooled and any((q - s) % 2 for q, s in zip(query_kernel, skip_kernel, strict=True)):
        raise UserError(
            f"pool_kernel {query_kernel} with q_stride {config.q_stride} pools the queries and "
            'their skip to different grids; use pool_kernel="stride + 1"'
        )
