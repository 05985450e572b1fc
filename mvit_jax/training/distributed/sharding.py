"""Which device holds what: the mesh, the batch, and the state.

The batch is split over both axes of the mesh `("data", "fsdp")`; the state is copied along "data"
and split along "fsdp" (fully sharded data parallelism). So `fsdp=1` is plain data parallelism,
`data=1` shards the state over all devices, and with several slices of a pod an fsdp group lies
within one: what goes between slices, over the slower network, are gradients alone.
"""

from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mvit_jax.common.errors import UserError

AXES = ("data", "fsdp")
# Smaller leaves (norms, biases) are copied: gathering them would cost more than it saves.
SMALLEST_SHARDED = 2**11  # elements


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """A mesh of `data` x `fsdp` devices, of all processes; `data=-1` takes all that are left.

    Raises:
      UserError: the devices do not divide so, or an fsdp group would lie in two slices.
    """
    devices = _in_order(jax.devices() if devices is None else devices)
    if fsdp < 1 or (data == -1 and len(devices) % fsdp):
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices; set a divisor of it"
        )
    data = len(devices) // fsdp if data == -1 else data
    if data * fsdp != len(devices):
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} are {data * fsdp} devices, and there are "
            f"{len(devices)}; set mesh.data=-1 to use all"
        )
    _check_slices(devices, fsdp)
    grid = np.asarray(devices).reshape(data, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def _in_order(devices) -> list:
    """Devices by slice, process and number.

    A process then has neighbouring rows of a batch, and an fsdp group is a row of hosts.
    `mesh_utils.create_hybrid_device_mesh` also keeps slices apart, and beyond that lays each axis
    of the mesh along an axis of the TPU's torus. That cuts the 2 x 2 chips of a host in two (on
    v5e:16x16 with fsdp=16 the rows of 64 hosts lie in 128 pieces), in exchange for groups that are
    rings of the torus. With fsdp=1 or fsdp over a whole slice, all that models of at most 218M
    parameters call for, a group is all chips of the slice, in whatever order.
    """
    return sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))


def _slice(device) -> int:
    """The slice of a device, 0 where there is one; on GPUs the machines with a common NVLink."""
    return getattr(device, "slice_index", None) or 0


def _check_slices(devices: list, fsdp: int) -> None:
    # What JAX calls a slice of GPUs is one machine, and several of them may well share a state.
    if devices[0].platform != "tpu":
        return
    chips = Counter(map(_slice, devices))
    for number, count in chips.items():
        if count % fsdp:
            raise UserError(
                f"mesh.fsdp={fsdp} does not divide the {count} chips of slice {number}, one of "
                f"{len(chips)}: parameters would be gathered between slices; set a divisor of it"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are dealt to all devices in order."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, tree):
    """Shardings for a tree of arrays (or their shapes): each large leaf is split along its largest
    dimension that the "fsdp" axis divides, every other one is copied."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh)), tree)


def placed(shapes, shardings):
    """Returns a tree of shapes with the shardings of another."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
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
    """The rows of a global batch that a process reads, by default this one."""
    if batch % mesh.size:
        raise UserError(
            f"a batch of {batch} does not divide among {mesh.size} devices; "
            f"set a multiple of {mesh.size}"
        )
    process = jax.process_index() if process is None else process
    places = [i for i, d in enumerate(mesh.devices.flat) if d.process_index == process]
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"process {process} has the devices {places} of the mesh, not neighbours")
    share = batch // mesh.size
    return range(places[0] * share, (places[-1] + 1) * share)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows, as part of a global batch on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
