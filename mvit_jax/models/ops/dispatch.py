"""Selection of the implementation of each operation, and sharding of batches and kernels.

An operation has a reference implementation and faster implementations for some platforms. The mesh
is set by `jax.set_mesh`; without a mesh, a program runs on one device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")  # mesh axes over which the batch is sharded
OPS = ("auto", "reference")

_OPS = contextvars.ContextVar("ops", default="auto")
_KERNELS = contextvars.ContextVar("kernels", default=True)


@contextlib.contextmanager
def operations(ops: str) -> Iterator[None]:
    """Selects the implementations that are traced inside this context.

    Every call of a model enters this context, so tracing always uses the model's own setting.

    Args:
      ops: "auto" for the platform's fastest implementations, or "reference".
    """
    token = _OPS.set(ops)
    try:
        yield
    finally:
        _OPS.reset(token)


def uses_reference() -> bool:
    """Returns True inside `operations("reference")`: no kernels, no hand-written gradients."""
    return _OPS.get() == "reference"


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Disables Pallas and cuDNN kernels during tracing, for export.

    A program for several platforms cannot contain the kernels of one of them. cuDNN calls are not
    serialisable, since their format may change between versions.
    """
    token = _KERNELS.set(False)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def kernels_allowed() -> bool:
    return _KERNELS.get()


def with_gradient_of(plain: Callable, kernel: Callable) -> Callable:
    """Returns `kernel`, which has no gradient, with the gradient of `plain`.

    Second derivatives need this gradient, as they differentiate the forward and backward kernels.
    """
    function = jax.custom_vjp(kernel)
    function.defvjp(
        lambda *arrays: (kernel(*arrays), arrays),
        lambda arrays, gradient: jax.vjp(plain, *arrays)[1](gradient),
    )
    return function


def saving_inputs(function: Callable) -> Callable:
    """Returns the forward pass of a `jax.custom_vjp` that saves its two array arguments."""
    return lambda x, weight, *fixed: (function(x, weight, *fixed), (x, weight))


def batch_axes() -> tuple[str, ...]:
    """Returns the mesh axes over which the batch is sharded; none without a mesh."""
    return tuple(a for a in BATCH_AXES if a in jax.sharding.get_abstract_mesh().axis_names)


def batch_is_divisible(batch: Any) -> bool:
    """Returns True if kernels can run on a batch of this size, divisible by the number of shards.

    Returns False for an exported program's symbolic batch size, for a mesh whose axes are not all
    `AxisType.Auto`, and inside `without_kernels`.
    """
    if not isinstance(batch, int) or not kernels_allowed():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return False
    return batch % _batch_shards() == 0


def batch_is_sharded() -> bool:
    """Returns True if the mesh shards the batch over several devices."""
    return _batch_shards() > 1


def _batch_shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in batch_axes())


def on_each_device(function: Callable) -> Callable:
    """Returns `function` mapped over the mesh's devices, as XLA cannot partition a kernel.

    Two-dimensional arrays (weights, key features) are replicated. All others are sharded by batch.
    """
    if not batch_axes():
        return function

    def split(*arrays):
        by_batch, whole = PartitionSpec(batch_axes()), PartitionSpec()
        specs = tuple(jax.tree.map(lambda x: by_batch if x.ndim != 2 else whole, a) for a in arrays)
        return jax.shard_map(function, in_specs=specs, out_specs=by_batch, check_vma=False)(*arrays)

    return split


def keep_batch_sharded(x: Array) -> Array:
    """Constrains activations to be sharded by batch, so that XLA gathers weights, not activations.

    Without a mesh, `x` is returned unchanged.
    """
    axes = batch_axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x
