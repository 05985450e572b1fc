"""Where each of our tensors stands in the files of other projects, and in which shape.

One table, read in both directions: to find a tensor in a file, and to write one that the other side
loads with strict matching. Our parameters are named by paths, `blocks/3/attn/qkv/kernel`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import MViTConfig, patch_grid
from mvit_jax.models.variants import VARIANTS

FAMILIES: tuple[str, ...] = ("slowfast", "torchvision", "pytorchvideo", "timm")

# Modules and single tensors: ours, then as in FAMILIES; None where a family has none. {} is the
# block, "{stage}.blocks.{place}" in timm.
_B, _T = "blocks.{}.", "stages.{stage}.blocks.{place}."
_CLS = "cls_positional_encoding."


def _block(
    ours: str, slowfast: str, torchvision: str | None = "", pytorchvideo: str | None = "",
    timm: str | None = "",
) -> tuple:  # fmt: skip
    """A row for something in a block; "" is PySlowFast's name."""
    others = [
        None if name is None else prefix + (name or slowfast)
        for prefix, name in ((_B, torchvision), (_B, pytorchvideo), (_T, timm))
    ]
    return ("blocks/{}/" + ours, _B + slowfast, *others)


_ROWS = [
    ("patch_embed/proj", "patch_embed.proj", "conv_proj", "patch_embed.patch_model",
     "patch_embed.proj"),
    ("positions/class_token", "cls_token", "pos_encoding.class_token", _CLS + "cls_token",
     "cls_token"),
    ("positions/class_position", "pos_embed_class", "pos_encoding.class_pos",
     _CLS + "pos_embed_class", None),
    ("positions/space", "pos_embed_spatial", "pos_encoding.spatial_pos",
     _CLS + "pos_embed_spatial", None),
    ("positions/time", "pos_embed_temporal", "pos_encoding.temporal_pos",
     _CLS + "pos_embed_temporal", None),
    ("positions/joint", "pos_embed", None, _CLS + "pos_embed", "pos_embed"),
    ("stem_norm", "norm_stem", None, "norm_patch_embed", None),
    _block("norm1", "norm1"),
    _block("attn/qkv", "attn.qkv"),
    *(_block(f"attn/{x}", f"attn.{x}", None) for x in "qkv"),
    *(_block(f"attn/pool_{x}", f"attn.pool_{x}", f"attn.pool_{x}.pool") for x in "qkv"),
    *(_block(f"attn/pool_{x}/norm", f"attn.norm_{x}", f"attn.pool_{x}.norm_act.0") for x in "qkv"),
    _block("attn/relative/time", "attn.rel_pos_t", pytorchvideo=None, timm=None),
    _block("attn/relative/height", "attn.rel_pos_h", pytorchvideo=None),
    _block("attn/relative/width", "attn.rel_pos_w", pytorchvideo=None),
    _block("attn/proj", "attn.proj", "attn.project.0"),
    _block("norm2", "norm2"),
    _block("mlp/fc1", "mlp.fc1", "mlp.0"),
    _block("mlp/fc2", "mlp.fc2", "mlp.3"),
    _block("proj", "proj", "project", timm="shortcut_proj_{expand}"),
    ("norm", "norm", "norm", "norm_embed", "norm"),
    ("head/classifier", "head.projection", "head.1", "head.proj", "head.fc"),
]  # fmt: skip
TABLE: dict[str, dict[str, str | None]] = {
    ours: dict(zip(FAMILIES, names, strict=True)) for ours, *names in _ROWS
}

_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}
_GROWS = {"attention": "attn", "mlp": "mlp"}


def foreign_name(path: str, family: str, config: MViTConfig) -> str | None:
    """What a family calls our tensor `path`; None where it cannot hold it."""
    if joint_with_class_token(path, config):
        path = "positions/joint"
    number = re.match(r"blocks/(\d+)/", path)
    module = re.sub(r"^blocks/\d+/", "blocks/{}/", path)
    module, leaf = (module, "") if module in TABLE else module.rsplit("/", 1)
    name = TABLE[module][family]
    if name is None:
        return None
    if number is not None:
        name = _in_block(name, int(number[1]), config.depths, config.expand)
    return name + _LEAVES.get(leaf, "")


def known_names(family: str, config: MViTConfig) -> dict[str, list[str]]:
    """Our paths for every name that a family could give to tensors of a model of these depths."""
    known: dict[str, list[str]] = {}
    for module, names in TABLE.items():
        name, in_block = names[family], "{}" in module
        if name is None:
            continue
        for i in range(sum(config.depths)) if in_block else [0]:
            for expand in _GROWS if family == "timm" and module == "blocks/{}/proj" else ["mlp"]:
                theirs = _in_block(name, i, config.depths, expand) if in_block else name
                for leaf in _leaves(module):
                    suffix = _LEAVES.get(leaf, "")
                    path = module.format(i) + (leaf and "/" + leaf)
                    known.setdefault(theirs + suffix, []).append(path)
    if TABLE["positions/joint"][family] and config.positions == "joint" and config.class_token:
        known[str(TABLE["positions/joint"][family])].append("positions/class_position")
    return known


def _leaves(module: str) -> tuple[str, ...]:
    if module.startswith("positions/") or "/relative/" in module:
        return ("",)
    if module.endswith(("norm", "norm1", "norm2")):
        return ("scale", "bias")
    return ("kernel",) if re.search(r"/pool_[qkv]$", module) else ("kernel", "bias")


def _in_block(name: str, block: int, depths: tuple[int, ...], expand: str) -> str:
    stage, place = 0, block
    while stage < len(depths) and place >= depths[stage]:
        stage, place = stage + 1, place - depths[stage]
    return name.format(block, stage=stage, place=place, expand=_GROWS[expand])


def joint_with_class_token(path: str, config: MViTConfig) -> bool:
    """The class token's position is the first row of a joint table, where there is one."""
    return path == "positions/class_position" and config.positions == "joint"


@dataclass(frozen=True)
class Origin:
    """What a file was like whose weights came in, so that they can go back the same."""

    family: str
    ranks: Mapping[str, int]  # of its "patch" and "pool" kernels: 4 or 5
    dtype: str = "float32"  # of all its tensors


@dataclass(frozen=True)
class Shaped:
    """A tensor in our shape, and what was done to it."""

    values: np.ndarray
    done: str


def to_ours(path: str, values: np.ndarray, config: MViTConfig) -> Shaped:
    """A tensor of any family in our shape; a `ValueError` of a few words where it cannot be."""
    return _RULES[_rule(path, config)].to_ours(values, config)


def to_theirs(path: str, values: np.ndarray, family: str, config: MViTConfig, rank: int):
    """Our tensor in a family's shape. `rank` is that of pooling and patch kernels: 4 or 5."""
    rule = _RULES[_rule(path, config)]
    theirs = rule.to_theirs(values, family)
    if rule.convolution and rank == 4:
        if theirs.shape[2] != 1:
            raise UserError(f"{path} spans {theirs.shape[2]} frames: {family} holds image models")
        return np.ascontiguousarray(theirs[:, :, 0])
    return np.ascontiguousarray(theirs)


@dataclass(frozen=True)
class _Rule:
    to_ours: Callable[[np.ndarray, MViTConfig], Shaped]
    to_theirs: Callable[[np.ndarray, str], np.ndarray]
    convolution: bool = False


def _rule(path: str, config: MViTConfig) -> str:
    if path == "patch_embed/proj/kernel":
        return "convolution"
    if re.search(r"/pool_[qkv]/kernel$", path):
        return "pool"
    if path.endswith("/kernel"):
        return "linear"
    if path.startswith("positions/"):
        if joint_with_class_token(path, config):
            return "joint class_position"
        return path.removeprefix("positions/")
    return "same"


def _5d(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Image models have kernels [out, in, h, w], or with a time axis of 1 before those two."""
    if values.ndim == 4:
        return values[:, :, None], "given a time axis, "
    _expect(values, 5)
    return values, ""


def _expect(values: np.ndarray, rank: int) -> None:
    if values.ndim != rank:
        raise ValueError(f"has {values.ndim} axes instead of {rank}")


def _convolution(values: np.ndarray, config: MViTConfig) -> Shaped:
    values, done = _5d(values)
    return Shaped(values.transpose(2, 3, 4, 1, 0), done + "transposed")


def _pool(values: np.ndarray, config: MViTConfig) -> Shaped:
    values, done = _5d(values)
    if values.shape[1] != 1:
        raise ValueError("is no depthwise convolution")
    return Shaped(values[:, 0].transpose(1, 2, 3, 0), done + "transposed")


def _linear(values: np.ndarray, config: MViTConfig) -> Shaped:
    _expect(values, 2)
    return Shaped(values.T, "transposed")


def _rows(values: np.ndarray) -> np.ndarray:
    """Positions are [1, 1, channels], [1, rows, channels], [rows, channels] or [channels]."""
    if values.ndim == 0 or values.ndim > 3 or (values.ndim == 3 and values.shape[0] != 1):
        raise ValueError("is no table of positions")
    return values.reshape(-1, values.shape[-1])


def _token(values: np.ndarray, config: MViTConfig) -> Shaped:
    rows = _rows(values)
    if len(rows) != 1:
        raise ValueError(f"has {len(rows)} rows instead of one")
    return Shaped(rows, "copied")


def _space(values: np.ndarray, config: MViTConfig) -> Shaped:
    rows = _rows(values)
    return Shaped(rows.reshape(*_square(len(rows)), -1), "copied")


def _joint(values: np.ndarray, config: MViTConfig) -> Shaped:
    rows = _rows(values)[int(config.class_token) :]
    t, h, w = _joint_grid(len(rows), config)
    return Shaped(rows.reshape(t, h, w, -1), "split")


def _joint_grid(places: int, config: MViTConfig) -> tuple[int, int, int]:
    """Time, height and width of a joint table, which its length alone does not say: those of the
    model, else of a variant that has as many; of images, the square."""
    for known in (config, *VARIANTS.values()):
        grid = patch_grid(known, known.frames, known.size, known.size)
        if math.prod(grid) == places:
            return grid
    if config.frames == 1:
        return (1, *_square(places))
    raise ValueError(
        f"is made for {places} places in space-time, which do not say how many frames these are: "
        "give the frames and size that it was made for (fine-tuning from there can change them)"
    )


def _square(places: int) -> tuple[int, int]:
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"is made for {places} places, which are no square")
    return side, side


def _flat(values: np.ndarray, family: str) -> np.ndarray:
    """Tables have a leading axis of 1 everywhere but in torchvision."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if family == "torchvision" else rows[None]


def _flat_token(values: np.ndarray, family: str) -> np.ndarray:
    return values[0] if family == "torchvision" else values[None]


_RULES = {
    "same": _Rule(lambda v, c: Shaped(v, "copied"), lambda v, f: v),
    "linear": _Rule(_linear, lambda v, f: v.T),
    "convolution": _Rule(_convolution, lambda v, f: v.transpose(4, 3, 0, 1, 2), True),
    "pool": _Rule(_pool, lambda v, f: v.transpose(3, 0, 1, 2)[:, None], True),
    "class_token": _Rule(_token, _flat_token),
    "class_position": _Rule(_token, _flat_token),
    "time": _Rule(lambda v, c: Shaped(_rows(v), "copied"), _flat),
    "space": _Rule(_space, _flat),
    "joint": _Rule(_joint, _flat),
    "joint class_position": _Rule(lambda v, c: Shaped(_rows(v)[:1], "split"), lambda v, f: v[None]),
}
