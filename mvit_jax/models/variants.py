"""The published variants: their architectures, and what their papers report.

`P1` is MViT (Fan et al. 2021, arXiv 2104.11227). A field is overridden by keyword:
`variant("mvit_b_16x4", pool_mode="max", frames=8, size=160, num_classes=10)`.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from mvit_jax.errors import UserError
from mvit_jax.models.plan import MViTConfig

_IMAGE = MViTConfig(
    frames=1,
    num_classes=1000,
    patch_kernel=(1, 7, 7),
    patch_stride=(1, 4, 4),
    patch_padding=(0, 3, 3),
    kv_stride=(1, 4, 4),
    positions="joint",
    drop_path=0.1,
    dropout=0.0,
)

# A ViT is an MViT of one stage that pools nothing.
_VIT = MViTConfig(
    frames=8,
    patch_kernel=(1, 16, 16),
    patch_stride=(1, 16, 16),
    patch_padding=(0, 0, 0),
    width=768,
    heads=12,
    depths=(12,),
    pool_kernel="stride + 1",
    kv_stride=(1, 1, 1),
    positions="joint",
)

_replace = dataclasses.replace

VARIANTS: dict[str, MViTConfig] = {
    "mvit_b_16x4": MViTConfig(),
    "mvit_b_32x3": MViTConfig(frames=32),
    "mvit_b_64x3": MViTConfig(frames=64),
    "mvit_b24_32x3": MViTConfig(frames=32, depths=(2, 3, 16, 3), drop_path=0.3),
    "vit_b_8x8": _VIT,
    "mvit_b16": _IMAGE,
    "mvit_b24": _replace(_IMAGE, depths=(2, 3, 16, 3), drop_path=0.3),
    "mvit_b24_wide_320": _replace(_IMAGE, depths=(2, 3, 16, 3), width=112, size=320, drop_path=0.3),
    "vit_b16": _replace(_VIT, frames=1, num_classes=1000, dropout=0.0, drop_path=0.1),
}


@dataclass(frozen=True)
class Published:
    """A paper's row: parameters in millions, multiply-adds of a view in billions, accuracy in %."""

    data: str
    parameters: float
    multiply_adds: float
    top1: float
    source: str


PUBLISHED: dict[str, Published] = {
    "mvit_b_16x4": Published("Kinetics-400", 36.6, 70.5, 78.4, "P1, Table 4"),
    "mvit_b_32x3": Published("Kinetics-400", 36.6, 170.0, 80.2, "P1, Table 4"),
    "mvit_b_64x3": Published("Kinetics-400", 36.6, 455.0, 81.2, "P1, Table 4"),
    # The paper prints 52.9 M for the 600 classes of Kinetics-600; 53.2 M for those of SSv2.
    "mvit_b24_32x3": Published("Kinetics-600", 52.9, 236.0, 83.8, "P1, Table 5"),
    "vit_b_8x8": Published("Kinetics-400", 87.2, 180.0, 68.5, "P1, Table 4"),
    "mvit_b16": Published("ImageNet-1k", 37.0, 7.8, 83.0, "P1, Table 17"),
    "mvit_b24": Published("ImageNet-1k", 53.5, 10.9, 83.1, "P1, Table 17 (max pooling)"),
    "mvit_b24_wide_320": Published("ImageNet-1k", 72.9, 32.7, 84.8, "P1, Table 17"),
}


def variant(name: str, /, **overrides: Any) -> MViTConfig:
    """The architecture called `name`, with fields of `MViTConfig` overridden by keyword."""
    if name not in VARIANTS:
        raise UserError(f"there is no variant {name!r}{nearest(name, VARIANTS)}")
    fields = [field.name for field in dataclasses.fields(MViTConfig)]
    for key in overrides:
        if key not in fields:
            raise UserError(f"{key!r} is no field of an architecture{nearest(key, fields)}")
    return _replace(VARIANTS[name], **overrides)


def nearest(name: str, known) -> str:
    """The end of an error message that says which known name was probably meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
