"""Export of models to files for PySlowFast, torchvision, PyTorchVideo and timm."""

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import Params
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.positions import sincos
from mvit_jax.weights import key_tables
from mvit_jax.weights.tensor_files import write_safetensors, write_torch

TARGETS = (*key_tables.FORMATS, "safetensors")

# The only values of these fields that each project's code supports.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "slowfast": {"skip": ("normalised",), "growth": (2,)},
    "torchvision": {
        "task": ("classification",),
        "skip": ("normalised",),
        "class_token": (True,),
        "positions": ("none", "separate"),
        "relative_positions": ("none", "both"),
        "pool_mode": ("conv",),
        "pool_first": (False,),
        "mean_pooling": (False,),
    },
    "pytorchvideo": {
        "task": ("classification",),
        "skip": ("normalised",),
        "expand": ("mlp",),
        "mean_pooling": (False,),
    },
    "timm": {
        "task": ("classification",),
        "skip": ("normalised",),
        "frames": (1,),
        "positions": ("none", "joint"),
        "relative_positions": ("none", "space"),
        "pool_first": (False,),
        "mean_pooling": (False,),
    },
}


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    format: str  # checkpoint format of the file
    tensors: int  # number of tensors
    notes: tuple[str, ...]  # differences in the other project's computation


def save_torch(
    params: Params,
    config: MViTConfig,
    path: str | os.PathLike[str],
    to: str,
    *,
    origin: key_tables.Origin | None = None,
) -> Exported:
    """Writes parameters to a file that another project loads with strict matching.

    Args:
      params: parameters, nested as in the model.
      config: the model's architecture.
      path: the file to write.
      to: "slowfast", "torchvision", "pytorchvideo", "timm" or "safetensors". "safetensors"
        writes a safetensors file with the names and shapes of `origin`, by default PySlowFast's.
      origin: format of the file that the parameters were loaded from. If the written file has the
        same format ("safetensors" always has), and all tensors of the original had one dtype
        (float32, float16 or bfloat16), unchanged tensors are written bit for bit.

    Raises:
      UserError: the format cannot hold the model (lists all reasons), or the file cannot be
        written.
    """
    if to not in TARGETS:
        raise UserError(f"weights can be exported to {', '.join(TARGETS)}, not to {to!r}")
    format = to
    if to == "safetensors":
        format = origin.format if origin else "slowfast"
    tensors = state_dict(params, config, format, origin)
    if to == "safetensors":
        write_safetensors(path, tensors)
    elif to == "slowfast":
        write_torch(path, tensors, wrapper="model_state", extra={"epoch": 0, "cfg": ""})
    else:
        write_torch(path, tensors)
    return Exported(format, len(tensors), tuple(_notes(config, format)))


def state_dict(
    params: Params, config: MViTConfig, format: str, origin: key_tables.Origin | None = None
) -> dict[str, np.ndarray]:
    """Returns parameters with the names, shapes and axis order of a checkpoint format.

    Raises:
      UserError: the format cannot hold the model (lists all reasons).
    """
    flat = {path: np.asarray(values) for path, values in flatten_dict(params, sep="/").items()}
    if format in ("torchvision", "timm") and config.separate_qkv and not config.pool_first:
        flat = _join_qkv(flat)
    names = {path: key_tables.foreign_name(path, format, config) for path in flat}
    problems = [
        f"{field} is {getattr(config, field)}, but must be {' or '.join(map(str, allowed))}"
        for field, allowed in _ONLY[format].items()
        if getattr(config, field) not in allowed
    ]
    problems += [f"{path} has no counterpart" for path, name in names.items() if name is None]
    if problems:
        raise UserError(f"the format of {format} cannot hold this model: {'; '.join(problems)}")
    ranks = _ranks(config, format, origin)
    tensors: dict[str, np.ndarray] = {}
    for path, values in flat.items():
        name = str(names[path])
        rank = ranks["patch" if path.startswith("patch_embed") else "pool"]
        theirs = key_tables.to_theirs(path, values, format, config, rank)
        # The class token's positional embedding is the first row of the joint embeddings.
        first = key_tables.joint_with_class_token(path, config)
        if name in tensors:
            pair = (theirs, tensors[name]) if first else (tensors[name], theirs)
            theirs = np.concatenate(pair, axis=1)
        tensors[name] = theirs
    if format == "pytorchvideo" and config.pool_norm_eps == 1e-6:
        tensors |= _duplicate_pools(tensors)
    if config.positions == "sincos" and format == "slowfast":
        tensors["pos_embed"] = _sincos(config)
    if origin is not None and origin.format == format and origin.dtype in ("float16", "bfloat16"):
        # Exact for unchanged values, which were read from this dtype.
        tensors = {name: values.astype(origin.dtype) for name, values in tensors.items()}
    return tensors


def _duplicate_pools(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the pooling weights under their second names.

    PyTorchVideo after version 0.1 stores these weights under two names. The same version changed
    the eps of the pooling norms to 1e-6.
    """
    pattern, second = r"\.attn\.(pool|norm)_([qkv])\.", r".attn._attention_pool_\2.\1."
    return {
        re.sub(pattern, second, name): values
        for name, values in tensors.items()
        if re.search(pattern, name)
    }


def _join_qkv(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins the separate linear layers for Q, K and V into one."""
    out = {}
    for path, values in flat.items():
        part = re.fullmatch(r"(.*/attn/)([qkv])/(kernel|bias)", path)
        if part is None:
            out[path] = values
        elif part[2] == "q":
            three = [flat[f"{part[1]}{x}/{part[3]}"] for x in "qkv"]
            out[f"{part[1]}qkv/{part[3]}"] = np.concatenate(three, axis=-1)
    return out


def _notes(config: MViTConfig, format: str) -> list[str]:
    notes = []
    conv = config.pool_mode.startswith("conv")
    if config.pool_norm_eps != 1e-6 and conv and format != "pytorchvideo":
        notes.append(
            f"the pooling norms have eps {config.pool_norm_eps} in this model and 1e-06 in "
            f"{format}: logits differ by rounding errors, and more if pooled channels hardly vary"
        )
    adds = "all" if format in ("timm", "pytorchvideo") else "grid"
    if config.class_token and config.residual_pool not in ("none", adds):
        notes.append(
            f"residual pooling adds {config.residual_pool!r} tokens in this model and {adds!r} "
            f"in {format}: logits will differ"
        )
    return notes


def _ranks(config: MViTConfig, format: str, origin: key_tables.Origin | None) -> dict[str, int]:
    """Returns the number of axes of the patch and pooling kernels.

    For images, PySlowFast and PyTorchVideo have 2D patch kernels but 3D pooling kernels. timm and
    the repository of MViTv2's image models have 2D kernels for both.
    """
    if format == "timm":
        return {"patch": 4, "pool": 4}
    ranks = {"patch": 5, "pool": 5}
    if config.frames == 1 and format in ("slowfast", "pytorchvideo"):
        two = format == "slowfast" and config.relative_positions != "none"
        ranks = {"patch": 4, "pool": 4 if two else 5}
    return ranks | dict(origin.ranks if origin and origin.format == format else {})


def _sincos(config: MViTConfig) -> np.ndarray:
    """Returns the fixed sine-cosine embeddings, which PySlowFast stores in its files."""
    grid = tuple(
        n // s
        for n, s in zip((config.frames, config.size, config.size), config.patch_stride, strict=True)
    )
    table = sincos((grid[0], grid[1], grid[2]), config.width).reshape(1, -1, config.width)
    return np.pad(table, [(0, 0), (int(config.class_token), 0), (0, 0)]).astype(np.float32)
