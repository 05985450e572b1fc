"""Adaptation of weights to another architecture: image or video, other sizes, other classes.

Kernels are inflated along time in one of three ways, since the paper and the released code differ:

* "centre": the image kernel at the middle frame, zeros at the others (MViTv2, section 4.3);
* "repeat": the image kernel at every frame (PySlowFast's setting for MViT);
* "mean": the image kernel at every frame, divided by their number (I3D, PySlowFast's older code).

From video to image, the inverse is the middle frame, the mean and the sum, in the same order.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mvit_jax.models.functional import Functional, Params
from mvit_jax.models.positions import linear_weights
from mvit_jax.weights.report import Line, Report, WeightsError

Inflation = Literal["centre", "mean", "repeat"]
INFLATIONS = ("centre", "mean", "repeat")

# Path patterns with fields of `MViTConfig`. If the architectures differ in one of the fields, the
# matching tensors may be new or unused.
_OWNERS = (
    (r"head/", {"num_classes"}),
    (r"positions/class_token", {"class_token"}),
    (r"positions/class_position", {"class_token", "positions"}),
    (r"positions/", {"positions"}),
    (r"stem_norm/", {"stem_norm"}),
    (r"blocks/\d+/attn/relative/", {"relative_positions"}),
    (r"blocks/\d+/attn/pool_.*",
     {"pool_mode", "pool_kernel", "q_kernels", "kv_kernels", "full_q_pool"}),
    (r"blocks/\d+/attn/(q|k|v|qkv)/bias", {"qkv_bias"}),
    (r"blocks/\d+/proj/", {"skip"}),
)  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """A tensor of the new architecture."""

    values: np.ndarray | None  # None: the source has no suitable tensor
    done: str  # the conversion, or the reason why there is none
    used: tuple[str, ...] = ()  # paths of the source tensors


def adapt(
    source: Mapping[str, np.ndarray],
    model: Functional,
    *,
    changed: Iterable[str] = (),
    inflate: Inflation | None = None,
) -> tuple[dict[str, Fitted], dict[str, bool]]:
    """Adapts the tensors of another architecture to `model`.

    Args:
      source: tensors of the other architecture, by path.
      model: the target.
      changed: fields of `MViTConfig` in which the two architectures may differ.
      inflate: conversion between image and video kernels; None allows none.

    Returns:
      All tensors of `model` by path, and the unused paths of `source` in a dict, with True for
      tensors that may be unused.
    """
    changed = set(changed)
    shapes = model.shapes()
    fitted = {
        path: fit(path, shapes[path], source, changed=changed, inflate=inflate)
        for path in sorted(shapes, key=_order)
    }
    used = {path for tensor in fitted.values() for path in tensor.used}
    unused_paths = sorted(source.keys() - used, key=_order)
    # Sine-cosine embeddings are computed by the model here; PySlowFast stores them in its files.
    fixed = model.config.positions == "sincos"
    unused = {
        path: may_be_unmatched(path, changed) or (fixed and path.startswith("positions/"))
        for path in unused_paths
    }
    return fitted, unused


def convert_params(
    params: Params,
    source_model: Functional,
    model: Functional,
    inflate: Inflation | None = None,
    *,
    new_classifier: bool = False,
) -> tuple[Params, Report]:
    """Returns parameters of `source_model` converted to `model`, and the report.

    If either model has custom modules, block tensors without a counterpart are initialised or
    dropped.

    Args:
      params: parameters of `source_model`.
      source_model: the model that the parameters belong to.
      model: the target.
      inflate: conversion between image and video kernels; None allows none.
      new_classifier: initialises the classifier even if its number of classes is the same.

    Raises:
      WeightsError: a tensor does not fit, or it is missing or unused although no differing field
        explains that.
    """
    source = {path: np.asarray(values) for path, values in flatten_dict(params, sep="/").items()}
    changed = [
        f.name
        for f in dataclasses.fields(source_model.config)
        if getattr(source_model.config, f.name) != getattr(model.config, f.name)
    ]
    fitted, unused = adapt(source, model, changed=changed, inflate=inflate)
    if new_classifier:
        head = {path: shape for path, shape in model.shapes().items() if path.startswith("head/")}
        fitted |= {path: Fitted(_initialise(path, shape), "new") for path, shape in head.items()}
        unused |= {path: True for path in source if path.startswith("head/")}
    if source_model.is_custom or model.is_custom:
        initial: dict[str, Any] = flatten_dict(
            jax.device_get(jax.jit(model.init)(jax.random.key(0))), sep="/"
        )
        fitted |= {
            path: Fitted(initial[path], "new")
            for path, tensor in fitted.items()
            if tensor.values is None and path.startswith("blocks/")
        }
        unused |= {path: True for path in unused if path.startswith("blocks/")}
    report = Report(f"{len(source)} tensors")
    for path, tensor in fitted.items():
        origin = tensor.used[0] if tensor.used else ""
        old = source[origin].shape if origin else None
        new = None if tensor.values is None else tensor.values.shape
        report.lines.append(Line(origin, old, path, new, tensor.done, tensor.values is None))
    for path, allowed in unused.items():
        report.lines.append(Line(path, source[path].shape, "", None, "unused", not allowed))
    if not report.ok:
        raise WeightsError(report)
    return unflatten_dict({path: t.values for path, t in fitted.items()}, sep="/"), report


def fit(
    path: str,
    shape: tuple[int, ...],
    source: Mapping[str, np.ndarray],
    *,
    changed: Iterable[str] = (),
    inflate: Inflation | None = None,
) -> Fitted:
    """Converts tensors of another architecture to the tensor `path` of shape `shape`.

    Args:
      path: path in the new architecture.
      shape: shape in the new architecture.
      source: tensors of the other architecture, by path.
      changed: fields of `MViTConfig` in which the two architectures may differ. If one of these
        fields explains why the tensor is missing, the tensor is initialised.
      inflate: conversion between image and video kernels; None allows none.
    """
    if path not in source:
        return _derive(path, shape, source, set(changed), inflate)
    values = source[path]
    if values.shape == shape:
        return Fitted(values, "copied", (path,))
    if path.startswith("positions/") and values.shape[-1:] == shape[-1:]:
        return Fitted(_resize_positions(values, shape), "resized", (path,))
    if "/relative/" in path and values.shape[1:] == shape[1:]:
        return Fitted(
            _interpolate(values, 0, linear_weights(len(values), shape[0])), "resized", (path,)
        )
    if path.endswith("/kernel") and values.shape[1:] == shape[1:] and len(shape) > 2:
        if inflate and 1 in (values.shape[0], shape[0]):
            done = "inflated" if shape[0] > 1 else "deflated"
            return Fitted(inflate_kernel(values, shape[0], inflate), done, (path,))
        if 1 in (values.shape[0], shape[0]) and path.startswith("patch_embed"):
            return Fitted(None, "spans another number of frames: set inflate=centre, mean or "
                          "repeat to convert it")  # fmt: skip
    if path.startswith("head/") and "num_classes" in changed:
        return Fitted(_initialise(path, shape), "new")
    return Fitted(None, f"does not fit the shape {'x'.join(map(str, shape))} of {path}", (path,))


def may_be_unmatched(path: str, changed: Iterable[str]) -> bool:
    """Returns True if the `changed` fields explain why a tensor is new or unused."""
    changed = set(changed)
    return any(re.match(pattern, path) and fields & changed for pattern, fields in _OWNERS)


def _order(path: str) -> tuple:
    """Returns a sort key: the order of the forward pass, blocks by number."""
    parts = ("patch_embed", "positions", "stem_norm", "blocks", "norm", "head")
    first, *rest = path.split("/")
    return parts.index(first), [(int(p), "") if p.isdigit() else (0, p) for p in rest]


def inflate_kernel(kernel: np.ndarray, frames: int, how: Inflation) -> np.ndarray:
    """Inflates `[1, kh, kw, ...]` to `[frames, kh, kw, ...]`, or deflates a kernel to one frame."""
    old = len(kernel)
    if frames == 1:
        image = {"centre": lambda: kernel[old // 2], "mean": lambda: kernel.sum(0),
                 "repeat": lambda: kernel.mean(0)}[how]()  # fmt: skip
        return image[None]
    if how == "centre":
        out = np.zeros((frames, *kernel.shape[1:]), kernel.dtype)
        out[frames // 2] = kernel[0]
        return out
    repeated = np.repeat(kernel, frames, axis=0)
    return repeated / frames if how == "mean" else repeated


def _derive(
    path: str, shape: tuple[int, ...], source: Mapping[str, np.ndarray], changed: set[str],
    inflate: Inflation | None,
) -> Fitted:  # fmt: skip
    """Derives a tensor from related tensors, or initialises it; `source` has none at `path`."""
    projection = re.fullmatch(r"(blocks/\d+/attn/)(qkv|q|k|v)/(kernel|bias)", path)
    if projection:
        attn, name, leaf = projection.groups()
        parts = tuple(f"{attn}{x}/{leaf}" for x in "qkv")
        if name == "qkv" and all(part in source for part in parts):
            whole = np.concatenate([source[part] for part in parts], axis=-1)
            return Fitted(whole, "joined", parts)
        fused = f"{attn}qkv/{leaf}"
        if fused in source:
            part = np.split(source[fused], 3, axis=-1)["qkv".index(name)]
            return Fitted(part, "split", (fused,))
    if path == "positions/space" and "positions/joint" in source and inflate:
        joint = source["positions/joint"].mean(0)
        return Fitted(_resize_positions(joint, shape), "split", ("positions/joint",))
    if path == "positions/joint" and {"positions/space", "positions/time"} <= set(source):
        space, time = source["positions/space"], source["positions/time"]
        joint = space[None] + time[:, None, None]
        if shape[0] == 1:
            joint = joint.mean(0, keepdims=True)
        used = ("positions/space", "positions/time")
        return Fitted(_resize_positions(joint, shape), "joined", used)
    if path.endswith("/time") and inflate:
        # Zeros treat all frames alike, which preserves the image model's outputs (MViTv2, 4.3).
        return Fitted(np.zeros(shape, np.float32), "new, zeros")
    if may_be_unmatched(path, changed):
        return Fitted(_initialise(path, shape), "new")
    return Fitted(None, "is missing")


def _resize_positions(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Interpolates cubically along height and width, linearly along time, as PySlowFast does."""
    axes = shape[:-1]
    for axis, length in enumerate(axes):
        old = values.shape[axis]
        if old == length:
            continue
        temporal = len(axes) == 1 or (len(axes) == 3 and axis == 0)
        weights = linear_weights(old, length) if temporal else cubic_weights(old, length)
        values = _interpolate(values, axis, weights)
    return values


def _interpolate(values: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    moved = np.tensordot(weights, values.astype(np.float64), (1, axis))
    return np.moveaxis(moved, 0, axis).astype(values.dtype)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the matrix `[new, old]` of cubic interpolation along one axis.

    Matches PyTorch's bicubic mode: a = -0.75, pixel centres at half-integers, repeated border
    values.
    """
    positions = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        nearest = np.floor(positions).astype(int) + offset
        weight = _cubic(np.abs(positions - nearest))
        np.add.at(weights, (np.arange(new), np.clip(nearest, 0, old - 1)), weight)
    return weights


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Evaluates the cubic convolution kernel (Keys 1981)."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _initialise(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Initialises a tensor as a new model does, from a PRNG key derived from its path."""
    if path.endswith("/bias"):
        return np.zeros(shape, np.float32)
    if path.endswith("/scale"):
        return np.ones(shape, np.float32)
    key = jax.random.key(zlib.crc32(path.encode()))
    if "/pool_" in path:
        bound = float(np.prod(shape[:3])) ** -0.5
        return np.asarray(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
    return np.asarray(jax.nn.initializers.truncated_normal(0.02)(key, shape))
