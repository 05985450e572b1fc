"""The papers' ablations as overrides of a variant: `variant("mvit_b_16x4", **overrides)`.

Results are on Kinetics-400, except for Table A.3 and Table 17 (ImageNet-1k). MViT's ablations
use max pooling unless the setting names another mode.
"""

from dataclasses import dataclass
from typing import Any

from mvit_jax.models.variants import Published


@dataclass(frozen=True)
class Ablation:
    """A row of a paper's ablation table."""

    setting: str
    variant: str
    overrides: dict[str, Any]
    published: Published


def _row(
    table: str, setting: str, variant: str, top1: float | None, multiply_adds: float | None = None,
    parameters: float | None = None, note: str = "", data: str = "Kinetics-400", **overrides: Any,
) -> Ablation:  # fmt: skip
    published = Published(data, parameters, multiply_adds, top1, table, note)
    return Ablation(setting, variant, overrides, published)


def _b(table: str, setting: str, top1: float | None, multiply_adds=None, **rest: Any) -> Ablation:
    rest = {"pool_mode": "max"} | rest
    return _row(table, setting, "mvit_b_16x4", top1, multiply_adds, **rest)


_NOT_STATED = "the paper does not state the stride"
_UNEXPLAINED = "1.1 G more than our count; the cause is unknown"

ABLATIONS: tuple[Ablation, ...] = (
    _row("P1, Table 10", "queries pooled after block 6", "vit_b_8x8", 71.0, 111.1, depths=(6, 6),
         growth=1, pool_mode="max"),
    _row("P1, Table 10", "keys and values pooled", "vit_b_8x8", 69.1, 148.4, note=_NOT_STATED,
         kv_stride=(1, 2, 2), pool_mode="max"),
    _b("P1, Table 11", "no positional embeddings", 75.8, parameters=36.2, positions="none"),
    _b("P1, Table 11", "space-only positional embeddings", 76.7, parameters=36.5,
       positions="space"),
    _b("P1, Table 11", "joint positional embeddings", 76.5, parameters=38.6, positions="joint"),
    _b("P1, Table 11", "separate positional embeddings", 77.2, parameters=36.5,
       positions="separate"),
    _b("P1, Table 12", "8x8, cubes 1x4x4", 74.5, 69.4, frames=8, patch_kernel=(1, 4, 4),
       patch_stride=(1, 4, 4), patch_padding=(0, 0, 0)),
    _b("P1, Table 12", "8x8, cubes 1x7x7", 75.6, 69.6, frames=8, patch_kernel=(1, 7, 7),
       patch_stride=(1, 4, 4), patch_padding=(0, 3, 3)),
    _b("P1, Table 12", "8x8, cubes 3x7x7", 75.9, 70.5, frames=8, patch_stride=(1, 4, 4)),
    _b("P1, Table 12", "16x4, cubes 3x7x7", 77.2, 70.5),
    _b("P1, Table 12", "32x2, cubes 3x7x7", 77.2, 70.5, frames=32, patch_stride=(4, 4, 4)),
    _b("P1, Table 12", "32x2, cubes 7x7x7", 77.3, 70.5, frames=32, patch_kernel=(7, 7, 7),
       patch_stride=(4, 4, 4), patch_padding=(3, 3, 3),
       note="the paper prints the same multiply-adds for both kernels; the larger kernel has more"),
    *(
        _b("P1, Table 13", "-".join(map(str, depths)), top1, cost, parameters=parameters,
           depths=depths, kv_stride=(2, 4, 4))
        for depths, top1, cost, parameters in (
            ((2, 6, 6, 2), 76.3, 90.2, 29.5),
            ((2, 4, 6, 4), 75.9, 86.9, 42.8),
            ((2, 4, 8, 2), 76.6, 88.3, 32.2),
            ((2, 2, 8, 4), 76.7, 85.0, 45.5),
            ((1, 2, 11, 2), 77.1, 83.6, 36.5),
            ((2, 2, 10, 2), 76.9, 86.4, 34.9),
        )
    ),
    _b("P1, Table 14", "no K/V stride", 77.6, 130.8, kv_stride=(1, 1, 1),
       note="attention over all tokens of the first block alone takes 121 G, so the paper's model "
       "must pool keys and values in some block"),
    _b("P1, Table 14", "K/V stride 1x4x4 in all blocks", 75.9, 71.4, kv_stride=(1, 4, 4),
       kv_adaptive=False, note=_UNEXPLAINED),
    _b("P1, Table 14", "K/V stride 2x4x4 in all blocks", 74.8, 64.3, kv_stride=(2, 4, 4),
       kv_adaptive=False, note=_UNEXPLAINED),
    _b("P1, Table 14", "K/V stride 2x4x4, adaptive", 77.1, 83.6, kv_stride=(2, 4, 4)),
    _b("P1, Table 14", "K/V stride 1x8x8, adaptive", 77.2, 70.5),
    _b("P1, Table 14", "K/V stride 2x8x8, adaptive", 75.8, 63.7, kv_stride=(2, 8, 8)),
    _b("P1, Table 15", "max pooling, kernel = stride", 76.1, pool_kernel="stride"),
    _b("P1, Table 15", "max pooling, kernel = 2 stride + 1", 75.5, pool_kernel="2 stride + 1"),
    _b("P1, Table 15", "max pooling, kernel = stride + 1", 77.2, pool_kernel="stride + 1"),
    _b("P1, Table 15", "average pooling, kernel = stride + 1", 75.4, pool_mode="avg"),
    _b("P1, Table 15", "convolution, kernel = stride + 1", 78.3, pool_mode="conv",
       pool_kernel="stride + 1"),
    _b("P1, Table 15", "convolution, kernel = 3x3x3", 78.4, pool_mode="conv"),
    _b("P1, Table A.1", "skip connection from the normalised tensor", 77.2),
    _b("P1, Table A.1", "skip connection from the tensor itself", 74.6, skip="plain"),
    _b("P1, Table A.1", "no skip connection where the width grows", 74.7, skip="none"),
    _row("P1, Table 16", "MViT-S, max pooling", "mvit_s_16x4", 74.3, pool_mode="max"),
    *(
        _row("P1, Table A.3", f"image, K/V stride {'x'.join(map(str, stride[1:]))}", "mvit_b16",
             top1, cost, data="ImageNet-1k", kv_stride=stride, pool_mode="max")
        for stride, top1, cost in (
            ((1, 8, 8), 81.6, 7.2), ((1, 4, 4), 82.5, 7.8), ((1, 2, 2), 81.8, 9.0),
            ((1, 1, 1), 82.3, 10.4),
        )
    ),
    *(
        _row("P1, Table 17", "image, max pooling", name, top1, cost, parameters, data="ImageNet-1k",
             pool_mode="max")
        for name, top1, cost, parameters in (
            ("mvit_b16", 82.5, 7.8, 37.0), ("mvit_b24", 83.1, 10.9, 53.5),
            ("mvit_b24_wide_320", 84.3, 32.7, 72.9),
        )
    ),
    _row("P2, Table A.6", "no positional embeddings", "mvitv2_s_16x4", 80.1, parameters=34.4,
         relative_positions="none"),
    _row("P2, Table A.6", "absolute positional embeddings", "mvitv2_s_16x4", 80.4, parameters=34.7,
         relative_positions="none", positions="separate"),
    _row("P2, Table A.6", "relative in time", "mvitv2_s_16x4", 80.8, relative_positions="time"),
    _row("P2, Table A.6", "relative in space", "mvitv2_s_16x4", 80.6, relative_positions="space"),
    _row("P2, Table A.6", "relative in space and time", "mvitv2_s_16x4", 81.0, parameters=34.5),
    _row("P2, Table A.7", "neither residual nor full Q pooling", "mvitv2_s_16x4", 79.3,
         residual_pool="none", full_q_pool=False),
    _row("P2, Table A.7", "full Q pooling only", "mvitv2_s_16x4", 79.7, residual_pool="none"),
    _row("P2, Table A.7", "residual pooling only", "mvitv2_s_16x4", 79.7, full_q_pool=False),
    _row("P2, Table A.7", "both", "mvitv2_s_16x4", 81.0),
    _row("PySlowFast's zoo", "B-32x3 (24 blocks, kernel = stride + 1)", "mvit_b24_32x3", 80.4,
         pool_kernel="stride + 1"),
)  # fmt: skip
