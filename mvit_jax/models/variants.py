"""The published variants: architectures, published results and preprocessing.

`P1` is MViT (Fan et al. 2021, arXiv 2104.11227), `P2` is MViTv2 (Li et al. 2022, arXiv 2112.01526),
`MaskFeat` is Wei et al. 2022 (arXiv 2112.09133). Keywords override fields:
`variant("mvit_b_16x4", pool_mode="max", frames=8, size=160, num_classes=10)`.
"""

import ast
import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import MViTConfig

_replace = dataclasses.replace

_VIDEO = MViTConfig()
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

# A ViT is an MViT of one stage without pooling.
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

_B24: dict[str, Any] = {"depths": (2, 3, 16, 3), "drop_path": 0.3}
_LARGE: dict[str, Any] = {"depths": (2, 6, 36, 4), "width": 144, "heads": 2}
_HUGE: dict[str, Any] = {"depths": (4, 8, 60, 8), "width": 192, "heads": 3, "drop_path": 0.8}

# MViTv2, section 4: relative instead of absolute positional embeddings, residual pooling, queries
# pooled in every block, width growing in the attention.
_V2: dict[str, Any] = {
    "positions": "none",
    "relative_positions": "both",
    "residual_pool": "grid",
    "full_q_pool": True,
    "expand": "attention",
}
_V2_VIDEO = _replace(_VIDEO, **_V2)
_V2_LONG = _replace(_V2_VIDEO, **_LARGE, frames=40, drop_path=0.75)
_V2_IMAGE = _replace(_IMAGE, **_V2 | {"relative_positions": "space"}, class_token=False)
# In MViTv2-L's released weights, the width grows in the MLP (ImageNet-1k) or in the attention
# (ImageNet-21k).
_V2_L = _replace(_V2_IMAGE, **_LARGE, drop_path=0.5, expand="mlp")
_V2_H = _replace(_V2_IMAGE, **_HUGE)
_21K: dict[str, Any] = {"class_token": True, "num_classes": 19168}
# MaskFeat's models have MViTv2's positional embeddings and residual pooling, but MViT's growth.
_MASKFEAT = _replace(_V2_VIDEO, expand="mlp", mean_pooling=True, dropout=0.0, drop_path=0.1)

VARIANTS: dict[str, MViTConfig] = {
    "mvit_s_16x4": _replace(
        _VIDEO,
        width=128,
        depths=(3, 7, 6),
        patch_kernel=(3, 8, 8),
        patch_stride=(2, 8, 8),
        patch_padding=(1, 0, 0),
        kv_stride=(1, 4, 4),
    ),
    "mvit_b_16x4": _VIDEO,
    "mvit_b_32x2": _replace(_VIDEO, frames=32, patch_stride=(4, 4, 4), pool_mode="max"),
    "mvit_b_32x3": _replace(_VIDEO, frames=32),
    "mvit_b_64x3": _replace(_VIDEO, frames=64),
    "mvit_b24_32x3": _replace(_VIDEO, **_B24, frames=32),
    "vit_b_8x8": _VIT,
    "mvit_b16": _IMAGE,
    "mvit_b24": _replace(_IMAGE, **_B24),
    "mvit_b24_wide_320": _replace(_IMAGE, **_B24, width=112, size=320),
    "vit_b16": _replace(_VIT, frames=1, num_classes=1000, dropout=0.0, drop_path=0.1),
    "mvitv2_s_16x4": _V2_VIDEO,
    "mvitv2_b_32x3": _replace(_V2_VIDEO, **_B24, frames=32),
    "mvitv2_l_16x4": _replace(_V2_LONG, frames=16),
    "mvitv2_l_32x3": _replace(_V2_LONG, frames=32),
    "mvitv2_l_40x3": _V2_LONG,
    "mvitv2_l_32x3_312": _replace(_V2_LONG, frames=32, size=312),
    "mvitv2_l_40x3_312": _replace(_V2_LONG, size=312),
    "mvitv2_l_40x3_352": _replace(_V2_LONG, size=352),
    "mvitv2_t": _replace(_V2_IMAGE, depths=(1, 2, 5, 2)),
    "mvitv2_s": _V2_IMAGE,
    "mvitv2_b": _replace(_V2_IMAGE, **_B24),
    "mvitv2_b_384": _replace(_V2_IMAGE, **_B24, size=384),
    "mvitv2_l": _V2_L,
    "mvitv2_l_384": _replace(_V2_L, size=384),
    "mvitv2_h": _V2_H,
    "mvitv2_h_384": _replace(_V2_H, size=384),
    "mvitv2_h_512": _replace(_V2_H, size=512),
    "mvitv2_s_in21k": _replace(_V2_IMAGE, **_21K),
    "mvitv2_b_in21k": _replace(_V2_IMAGE, **_B24, **_21K),
    "mvitv2_l_in21k": _replace(_V2_L, **_21K, expand="attention"),
    "mvitv2_h_in21k": _replace(_V2_H, **_21K),
    "maskfeat_s_16x4": _MASKFEAT,
    "maskfeat_l_16x4": _replace(_MASKFEAT, **_LARGE, drop_path=0.2),
}
"""Every published variant by its name.

:meta hide-value:
"""


@dataclass(frozen=True)
class Published:
    """A published result: millions of parameters, billions of multiply-adds per view, top-1 in %.

    `note` explains a difference of more than 1 % from our counts, or is empty.
    """

    data: str
    parameters: float | None
    multiply_adds: float | None
    top1: float | None
    source: str
    note: str = ""


_L_NOTE = (
    "the paper's parameters fit growth in the MLP (its Table 13 has 213.1 M), its multiply-adds "
    "fit growth in the attention, as in the released configs"
)
_L_IMAGE_NOTE = (
    "the released weights and the paper's parameters fit growth in the MLP, the paper's "
    "multiply-adds fit growth in the attention (41.8 G)"
)

PUBLISHED: dict[str, Published] = {
    "mvit_s_16x4": Published(
        "Kinetics-400", 26.1, 32.9, 76.0, "P1, Table 4",
        "never released; the paper does not state the depth of the first stage, heads and K/V "
        "strides: depths of 3-7-6 and strides from 1x4x4 result in the paper's parameters",
    ),
    "mvit_b_16x4": Published("Kinetics-400", 36.6, 70.5, 78.4, "P1, Table 4"),
    "mvit_b_32x2": Published("Kinetics-400", 36.5, 70.5, 77.2, "P1, Table 12"),
    "mvit_b_32x3": Published("Kinetics-400", 36.6, 170.0, 80.2, "P1, Table 4"),
    "mvit_b_64x3": Published("Kinetics-400", 36.6, 455.0, 81.2, "P1, Table 4"),
    # The paper prints 52.9 M for Kinetics-600 (600 classes) and 53.2 M for SSv2 (174 classes).
    "mvit_b24_32x3": Published("Kinetics-600", 52.9, 236.0, 83.8, "P1, Table 5"),
    "vit_b_8x8": Published("Kinetics-400", 87.2, 180.0, 68.5, "P1, Table 4"),
    "mvit_b16": Published("ImageNet-1k", 37.0, 7.8, 83.0, "P1, Table 17"),
    "mvit_b24": Published("ImageNet-1k", 54.0, 10.9, 83.4, "P2, Table 2"),
    "mvit_b24_wide_320": Published("ImageNet-1k", 72.9, 32.7, 84.8, "P1, Table 17"),
    "mvitv2_s_16x4": Published("Kinetics-400", 34.5, 64.0, 81.0, "P2, Table 10"),
    "mvitv2_b_32x3": Published("Kinetics-400", 51.2, 225.0, 82.9, "P2, Table 10"),
    "mvitv2_l_40x3": Published(
        "Kinetics-400", 217.6, 1127.0, 84.5, "P2, Table 14 (from ImageNet-21k)",
        "the row's parameters and multiply-adds fit growth in the MLP",
    ),
    "mvitv2_l_32x3_312": Published(
        "Kinetics-600", 217.6, 2063.0, 87.2, "P2, Table 11 (from ImageNet-21k)", _L_NOTE
    ),
    "mvitv2_l_40x3_312": Published(
        "Kinetics-400", 217.6, 2828.0, 86.1, "P2, Table 10 (from ImageNet-21k)", _L_NOTE
    ),
    "mvitv2_l_40x3_352": Published(
        "Kinetics-600", 217.6, 3790.0, 87.9, "P2, Table 11 (from ImageNet-21k)", _L_NOTE
    ),
    "mvitv2_t": Published("ImageNet-1k", 24.0, 4.7, 82.3, "P2, Table 2"),
    "mvitv2_s": Published("ImageNet-1k", 35.0, 7.0, 83.6, "P2, Table 2"),
    "mvitv2_b": Published("ImageNet-1k", 52.0, 10.2, 84.4, "P2, Table 2",
                          "the paper rounds 51.5 M up"),
    "mvitv2_b_384": Published("ImageNet-1k", 52.0, 36.7, 85.2, "P2, Table 2"),
    "mvitv2_l": Published("ImageNet-1k", 218.0, 42.1, 85.3, "P2, Table 2", _L_IMAGE_NOTE),
    "mvitv2_l_384": Published("ImageNet-1k", 218.0, 140.2, 86.0, "P2, Table 2", _L_IMAGE_NOTE),
    "mvitv2_h": Published("ImageNet-1k", 667.0, 120.6, 88.0, "P2, Table 3 (from ImageNet-21k)"),
    "mvitv2_h_384": Published("ImageNet-1k", 667.0, 388.5, 88.3, "P2, Table 3 (from ImageNet-21k)"),
    "mvitv2_h_512": Published("ImageNet-1k", 667.0, 763.5, 88.3, "P2, Table 3 (from ImageNet-21k)"),
    "maskfeat_s_16x4": Published("Kinetics-400", 36.0, 71.0, 82.2, "MaskFeat, PySlowFast's zoo",
                                 "the zoo rounds 36.5 M down"),
    "maskfeat_l_16x4": Published("Kinetics-400", 218.0, 377.0, 84.3, "MaskFeat, PySlowFast's zoo"),
}  # fmt: skip

CLASSES = {"Kinetics-400": 400, "Kinetics-600": 600, "ImageNet-1k": 1000}

_RGB_VIDEO = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))
_RGB_IMAGE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # statistics of ImageNet


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of videos or images that a variant was trained with."""

    frames: int  # T; 1 for images
    stride: int  # tau, the step between sampled frames at 30 frames a second
    size: int  # side of the square crop, pixels
    short_side: int  # short side of the scaled frame, before the centre crop, pixels
    mean: tuple[float, float, float]  # mean of red, green and blue in [0, 1]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]  # bicubic is antialiased, as in PIL
    sampling: Literal["span", "segments", "stride"] = "span"  # of frames, see `data.sampling`
    whole_image: bool = False  # scales the whole frame to the square, without a crop


def preprocessing(name: str, /, **overrides: Any) -> Preprocessing:
    """Returns the preprocessing of a variant, with fields of `MViTConfig` overridden.

    The short side is size / 0.875, rounded down: 256 for crops of 224 pixels, 356 for 312.

    Raises:
      UserError: there is no such variant, no such field, or a value is out of range.
    """
    config = variant(name, **overrides)
    image = VARIANTS[name].frames == 1
    mean, std = _RGB_IMAGE if image or name.startswith("mvitv2_l") else _RGB_VIDEO
    sampled = re.search(r"_\d+x(\d+)", name)  # frames x stride
    return Preprocessing(
        frames=config.frames,
        stride=int(sampled[1]) if sampled and not image else 1,
        size=config.size,
        short_side=int(config.size / 0.875),
        mean=mean,
        std=std,
        interpolation="bicubic" if image else "bilinear",
    )


def variant(name: str, /, **overrides: Any) -> MViTConfig:
    """Returns the architecture of a variant, with fields of `MViTConfig` overridden by keyword.

    Raises:
      UserError: there is no such variant, no such field, or a value is out of range.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no variant {name!r}{nearest(name, VARIANTS)}")
    fields = [field.name for field in dataclasses.fields(MViTConfig)]
    for key in overrides:
        if key not in fields:
            raise UserError(f"there is no architecture field {key!r}{nearest(key, fields)}")
    return _replace(VARIANTS[name], **overrides)


def override(text: str) -> tuple[str, Any]:
    """Returns the field and the value of a command-line argument "field=value".

    A value that is not a Python literal stays a string.

    Raises:
      UserError: the text has no "=".
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} must have the form field=value, like frames=8")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def nearest(name: str, names) -> str:
    """Returns the end of an error message: the most similar of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose one of {', '.join(names)}"
