"""Mesh, and shardings of the batch and the state.

The batch is sharded over both axes of the mesh `("data", "fsdp")`. The state is replicated along
"data" and sharded along "fsdp" (fully sharded data parallelism). So `fsdp=1` is plain data
parallelism, and `data=1` shards the state over all devices. On a pod of several slices each fsdp
group lies within one slice, so that only gradients cross the slower network between slices.
"""

from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mvit_jax.common.errors import UserError

AXES = ("data", "fsdp")
# Smaller leaves (norms, biases) are replicated: gathering them costs more than sharding saves.
SMALLEST_SHARDED = 2**11  # elements


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """Returns a mesh of `data` x `fsdp` devices of all processes.

    Args:
      data: size of the "data" axis; -1 for the number of devices divided by `fsdp`.
      fsdp: size of the "fsdp" axis.
      devices: by default all devices.

    Raises:
      UserError: `data` x `fsdp` is not the number of devices, or an fsdp group spans two slices.
    """
    devices = _in_order(jax.devices() if devices is None else devices)
    shape = mesh_shape(data, fsdp, len(devices))
    _check_slices(devices, fsdp)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_shape(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    """Returns the sizes of the axes "data" and "fsdp" on a number of devices; see `make_mesh`.

    Raises:
      UserError: `data` x `fsdp` is not the number of devices.
    """
    if fsdp < 1 or (data == -1 and devices % fsdp):
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {devices} devices; set a divisor of {devices}"
        )
    data = devices // fsdp if data == -1 else data
    if data * fsdp != devices:
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} requires {data * fsdp} devices, but there are "
            f"{devices}; set mesh.data=-1 to use all"
        )
    return data, fsdp


def _in_order(devices) -> list:
    """Sorts devices by slice, process and index.

    Each process then loads a contiguous range of the batch's rows.

    `mesh_utils.create_hybrid_device_mesh` also separates slices, and aligns the axes of the mesh
    with the TPU's torus. But it splits the 2 x 2 chips of a host: on v5e:16x16 with fsdp=16, the
    rows of 64 hosts lie in 128 separate ranges. The alignment would only help if fsdp were more
    than 1 and less than a slice, which models of up to 218M parameters do not need.
    """
    return sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))


def _slice(device) -> int:
    """Returns the slice index of a device; 0 if the device has none."""
    return getattr(device, "slice_index", None) or 0


def _check_slices(devices: list, fsdp: int) -> None:
    # On GPUs, JAX counts each machine as a slice, and an fsdp group may span machines.
    if devices[0].platform != "tpu":
        return
    chips = Counter(map(_slice, devices))
    for number, count in chips.items():
        if count % fsdp:
            raise UserError(
                f"mesh.fsdp={fsdp} does not divide the {count} chips of slice {number}, one of "
                f"{len(chips)}: its groups would span slices; set a divisor of "
                f"{count}"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows are split over all devices in order."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, tree):
    """Returns shardings for a tree of arrays or shapes.

    A leaf of at least `SMALLEST_SHARDED` elements is sharded along its largest dimension that is
    divisible by the size of the "fsdp" axis. All other leaves are replicated.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh)), tree)


def with_shardings(shapes, shardings):
    """Returns a tree of abstract arrays: `shapes` with the shardings of a second tree."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, n in enumerate(shape) if n % parts == 0]
    if parts == 1 or not divisible or np.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(["fsdp" if axis == longest else None for axis in range(len(shape))]))


def local_rows(batch: int, mesh: Mesh, process: int | None = None) -> range:
    """Returns the rows of a global batch that a process loads, by default this process.

    Raises:
      UserError: the batch is not divisible over the mesh.
      ValueError: the devices of the process are not contiguous in the mesh.
    """
    if batch % mesh.size:
        raise UserError(
            f"a batch of {batch} is not divisible by {mesh.size} devices; "
            f"set a multiple of {mesh.size}"
        )
    process = jax.process_index() if process is None else process
    positions = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == process]
    if not positions or positions != list(range(positions[0], positions[-1] + 1)):
        raise ValueError(
            f"the devices of process {process} are not contiguous in the mesh: {positions}"
        )
    share = batch // mesh.size
    return range(positions[0] * share, (positions[-1] + 1) * share)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a global batch on the mesh, assembled from the rows that each process has loaded."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
