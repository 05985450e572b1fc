"""The form that each operation takes: its definition, or one for the devices that it runs on.

Also how clips, and kernels with them, are split over devices. The mesh is the one entered by
`jax.set_mesh`; without one there is one device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")  # of the mesh, over both of which clips are split
OPS = ("auto", "reference")

_OPS = contextvars.ContextVar("ops", default="auto")
_PLAIN = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def operations(ops: str) -> Iterator[None]:
    """Traces the operations inside in the platform's forms ("auto") or by definition ("reference").

    A model enters this itself whenever it is called, so that no cached trace has another setting.
    """
    token = _OPS.set(ops)
    try:
        yield
    finally:
        _OPS.reset(token)


def by_definition() -> bool:
    """True inside `operations("reference")`: no kernels, no gradients written by hand."""
    return _OPS.get() == "reference"


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """What is traced in here has no kernels: a program for several platforms cannot hold those of
    one, and cuDNN's calls are not kept compatible, so they cannot be written to files."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def kernels_allowed() -> bool:
    return not _PLAIN.get()


def with_gradient_of(plain: Callable, kernel: Callable) -> Callable:
    """`kernel`, which has no gradient, with that of `plain`: for second derivatives."""
    function = jax.custom_vjp(kernel)
    function.defvjp(
        lambda *arrays: (kernel(*arrays), arrays),
        lambda arrays, gradient: jax.vjp(plain, *arrays)[1](gradient),
    )
    return function


def saving(function: Callable) -> Callable:
    """The forward pass of a `jax.custom_vjp` of two arrays, which keeps these for the backward."""
    return lambda x, weight, *fixed: (function(x, weight, *fixed), (x, weight))


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh` that clips are split over; none without one."""
    return tuple(a for a in BATCH_AXES if a in jax.sharding.get_abstract_mesh().axis_names)


def each_device_has_clips(batch: Any) -> bool:
    """Whether kernels can have a batch: it divides among the devices. Of one that an exported
    program leaves open, that is not known."""
    if not isinstance(batch, int) or _PLAIN.get():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return False
    return batch % _parts() == 0


def clips_are_split() -> bool:
    """Whether there are several devices to split them over."""
    return _parts() > 1


def _parts() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in batch_axes())


def on_each_device(function: Callable) -> Callable:
    """Has each device call `function` on its own clips: XLA cannot cut a kernel by itself.

    Arrays of two dimensions, weights, go whole to every device.
    """
    if not batch_axes():
        return function

    def split(*arrays):
        clips, copied = PartitionSpec(batch_axes()), PartitionSpec()
        specs = tuple(jax.tree.map(lambda x: clips if x.ndim != 2 else copied, a) for a in arrays)
        return jax.shard_map(function, in_specs=specs, out_specs=clips, check_vma=False)(*arrays)

    return split


def keep_batch_sharded(x: Array) -> Array:
    """On a mesh, holds activations split by clip, so that weights are gathered and never these.

    The mesh is the one entered by `jax.set_mesh`; without one this does nothing.
    """
    axes = batch_axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x
