"""Table of parameter names here and in the checkpoint formats of other projects.

Reading and writing use the same table. Parameters of this project are named by paths, such as
`blocks/3/attn/qkv/kernel`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import MViTConfig, patch_grid
from mvit_jax.models.variants import VARIANTS

FORMATS: tuple[str, ...] = ("slowfast", "torchvision", "pytorchvideo", "timm")

# Each row has the path of a module or tensor here, then its names in the order of FORMATS, or None
# if a format has no such tensor. {} is the block's number; timm numbers blocks within stages.
_B, _T = "blocks.{}.", "stages.{stage}.blocks.{index}."
_CLS = "cls_positional_encoding."


def _block(
    ours: str, slowfast: str, torchvision: str | None = "", pytorchvideo: str | None = "",
    timm: str | None = "",
) -> tuple:  # fmt: skip
    """Returns a row for a module of a block; "" means the same name as in PySlowFast."""
    names = [
        None if name is None else prefix + (name or slowfast)
        for prefix, name in ((_B, torchvision), (_B, pytorchvideo), (_T, timm))
    ]
    return ("blocks/{}/" + ours, _B + slowfast, *names)


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
    ours: dict(zip(FORMATS, names, strict=True)) for ours, *names in _ROWS
}

_LEAVES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}
_GROWS = {"attention": "attn", "mlp": "mlp"}


def foreign_name(path: str, format: str, config: MViTConfig) -> str | None:
    """Returns the name of the tensor `path` in a checkpoint format; None if it has none."""
    if joint_with_class_token(path, config):
        path = "positions/joint"
    number = re.match(r"blocks/(\d+)/", path)
    module = re.sub(r"^blocks/\d+/", "blocks/{}/", path)
    module, leaf = (module, "") if module in TABLE else module.rsplit("/", 1)
    name = TABLE[module][format]
    if name is None:
        return None
    if number is not None:
        name = _in_block(name, int(number[1]), config.depths, config.expand)
    return name + _LEAVES.get(leaf, "")


def paths_by_name(format: str, config: MViTConfig) -> dict[str, list[str]]:
    """Returns the paths behind each tensor name of a checkpoint format.

    Joint positional embeddings with a class token have one name and two paths.
    """
    paths: dict[str, list[str]] = {}
    for module, names in TABLE.items():
        name, in_block = names[format], "{}" in module
        if name is None:
            continue
        for i in range(sum(config.depths)) if in_block else [0]:
            for expand in _GROWS if format == "timm" and module == "blocks/{}/proj" else ["mlp"]:
                theirs = _in_block(name, i, config.depths, expand) if in_block else name
                for leaf in _leaves(module):
                    suffix = _LEAVES.get(leaf, "")
                    path = module.format(i) + (leaf and "/" + leaf)
                    paths.setdefault(theirs + suffix, []).append(path)
    if TABLE["positions/joint"][format] and config.positions == "joint" and config.class_token:
        paths[str(TABLE["positions/joint"][format])].append("positions/class_position")
    return paths


def _leaves(module: str) -> tuple[str, ...]:
    if module.startswith("positions/") or "/relative/" in module:
        return ("",)
    if module.endswith(("norm", "norm1", "norm2")):
        return ("scale", "bias")
    return ("kernel",) if re.search(r"/pool_[qkv]$", module) else ("kernel", "bias")


def _in_block(name: str, block: int, depths: tuple[int, ...], expand: str) -> str:
    stage, index = 0, block
    while stage < len(depths) and index >= depths[stage]:
        stage, index = stage + 1, index - depths[stage]
    return name.format(block, stage=stage, index=index, expand=_GROWS[expand])


def joint_with_class_token(path: str, config: MViTConfig) -> bool:
    """Returns True if `path` is stored as the first row of the joint positional embeddings."""
    return path == "positions/class_position" and config.positions == "joint"


@dataclass(frozen=True)
class Origin:
    """Format of a loaded checkpoint, for writing its weights back unchanged."""

    format: str  # checkpoint format, one of FORMATS
    ranks: Mapping[str, int]  # number of axes of the "patch" and "pool" kernels: 4 or 5
    dtype: str = "float32"  # dtype of all tensors; "float32" if they differ


@dataclass(frozen=True)
class Shaped:
    """A tensor in this project's shape."""

    values: np.ndarray
    done: str  # the conversion


def to_ours(path: str, values: np.ndarray, config: MViTConfig) -> Shaped:
    """Converts a tensor of any checkpoint format to this project's shape.

    Raises:
      ValueError: the shape is not convertible. The message follows the tensor's name, such as
        "has 3 axes instead of 2".
    """
    return _RULES[_rule(path, config)].to_ours(values, config)


def to_theirs(path: str, values: np.ndarray, format: str, config: MViTConfig, rank: int):
    """Converts a tensor to the shape of a checkpoint format.

    Args:
      path: path of the tensor in this project.
      values: the tensor.
      format: checkpoint format.
      config: architecture of the model.
      rank: number of axes of patch and pooling kernels in the file: 4 or 5.

    Raises:
      UserError: the kernel spans several frames and `rank` is 4.
    """
    rule = _RULES[_rule(path, config)]
    theirs = rule.to_theirs(values, format)
    if rule.convolution and rank == 4:
        if theirs.shape[2] != 1:
            raise UserError(
                f"{path} spans {theirs.shape[2]} frames, but {format} has only image models"
            )
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
    """Adds a time axis to kernels [out, in, h, w] of image models."""
    if values.ndim == 4:
        return values[:, :, None], "expanded to 3D, "
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
        raise ValueError("is not a depthwise convolution")
    return Shaped(values[:, 0].transpose(1, 2, 3, 0), done + "transposed")


def _linear(values: np.ndarray, config: MViTConfig) -> Shaped:
    _expect(values, 2)
    return Shaped(values.T, "transposed")


def _rows(values: np.ndarray) -> np.ndarray:
    """Returns positional embeddings as [positions, channels].

    Accepts a leading axis of 1, and the shape [channels] for a single embedding.
    """
    if values.ndim == 0 or values.ndim > 3 or (values.ndim == 3 and values.shape[0] != 1):
        raise ValueError("does not have the shape of positional embeddings")
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


def _joint_grid(positions: int, config: MViTConfig) -> tuple[int, int, int]:
    """Returns time, height and width of the grid of joint positional embeddings.

    Files have one flat axis of positions. The grid is that of the model, or of any variant with the
    same number of positions. Failing that, the grid of an image is square.
    """
    for candidate in (config, *VARIANTS.values()):
        grid = patch_grid(candidate, candidate.frames, candidate.size, candidate.size)
        if math.prod(grid) == positions:
            return grid
    if config.frames == 1:
        return (1, *_square(positions))
    raise ValueError(
        f"has {positions} positions in space-time, which do not determine the number of frames: "
        "give the frames and size that it was trained with (fine-tuning can change them)"
    )


def _square(positions: int) -> tuple[int, int]:
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"has {positions} positions, which do not form a square grid")
    return side, side


def _flat(values: np.ndarray, format: str) -> np.ndarray:
    """Flattens positional embeddings; all formats but torchvision's have a leading axis of 1."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if format == "torchvision" else rows[None]


def _flat_token(values: np.ndarray, format: str) -> np.ndarray:
    return values[0] if format == "torchvision" else values[None]


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
