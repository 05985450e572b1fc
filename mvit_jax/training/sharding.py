"""Which device holds what: the mesh, the batch, and the state.

The batch is split over both axes of the mesh `("data", "fsdp")`; the state is copied along "data"
and split along "fsdp" (fully sharded data parallelism).
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mvit_jax.errors import UserError

AXES = ("data", "fsdp")
# Smaller leaves (norms, biases) are copied: gathering them would cost more than it saves.
SMALLEST_SHARDED = 2**11  # elements


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
    """A mesh of `data` x `fsdp` devices; `data=-1` takes all devices that are left."""
    devices = jax.devices() if devices is None else devices
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
    grid = np.asarray(devices).reshape(data, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are dealt to all devices in order."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, tree):
    """Shardings for a tree of arrays (or their shapes): each large leaf is split along its largest
    dimension that the "fsdp" axis divides, every other one is copied."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, mesh)), tree)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    divisible = [axis for axis, n in enumerate(shape) if n % parts == 0]
    if parts == 1 or not divisible or np.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(["fsdp" if axis == longest else None for axis in range(len(shape))]))


def local_rows(batch: int, mesh: Mesh) -> range:
    """The rows of a global batch that this process reads."""
    if batch % mesh.size:
        raise UserError(
            f"a batch of {batch} does not divide among {mesh.size} devices; "
            f"set a multiple of {mesh.size}"
        )
    per_process = batch // jax.process_count()
    return range(jax.process_index() * per_process, (jax.process_index() + 1) * per_process)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows, as part of a global batch on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
