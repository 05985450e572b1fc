"""Weights of one architecture made to fit another: image and video, other sizes, other classes.

Kernels are inflated in one of three ways, since paper and released code differ: "centre" puts the
image's kernel at the middle frame and zeros beside it (MViTv2, section 4.3), "repeat" puts it at
every frame (PySlowFast's switch for MViT), "mean" does and divides by the frames (I3D, PySlowFast's
older path). From video to image each is undone: the middle frame, the mean, the sum.
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

# Which tensors may be new, or left over, where an architecture was asked for that differs in one of
# these fields.
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

    values: np.ndarray | None  # None: there is nothing to make it of
    done: str
    used: tuple[str, ...] = ()  # the paths that it was made of


def adapt(
    source: Mapping[str, np.ndarray],
    model: Functional,
    *,
    changed: Iterable[str] = (),
    inflate: Inflation | None = None,
) -> tuple[dict[str, Fitted], dict[str, bool]]:
    """All tensors of `model`, by path, made of those of another one; and those of
    `source` that were not used, with whether that may be."""
    changed = set(changed)
    shapes = model.shapes()
    fitted = {
        path: fit(path, shapes[path], source, changed=changed, inflate=inflate)
        for path in sorted(shapes, key=_order)
    }
    used = {path for one in fitted.values() for path in one.used}
    unused = sorted(source.keys() - used, key=_order)
    fixed = model.config.positions == "sincos"  # they stand in PySlowFast's files, though computed
    left = {
        path: may_be_left(path, changed) or (fixed and path.startswith("positions/"))
        for path in unused
    }
    return fitted, left


def carry_over(
    params: Params, was: Functional, model: Functional, inflate: Inflation | None = None
) -> tuple[Params, Report]:
    """Returns parameters of the model `was` as those of `model`, and the report. Tensors of blocks
    that only one of them has are new, or left out, if either has custom modules.

    Raises:
      WeightsError: a tensor that the two architectures should share does not fit.
    """
    source = {path: np.asarray(values) for path, values in flatten_dict(params, sep="/").items()}
    changed = [
        f.name
        for f in dataclasses.fields(was.config)
        if getattr(was.config, f.name) != getattr(model.config, f.name)
    ]
    fitted, left = adapt(source, model, changed=changed, inflate=inflate)
    if was.is_custom or model.is_custom:
        drawn: dict[str, Any] = flatten_dict(
            jax.device_get(jax.jit(model.init)(jax.random.key(0))), sep="/"
        )
        fitted |= {
            path: Fitted(drawn[path], "new")
            for path, one in fitted.items()
            if one.values is None and path.startswith("blocks/")
        }
        left |= {path: True for path in left if path.startswith("blocks/")}
    report = Report(f"{len(source)} tensors")
    for path, one in fitted.items():
        origin = one.used[0] if one.used else ""
        old = source[origin].shape if origin else None
        new = None if one.values is None else one.values.shape
        report.lines.append(Line(origin, old, path, new, one.done, one.values is None))
    for path, may_be in left.items():
        report.lines.append(Line(path, source[path].shape, "", None, "unused", not may_be))
    if not report.ok:
        raise WeightsError(report)
    return unflatten_dict({path: one.values for path, one in fitted.items()}, sep="/"), report


def fit(
    path: str,
    shape: tuple[int, ...],
    source: Mapping[str, np.ndarray],
    *,
    changed: Iterable[str] = (),
    inflate: Inflation | None = None,
) -> Fitted:
    """Tensor `path` of `shape` from the tensors `source` of another architecture.

    `changed` are the fields of `MViTConfig` in which the two are meant to differ; a tensor that
    only these can explain is made anew.
    """
    if path not in source:
        return _without(path, shape, source, set(changed), inflate)
    values = source[path]
    if values.shape == shape:
        return Fitted(values, "copied", (path,))
    if path.startswith("positions/") and values.shape[-1:] == shape[-1:]:
        return Fitted(_resize_positions(values, shape), "resized", (path,))
    if "/relative/" in path and values.shape[1:] == shape[1:]:
        return Fitted(_along(values, 0, linear_weights(len(values), shape[0])), "resized", (path,))
    if path.endswith("/kernel") and values.shape[1:] == shape[1:] and len(shape) > 2:
        if inflate and 1 in (values.shape[0], shape[0]):
            done = "inflated" if shape[0] > 1 else "deflated"
            return Fitted(inflated(values, shape[0], inflate), done, (path,))
        if 1 in (values.shape[0], shape[0]) and path.startswith("patch_embed"):
            return Fitted(None, "spans another number of frames: say how to carry it over with "
                          "inflate=centre, mean or repeat")  # fmt: skip
    if path.startswith("head/") and "num_classes" in changed:
        return Fitted(_fresh(path, shape), "new")
    return Fitted(None, f"does not fit {'x'.join(map(str, shape))} of {path}", (path,))


def may_be_left(path: str, changed: Iterable[str]) -> bool:
    """Whether a tensor may be new or unused where these fields were changed."""
    changed = set(changed)
    return any(re.match(pattern, path) and fields & changed for pattern, fields in _OWNERS)


def _order(path: str) -> tuple:
    """As a clip meets the tensors, blocks by number."""
    parts = ("patch_embed", "positions", "stem_norm", "blocks", "norm", "head")
    first, *rest = path.split("/")
    return parts.index(first), [(int(p), "") if p.isdigit() else (0, p) for p in rest]


def inflated(kernel: np.ndarray, frames: int, how: Inflation) -> np.ndarray:
    """A kernel `[1, kh, kw, ...]` as `[frames, kh, kw, ...]`, or one of several frames as one."""
    old = len(kernel)
    if frames == 1:
        one = {"centre": lambda: kernel[old // 2], "mean": lambda: kernel.sum(0),
               "repeat": lambda: kernel.mean(0)}[how]()  # fmt: skip
        return one[None]
    if how == "centre":
        out = np.zeros((frames, *kernel.shape[1:]), kernel.dtype)
        out[frames // 2] = kernel[0]
        return out
    repeated = np.repeat(kernel, frames, axis=0)
    return repeated / frames if how == "mean" else repeated


def _without(
    path: str, shape: tuple[int, ...], source: Mapping[str, np.ndarray], changed: set[str],
    inflate: Inflation | None,
) -> Fitted:  # fmt: skip
    projection = re.fullmatch(r"(blocks/\d+/attn/)(qkv|q|k|v)/(kernel|bias)", path)
    if projection:
        attn, name, leaf = projection.groups()
        three = tuple(f"{attn}{x}/{leaf}" for x in "qkv")
        if name == "qkv" and all(one in source for one in three):
            whole = np.concatenate([source[one] for one in three], axis=-1)
            return Fitted(whole, "joined", three)
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
        # As for all frames alike, so that nothing changes but what was learned (section 4.3).
        return Fitted(np.zeros(shape, np.float32), "new, zeros")
    if may_be_left(path, changed):
        return Fitted(_fresh(path, shape), "new")
    return Fitted(None, "is missing")


def _resize_positions(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cubic along height and width, linear along time, as PySlowFast does when it loads."""
    axes = shape[:-1]
    for axis, length in enumerate(axes):
        old = values.shape[axis]
        if old == length:
            continue
        temporal = len(axes) == 1 or (len(axes) == 3 and axis == 0)
        weights = linear_weights(old, length) if temporal else cubic_weights(old, length)
        values = _along(values, axis, weights)
    return values


def _along(values: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    moved = np.tensordot(weights, values.astype(np.float64), (1, axis))
    return np.moveaxis(moved, 0, axis).astype(values.dtype)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Row i holds the shares of the old places in new place i, as PyTorch's bicubic (a = -0.75,
    pixel centres at half-integers, ends repeated)."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        nearest = np.floor(places).astype(int) + offset
        share = _cubic(np.abs(places - nearest))
        np.add.at(weights, (np.arange(new), np.clip(nearest, 0, old - 1)), share)
    return weights


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _fresh(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """As a new model has it, drawn from a stream of the tensor's own."""
    if path.endswith("/bias"):
        return np.zeros(shape, np.float32)
    if path.endswith("/scale"):
        return np.ones(shape, np.float32)
    key = jax.random.key(zlib.crc32(path.encode()))
    if "/pool_" in path:
        bound = float(np.prod(shape[:3])) ** -0.5
        return np.asarray(jax.random.uniform(key, shape, minval=-bound, maxval=bound))
    return np.asarray(jax.nn.initializers.truncated_normal(0.02)(key, shape))
