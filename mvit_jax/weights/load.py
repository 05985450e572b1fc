"""Loading of PyTorch checkpoints of PySlowFast, torchvision, PyTorchVideo and timm."""

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
from mvit_jax.weights.detect import PREFIXES, Structure, is_supported, strip_prefixes, structure
from mvit_jax.weights.report import Line, Report, WeightsError
from mvit_jax.weights.tensor_files import Tensors, read_tensors, state_dict


@dataclass(frozen=True)
class Loaded:
    """Parameters of a checkpoint with their config, report and origin."""

    params: Params  # nested as in the model, float32
    config: MViTConfig
    report: Report
    origin: key_tables.Origin  # checkpoint format, for writing the weights back


def load_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    variant: str,
    /,
    *,
    inflate: Inflation | None = None,
    weights: str | None = None,
    dtype=jnp.float32,
    **overrides: Any,
) -> tuple[MViT, Report]:
    """Returns a model in inference mode with the weights of a PyTorch checkpoint, and a report.

        model, report = load_torch("k400.pyth", "mvit_b_16x4", num_classes=10)

    The checkpoint format and the pooling layers are detected from tensor names and shapes. Strides
    come from the variant. Pickles are read without executing them.

    Args:
      source: a file of PySlowFast, torchvision, PyTorchVideo or timm, in PyTorch's file format or
        as safetensors; or a mapping of names to arrays or torch tensors.
      variant: a name listed by `python -m mvit_jax.describe --all`.
      inflate: conversion of an image model to a video model or back: "centre", "mean" or "repeat".
      weights: "plain", or "ema" for averaged weights, if the file has both. By default averaged
        weights if there are any; the report has a note.
      dtype: dtype of the computation; parameters are float32.
      overrides: fields of `MViTConfig`. If `num_classes` differs from the file's, the classifier
        is newly initialised. If `frames` or `size` differ, positional embeddings are resized.

    Raises:
      UserError: the file cannot be read.
      WeightsError: the checkpoint does not fit; the error's `report` lists every tensor.
    """
    loaded = load(source, variant, inflate=inflate, weights=weights, **overrides)
    params = jax.tree.map(jnp.asarray, loaded.params)
    return functional(loaded.config, dtype=dtype).module(params), loaded.report


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    variant: str,
    /,
    *,
    inflate: Inflation | None = None,
    weights: str | None = None,
    **overrides: Any,
) -> Loaded:
    """Loads a checkpoint as `load_torch` does, but builds no module."""
    if inflate not in (None, *get_args(Inflation)):
        raise UserError(f"inflate must be centre, mean or repeat, not {inflate!r}")
    config = variant_config(variant, **overrides)
    tensors, name = _open(source, weights)
    state, prefix = strip_prefixes(tensors.tensors)
    try:
        arch = structure(state, variant, config, set(overrides), inflate is not None)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    report = Report(f"{name}: {arch.format} -> {variant}, {len(state)} tensors")
    report.notes += _note_origin(tensors)
    if prefix:
        report.notes.append(f"the prefix {prefix!r} was removed from the names")
    report.problems += arch.problems
    if arch.problems:
        raise WeightsError(report)
    may_differ = set(overrides)
    if arch.crosses:
        may_differ |= {"positions", "class_token", "relative_positions", "num_classes"}
    changed = {f for f in may_differ if arch.fields.get(f) != getattr(arch.config, f)}
    sources = _read(state, arch, report)
    params = _fit_all(sources, arch, changed, inflate, report)
    report.notes += _note_resized(report, sources, arch)
    if not report.ok:
        raise WeightsError(report)
    return Loaded(params, arch.config, report, _origin(state, arch))


def _open(source: Any, weights: str | None = None) -> tuple[Tensors, str]:
    """Returns the tensors of a file or a mapping, and its name for messages."""
    selection = {"weights": weights, "recognised": is_supported}
    if isinstance(source, Mapping):
        return state_dict(source, **selection), "the state dict"
    if isinstance(source, str | os.PathLike):
        return read_tensors(source, **selection), os.fspath(source)
    raise UserError(
        f"weights are read from a file or a state dict, not from a {type(source).__name__}: "
        "for a PyTorch module, pass module.state_dict()"
    )


def _note_origin(tensors: Tensors) -> list[str]:
    """Returns notes on the entry that holds the weights, and on other weights in the file."""
    notes = []
    if tensors.wrapper:
        kind = ", averaged weights" if tensors.averaged else ""
        notes.append(f"read from the entry {tensors.wrapper!r}{kind}")
    if tensors.alternatives:
        alternatives = [
            f"{path!r}" + (f" (weights={kind} reads it)" if kind else "")
            for path, kind in tensors.alternatives.items()
        ]
        notes.append(f"the file has other weights, which were not read: {', '.join(alternatives)}")
    return notes


@dataclass(frozen=True)
class _Source:
    """A tensor of the file, converted to this project's shape."""

    name: str  # in the file
    shape: tuple[int, ...]  # in the file
    values: np.ndarray
    done: str  # the conversion


def _read(
    state: Mapping[str, np.ndarray], arch: Structure, report: Report
) -> dict[str, _Source | None]:
    """Returns the file's tensors by path, converted to this project's shapes.

    An unusable tensor is None, and `report` gets a line with the reason.
    """
    paths_by_name = key_tables.paths_by_name(arch.format, arch.source)
    sources: dict[str, _Source | None] = {}
    for name, values in state.items():
        shape = tuple(values.shape)
        if name not in paths_by_name:
            report.lines.append(_describe_unknown(name, values, state))
            continue
        defect = _defect(values)
        for path in paths_by_name[name]:
            if path in sources:
                other = sources[path]
                done = f"conflicts with {other.name if other else 'another'}: both map to {path}"
                report.lines.append(Line(name, shape, path, None, done, True))
                continue
            sources[path] = None
            if defect:
                report.lines.append(Line(name, shape, path, None, defect, True))
                continue
            try:
                ours = key_tables.to_ours(path, np.asarray(values, np.float32), arch.source)
            except ValueError as error:
                report.lines.append(Line(name, shape, path, None, str(error), True))
                continue
            kind = "" if values.dtype == np.float32 else f", from {values.dtype}"
            sources[path] = _Source(name, shape, ours.values, ours.done + kind)
    return sources


def _defect(values: np.ndarray) -> str:
    """Returns the reason why a tensor cannot be a weight, or ""."""
    real = np.issubdtype(values.dtype, np.number) and not np.iscomplexobj(values)
    if not real and values.dtype.name != "bfloat16":
        return f"has the dtype {values.dtype}, which cannot be a weight"
    if values.size == 0:
        return "is empty"
    with np.errstate(over="ignore"):  # float64 beyond float32's range becomes infinite
        finite = np.isfinite(np.asarray(values, np.float32)).all()
    return "" if finite else "has non-finite values"


def _describe_unknown(name: str, values: np.ndarray, state: Mapping[str, np.ndarray]) -> Line:
    shape = tuple(values.shape)
    if name == "n_averaged":  # of torch.optim.swa_utils.AveragedModel
        return Line(name, shape, "", None, "unused: the number of averaged updates")
    second = re.sub(r"\._attention_pool_([qkv])\.(pool|norm)\.", r".\2_\1.", name)
    if second != name and second in state:  # PyTorchVideo stores pools under two names
        same = np.array_equal(values, state[second], equal_nan=True)
        done = f"second name of {second}" if same else f"differs from {second}, its second name"
        return Line(name, shape, "", None, done, not same)
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    if prefix and name.removeprefix(prefix) in state:
        done = f"conflicts with {name.removeprefix(prefix)}"
        return Line(name, shape, "", None, done, True)
    return Line(name, shape, "", None, "has no counterpart in this model", True)


def _fit_all(
    sources: dict[str, _Source | None], arch: Structure, changed: set[str], inflate, report: Report
) -> Params:
    use = {path: source for path, source in sources.items() if source is not None}
    values = {path: source.values for path, source in use.items()}
    fitted, unused = adapt.adapt(values, functional(arch.config), changed=changed, inflate=inflate)
    shapes = functional(arch.config).shapes()
    for path, tensor in fitted.items():
        if tensor.values is None and path in sources and path not in use:
            continue  # the report already has the reason
        origin = [use[p] for p in tensor.used]
        steps = [origin[0].done] if origin else []
        steps += [tensor.done] if tensor.done != "copied" or not steps else []
        steps = [step for step in steps if step != "copied"] or ["copied"]
        if tensor.values is None and not origin:
            name = key_tables.foreign_name(path, arch.format, arch.config)
            advice = ": add num_classes=N for a new classifier" if path.startswith("head/") else ""
            steps = [f"{name} is missing from the file{advice}"]
        names = " + ".join(dict.fromkeys(o.name for o in origin))
        shape = origin[0].shape if origin else None
        done = ", ".join(steps)
        report.lines.append(Line(names, shape, path, shapes[path], done, tensor.values is None))
    for path, allowed in unused.items():
        name, shape = use[path].name, use[path].shape
        done = "unused" if allowed else "unused: the model has no such tensor"
        report.lines.append(Line(name, shape, "", None, done, not allowed))
    return unflatten_dict({path: t.values for path, t in fitted.items()}, sep="/")


def _note_resized(
    report: Report, sources: Mapping[str, _Source | None], arch: Structure
) -> list[str]:
    resized = [line for line in report.lines if line.done.endswith("resized")]
    if not resized:
        return []
    config, fields = arch.config, []
    time, space = (_grid_length(sources, axis) for axis in ("time", "space"))
    if time and arch.source.frames > 1:
        fields.append(f"frames={time * config.patch_stride[0]}")
    if space:
        fields.append(f"size={space * config.patch_stride[1]}")
    trained = f"; those of the file are for {' '.join(fields)}" if fields else ""
    return [
        f"{len(resized)} positional embeddings were interpolated to frames={config.frames} "
        f"size={config.size}{trained}"
    ]


def _grid_length(sources: Mapping[str, _Source | None], axis: str) -> int | None:
    """Returns the length of the token grid along time or along one side.

    The length follows from the file's positional embeddings; None if there are none.
    """
    separate = sources.get(f"positions/{axis}")
    if separate is not None:
        return len(separate.values)
    joint = sources.get("positions/joint")
    if joint is not None:
        return joint.values.shape[0 if axis == "time" else 1]
    name = "time" if axis == "time" else "height"
    relative = sources.get(f"blocks/0/attn/relative/{name}")
    return None if relative is None else (len(relative.values) + 1) // 2


def _origin(state: Mapping[str, np.ndarray], arch: Structure) -> key_tables.Origin:
    ranks = {}
    for name, values in state.items():
        if re.search(r"pool_[qkv]\.(pool\.)?weight$", name):
            ranks["pool"] = values.ndim
        elif re.match(r"(patch_embed\.(proj|patch_model)|conv_proj)\.weight$", name):
            ranks["patch"] = values.ndim
    dtypes = {values.dtype.name for values in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    # An inflated model cannot be written back in the image model's shapes, nor vice versa.
    return key_tables.Origin(arch.format, {} if arch.crosses else ranks, dtype)
