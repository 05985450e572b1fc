"""PyTorch checkpoints of MViT into models: PySlowFast, torchvision, PyTorchVideo, timm."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from mvit_jax.errors import UserError
from mvit_jax.models import mvit
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.variants import variant as variant_config
from mvit_jax.weights import layouts, surgery
from mvit_jax.weights.containers import Tensors, read_tensors, state_dict
from mvit_jax.weights.report import Line, Report, WeightsError
from mvit_jax.weights.structure import Structure, structure, without_prefix
from mvit_jax.weights.surgery import Inflation


@dataclass(frozen=True)
class Loaded:
    """Parameters from a checkpoint: nested as in the model, float32; and how they came."""

    params: mvit.Params
    config: MViTConfig
    report: Report
    family: str
    ranks: dict[str, int]  # of patch and pooling kernels in the file: 4 or 5


def load_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    variant: str,
    /,
    *,
    inflate: Inflation | None = None,
    dtype=jnp.float32,
    **overrides: Any,
) -> tuple[mvit.MViT, Report]:
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
    return mvit.from_params(loaded.params, loaded.config, dtype=dtype), loaded.report


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
    if isinstance(source, Mapping):
        tensors, name = state_dict(source), "these tensors"
    else:
        tensors, name = read_tensors(source), os.fspath(source)
    state, prefix = without_prefix(tensors.tensors)
    found = structure(state, variant, config, set(overrides), inflate is not None)
    report = Report(f"{name}: {found.family} -> {variant}, {len(state)} tensors")
    report.notes += _notes(tensors, prefix)
    report.problems += found.problems
    if found.problems:
        raise WeightsError(report)
    changed = set(overrides)
    if found.crosses and inflate:
        changed |= {"positions", "class_token", "relative_positions", "num_classes"}
    params = _fit_all(_read(state, found, report), found, changed, inflate, report)
    if not report.ok:
        raise WeightsError(report)
    ranks = {} if found.crosses else _ranks(state)
    return Loaded(params, found.config, report, found.family, ranks)


@dataclass(frozen=True)
class _Source:
    """A tensor in our shape, and where it came from."""

    name: str
    shape: tuple[int, ...]  # in the file
    values: np.ndarray
    done: str


def _read(state: Mapping[str, np.ndarray], found: Structure, report: Report) -> dict[str, _Source]:
    """The file's tensors by our paths; what has no place goes to the report."""
    known = layouts.known_names(found.family, found.source)
    sources: dict[str, _Source] = {}
    for name, values in state.items():
        shape = tuple(values.shape)
        if name not in known:
            report.lines.append(_unknown(name, values, state))
            continue
        if not np.issubdtype(values.dtype, np.number) and values.dtype.name != "bfloat16":
            report.lines.append(Line(name, shape, "", None, f"is {values.dtype}", True))
            continue
        numbers = np.asarray(values, np.float32)
        kind = "" if values.dtype == np.float32 else f", from {values.dtype}"
        if not np.isfinite(numbers).all():
            report.lines.append(Line(name, shape, "", None, "holds values not finite", True))
        for path in known[name]:
            try:
                ours = layouts.to_ours(path, numbers, found.source)
            except ValueError as error:
                report.lines.append(Line(name, shape, path, None, str(error), True))
                continue
            if path in sources:
                done = f"collides with {sources[path].name}: both are {path}"
                report.lines.append(Line(name, shape, path, None, done, True))
                continue
            sources[path] = _Source(name, shape, ours.values, ours.done + kind)
    return sources


def _unknown(name: str, values: np.ndarray, state: Mapping[str, np.ndarray]) -> Line:
    shape = tuple(values.shape)
    second = re.sub(r"\._attention_pool_([qkv])\.(pool|norm)\.", r".\2_\1.", name)
    if second != name and second in state:  # PyTorchVideo stores pools under two names
        same = np.array_equal(values, state[second], equal_nan=True)
        done = f"second name of {second}" if same else f"differs from its other name {second}"
        return Line(name, shape, "", None, done, not same)
    first = re.sub(r"^(module|_orig_mod|model|backbone|encoder)\.", "", name)
    if first != name and first in state:
        return Line(name, shape, "", None, f"collides with {first}", True)
    return Line(name, shape, "", None, "has no place in this model", True)


def _fit_all(
    sources: dict[str, _Source], found: Structure, changed: set[str], inflate, report: Report
) -> mvit.Params:
    values = {path: source.values for path, source in sources.items()}
    fitted, left = surgery.adapt(values, found.config, changed=changed, inflate=inflate)
    for path, one in fitted.items():
        origin = [sources[p] for p in one.used]
        steps = [origin[0].done] if origin else []
        steps += [one.done] if one.done != "copied" or not steps else []
        steps = [step for step in steps if step != "copied"] or ["copied"]
        new = None if one.values is None else one.values.shape
        line = Line(
            " + ".join(dict.fromkeys(o.name for o in origin)),
            origin[0].shape if origin else None,
            path,
            new,
            ", ".join(steps),
            problem=one.values is None,
        )
        report.lines.append(line)
    for path, may_be in left.items():
        done = "unused" if may_be else "unused, though the file is of this model"
        report.lines.append(
            Line(sources[path].name, sources[path].shape, "", None, done, not may_be)
        )
    report.notes += _sizes(report)
    return mvit.nested({path: one.values for path, one in fitted.items()})


def _sizes(report: Report) -> list[str]:
    resized = [line for line in report.lines if line.done.endswith("resized")]
    if not resized:
        return []
    return [f"{len(resized)} tables of positions were made for another size and interpolated"]


def _notes(tensors: Tensors, prefix: str) -> list[str]:
    notes = []
    if tensors.wrapper:
        notes.append(f"read from its entry {tensors.wrapper!r}")
    if prefix:
        notes.append(f"{prefix!r} was taken off all names")
    return notes


def _ranks(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    ranks = {}
    for name, values in state.items():
        if re.search(r"pool_[qkv]\.(pool\.)?weight$", name):
            ranks["pool"] = values.ndim
        elif re.match(r"(patch_embed\.(proj|patch_model)|conv_proj)\.weight$", name):
            ranks["patch"] = values.ndim
    return ranks
