"""Ahead-of-time compilation of an experiment's step for TPUs (extra `tpu`), and the step's costs.

If a program does not fit, XLA's error contains the memory that the program would need.
"""

import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mvit_jax.common import extras
from mvit_jax.config import Config
from mvit_jax.models.plan import MViTConfig
from mvit_jax.podplan.accelerators import Topology
from mvit_jax.podplan.hlo import cost as counting
from mvit_jax.training import build
from mvit_jax.training.distributed import sharding

# Disables queries to a metadata server, warnings about the missing TPU, and the lock on libtpu.
# Without the lock, several processes can compile.
_ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

QUICK = -1.0  # the compiler's least effort

# Kinds of memory, by prefixes of the arguments' names in the train step and the forward pass.
_KINDS = {
    "parameters": ("state.params", "params"),
    "optimiser": ("state.opt_state",),
    "average": ("state.ema",),
    "batch": ("batch", "clip", "boxes"),
}
STATE = ("parameters", "optimiser", "average")


@dataclass(frozen=True)
class Figures:
    """Costs of a program per chip and step.

    Attributes:
      counts: FLOPs, bytes moved, collectives.
      memory: the compiler's memory analysis.
      kinds: bytes of parameters, optimiser state, averaged parameters, batch, program, and
        "activations" (everything else that lives within a step); the sum is `used`.
      xla_bytes: bytes moved according to XLA.
      seconds: compile time.
    """

    counts: counting.Counts
    memory: counting.Memory
    kinds: dict[str, int]
    xla_bytes: float
    seconds: float

    @property
    def used(self) -> int:
        return self.memory.peak


@dataclass(frozen=True)
class TooLarge:
    """A program that does not fit on a chip.

    Attributes:
      used: memory that the program would need, in bytes per chip.
      kinds: this memory by kind; "activations" are the remainder.
      seconds: time until the compiler failed.
    """

    used: int
    kinds: dict[str, int]
    seconds: float


def tpu_mesh(topology: Topology, data: int = -1, fsdp: int = 1, devices: int = 0) -> Mesh:
    """Returns the training program's mesh over the chips of a topology.

    Args:
      topology: the slices.
      data: size of the mesh's data axis; -1 for all remaining chips.
      fsdp: size of the mesh's fsdp axis.
      devices: use only the first `devices` chips; 0 for all.

    Raises:
      UserError: libtpu is not installed, or the mesh does not divide the chips.
    """
    extras.require("libtpu")
    for name, value in _ABSENT.items():  # before libtpu is loaded
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chips_per_slice == 1:  # libtpu assumes four chips per host
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":  # both cores are one device, as in JAX on real chips
        options["chip_config_name"] = "megacore"
    tpus = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    return sharding.make_mesh(data, fsdp, tpus.devices[: devices or None])


def measure(
    config: Config, model: MViTConfig, mesh: Mesh, *, which: str = "train", effort: float = 0.0
) -> Figures | TooLarge:
    """Compiles an experiment's step for `mesh` and returns its costs.

    Args:
      config: the experiment's config.
      model: the architecture.
      mesh: a mesh of TPU devices, see `tpu_mesh`.
      which: "train" for the train step, "forward" for a test's forward pass with one view per
        video.
      effort: the compiler's effort, from -1 to 1; 0 is the default. `QUICK` compiles about five
        times as fast. FLOPs, collectives and memory remain the same, but HBM traffic is overstated,
        as the compiler prefetches nothing into on-chip memory.
    """
    with jax.set_mesh(mesh), jax.default_matmul_precision(config.precision):
        settings = build.with_loss_reduction(
            config, build.settings(config, model.num_classes), mesh
        )
        program = build.program(config, settings, mesh)
        batch = build.batch_shapes(config, model, mesh)
        state = program.state
        if which == "train":
            lowered = program.step.lower(state, batch, jax.ShapeDtypeStruct((), np.float32))
            arguments = (state.params, state.opt_state, state.ema, batch)
        else:
            clip = batch["clip"]
            views = jax.ShapeDtypeStruct(
                (clip.shape[0], 1, *clip.shape[1:]), clip.dtype, sharding=clip.sharding
            )
            inputs = [views, *(batch[name] for name in ("boxes",) if name in batch)]
            lowered = program.predict.lower(state.params, *inputs)
            arguments = (state.params, None, None, inputs)
        began = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options=compiler_options(effort))
        except jax.errors.JaxRuntimeError as error:
            used = required_bytes(str(error))
            if used is None:
                raise
            kinds = dict(zip(_KINDS, map(_shard_bytes, arguments), strict=True))
            kinds["activations"] = max(0, used - sum(kinds.values()))
            return TooLarge(used, kinds, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    counts, memory = counting.count(compiled.as_text()), counting.memory(compiled)
    return Figures(
        counts=counts,
        memory=memory,
        kinds=_bytes_by_kind(counts, memory),
        xla_bytes=compiled.cost_analysis()["bytes accessed"],
        seconds=seconds,
    )


def compiler_options(effort: float) -> dict[str, float | str] | None:
    """Returns the options of `compile` for an effort from -1 to 1; JAX 0.11.1 has levels only.

    The level O0 compiles the same program as the effort -1: traffic of MViT-B's main memory differs
    by 3e-6 (jax 0.10.2, 2026-12-01).
    """
    if not effort:
        return None
    if jax.__version_info__ < (0, 11, 1):
        return {"exec_time_optimization_effort": effort}
    return {"optimization_level": "O0" if effort < 0 else "O3"}


def required_bytes(message: str) -> int | None:
    """Returns the bytes that a program needs, from the compiler's out-of-memory message.

    The message has either the total or the temporaries alone. Returns None for other messages.
    """
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    if not match:
        return None
    return int(float(match.group(1)) * 1024 ** ("KMGT".index(match.group(2)) + 1))


def _bytes_by_kind(counts: counting.Counts, memory: counting.Memory) -> dict[str, int]:
    """Returns bytes per chip by kind, with the padding of layouts."""
    kinds = {
        kind: sum(size for name, size in counts.arguments if name.startswith(prefixes))
        for kind, prefixes in _KINDS.items()
    }
    kinds["program"] = memory.code
    kinds["activations"] = memory.peak - sum(kinds.values())
    return kinds


def _shard_bytes(tree: Any) -> int:
    """Returns bytes per chip of an argument, without the padding of layouts."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
