"""PyTorch checkpoints of MViT into models: PySlowFast, torchvision, PyTorchVideo, timm."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import Params, functional
from mvit_jax.models.mvit import MViT
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.variants import variant as variant_config
from mvit_jax.weights import adapt, key_tables
from mvit_jax.weights.adapt import Inflation
from mvit_jax.weights.detect import PREFIXES, Structure, structure, without_prefix
from mvit_jax.weights.report import Line, Report, WeightsError
from mvit_jax.weights.tensor_files import Tensors, read_tensors, state_dict


@dataclass(frozen=True)
class Loaded:
    """Parameters from a checkpoint: nested as in the model, float32; and how they came."""

    params: Params
    config: MViTConfig
    report: Report
    origin: key_tables.Origin


def load_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    variant: str,
    /,
    *,
    inflate: Inflation | None = None,
    dtype=jnp.float32,
    **overrides: Any,
) -> tuple[MViT, Report]:
    """A model with the weights of a PyTorch checkpoint, in inference mode; and the report.

    `load_torch("k400.pyth", "mvit_b_16x4", num_classes=10)`: whose file it is and which pools it
    has is read off its names and shapes; strides come from the variant. Pickles are never run.

    Args:
      source: a file of PySlowFast, torchvision, PyTorchVideo, timm or safetensors, or a mapping of
        names to arrays.
      variant: a name of `python -m mvit_jax.describe --all`.
      inflate: how an image model becomes a video model or back: "centre", "mean" or "repeat".
      dtype: what the model computes in; its parameters are float32.
      overrides: fields of `MViTConfig`. Another `num_classes` than the file's gives a new
        classifier; other `frames` or `size` resize the positions.

    Raises:
      UserError: a file that cannot be read. `WeightsError`, with the whole report, where something
        that should have been loaded was not.
    """
    loaded = load(source, variant, inflate=inflate, **overrides)
    params = jax.tree.map(jnp.asarray, loaded.params)
    return functional(loaded.config, dtype=dtype).module(params), loaded.report


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    variant: str,
    /,
    *,
    inflate: Inflation | None = None,
    **overrides: Any,
) -> Loaded:
    """`load_torch`, but parameters and config instead of a module."""
    if inflate not in (None, *get_args(Inflation)):
        raise UserError(f"inflate must be centre, mean or repeat, not {inflate!r}")
    config = variant_config(variant, **overrides)
    tensors, name = _open(source)
    state, prefix = without_prefix(tensors.tensors)
    try:
        found = structure(state, variant, config, set(overrides), inflate is not None)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    report = Report(f"{name}: {found.family} -> {variant}, {len(state)} tensors")
    if tensors.wrapper:
        report.notes.append(f"read from its entry {tensors.wrapper!r}")
    if prefix:
        report.notes.append(f"{prefix!r} was taken off all names")
    report.problems += found.problems
    if found.problems:
        raise WeightsError(report)
    meant = set(overrides)
    if found.crosses:
        meant |= {"positions", "class_token", "relative_positions", "num_classes"}
    changed = {f for f in meant if found.shown.get(f) != getattr(found.config, f)}
    sources = _read(state, found, report)
    params = _fit_all(sources, found, changed, inflate, report)
    report.notes += _sizes(report, sources, found)
    if not report.ok:
        raise WeightsError(report)
    return Loaded(params, found.config, report, _origin(state, found))


def _open(source: Any) -> tuple[Tensors, str]:
    """The tensors of a file or of a mapping, and what to call it."""
    if isinstance(source, Mapping):
        return state_dict(source), "these tensors"
    if isinstance(source, str | os.PathLike):
        return read_tensors(source), os.fspath(source)
    raise UserError(
        f"weights come from a file's path or a state dict, not from a {type(source).__name__}: of "
        "a PyTorch module pass module.state_dict()"
    )


@dataclass(frozen=True)
class _Source:
    """A tensor in our shape, and where it came from."""

    name: str
    shape: tuple[int, ...]  # in the file
    values: np.ndarray
    done: str


def _read(
    state: Mapping[str, np.ndarray], found: Structure, report: Report
) -> dict[str, _Source | None]:
    """The file's tensors by our paths, None for those that are of no use; the report has why."""
    known = key_tables.known_names(found.family, found.source)
    sources: dict[str, _Source | None] = {}
    for name, values in state.items():
        shape = tuple(values.shape)
        if name not in known:
            report.lines.append(_unknown(name, values, state))
            continue
        useless = _useless(values)
        for path in known[name]:
            if path in sources:
                other = sources[path]
                done = f"collides with {other.name if other else 'another'}: both are {path}"
                report.lines.append(Line(name, shape, path, None, done, True))
                continue
            sources[path] = None
            if useless:
                report.lines.append(Line(name, shape, path, None, useless, True))
                continue
            try:
                ours = key_tables.to_ours(path, np.asarray(values, np.float32), found.source)
            except ValueError as error:
                report.lines.append(Line(name, shape, path, None, str(error), True))
                continue
            kind = "" if values.dtype == np.float32 else f", from {values.dtype}"
            sources[path] = _Source(name, shape, ours.values, ours.done + kind)
    return sources


def _useless(values: np.ndarray) -> str:
    """Why a tensor is no weight, or ""."""
    real = np.issubdtype(values.dtype, np.number) and not np.iscomplexobj(values)
    if not real and values.dtype.name != "bfloat16":
        return f"is {values.dtype}"
    if values.size == 0:
        return "is empty"
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is told
        finite = np.isfinite(np.asarray(values, np.float32)).all()
    return "" if finite else "holds values not finite"


def _unknown(name: str, values: np.ndarray, state: Mapping[str, np.ndarray]) -> Line:
    shape = tuple(values.shape)
    second = re.sub(r"\._attention_pool_([qkv])\.(pool|norm)\.", r".\2_\1.", name)
    if second != name and second in state:  # PyTorchVideo stores pools under two names
        same = np.array_equal(values, state[second], equal_nan=True)
        done = f"second name of {second}" if same else f"differs from its other name {second}"
        return Line(name, shape, "", None, done, not same)
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    if prefix and name.removeprefix(prefix) in state:
        done = f"collides with {name.removeprefix(prefix)}"
        return Line(name, shape, "", None, done, True)
    return Line(name, shape, "", None, "has no place in this model", True)


def _fit_all(
    sources: dict[str, _Source | None], found: Structure, changed: set[str], inflate, report: Report
) -> Params:
    use = {path: source for path, source in sources.items() if source is not None}
    values = {path: source.values for path, source in use.items()}
    fitted, left = adapt.adapt(values, functional(found.config), changed=changed, inflate=inflate)
    shapes = functional(found.config).shapes()
    for path, one in fitted.items():
        if one.values is None and path in sources and path not in use:
            continue  # the report has said why
        origin = [use[p] for p in one.used]
        steps = [origin[0].done] if origin else []
        steps += [one.done] if one.done != "copied" or not steps else []
        steps = [step for step in steps if step != "copied"] or ["copied"]
        if one.values is None and not origin:
            name = key_tables.foreign_name(path, found.family, found.config)
            advice = ": give num_classes for a new classifier" if path.startswith("head/") else ""
            steps = [f"{name} is missing from the file{advice}"]
        names = " + ".join(dict.fromkeys(o.name for o in origin))
        shape = origin[0].shape if origin else None
        done = ", ".join(steps)
        report.lines.append(Line(names, shape, path, shapes[path], done, one.values is None))
    for path, may_be in left.items():
        name, shape = use[path].name, use[path].shape
        done = "unused" if may_be else "unused: the model has no such tensor"
        report.lines.append(Line(name, shape, "", None, done, not may_be))
    return unflatten_dict({path: one.values for path, one in fitted.items()}, sep="/")


def _sizes(report: Report, sources: Mapping[str, _Source | None], found: Structure) -> list[str]:
    resized = [line for line in report.lines if line.done.endswith("resized")]
    if not resized:
        return []
    config, fields = found.config, []
    time, space = (_places(sources, axis) for axis in ("time", "space"))
    if time and found.source.frames > 1:
        fields.append(f"frames={time * config.patch_stride[0]}")
    if space:
        fields.append(f"size={space * config.patch_stride[1]}")
    made = f": they were made for {' '.join(fields)}, which keeps them" if fields else ""
    return [
        f"{len(resized)} tables of positions were interpolated to frames={config.frames} "
        f"size={config.size}{made}"
    ]


def _places(sources: Mapping[str, _Source | None], axis: str) -> int | None:
    """Places along time, or along a side, that the file's tables were made for."""
    own = sources.get(f"positions/{axis}")
    if own is not None:
        return len(own.values)
    joint = sources.get("positions/joint")
    if joint is not None:
        return joint.values.shape[0 if axis == "time" else 1]
    name = "time" if axis == "time" else "height"
    relative = sources.get(f"blocks/0/attn/relative/{name}")
    return None if relative is None else (len(relative.values) + 1) // 2


def _origin(state: Mapping[str, np.ndarray], found: Structure) -> key_tables.Origin:
    ranks = {}
    for name, values in state.items():
        if re.search(r"pool_[qkv]\.(pool\.)?weight$", name):
            ranks["pool"] = values.ndim
        elif re.match(r"(patch_embed\.(proj|patch_model)|conv_proj)\.weight$", name):
            ranks["patch"] = values.ndim
    dtypes = {values.dtype.name for values in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    # A video model that was made of an image model does not go back into that one's shapes.
    return key_tables.Origin(found.family, {} if found.crosses else ranks, dtype)
