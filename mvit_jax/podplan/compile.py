"""An experiment's step compiled for TPUs that are not here (the extra `tpu`), and what it costs.

`XLA`'s answer that a program does not fit is an answer too: it says how much memory it would take.
"""

import importlib.util
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from mvit_jax.common.errors import UserError
from mvit_jax.config import Config
from mvit_jax.models.plan import MViTConfig
from mvit_jax.podplan.accelerators import Topology
from mvit_jax.podplan.hlo import cost as counting
from mvit_jax.training import build
from mvit_jax.training.distributed import sharding

# Nobody asks a metadata server about the TPU that is not here, the compiler does not complain that
# it is not, and it may work beside another process that has it.
_ABSENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

QUICK = -1.0  # the least of the compiler's efforts (`exec_time_optimization_effort`)

# What holds a chip's memory, by the names of the step's arguments, and of the forward pass's.
_KINDS = {
    "parameters": ("state.params", "params"),
    "optimiser": ("state.opt_state",),
    "average": ("state.ema",),
    "batch": ("batch", "clip"),
}
STATE = ("parameters", "optimiser", "average")


@dataclass(frozen=True)
class Figures:
    """What a program costs each chip in one step.

    Attributes:
      counts: FLOPs, bytes, collectives.
      memory: the compiler's plan of a chip's memory.
      kinds: bytes of it that parameters, optimiser, average, batch, "activations" (all that comes
        and goes within a step) and the program hold; they add up to `used`.
      xla_bytes: XLA's own count of what is moved.
      seconds: that compiling took.
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
    """A program that does not fit: bytes that it would take of a chip, in all and by kind (of
    "activations" what the others leave), and seconds that finding out took."""

    used: int
    kinds: dict[str, int]
    seconds: float


def tpu_mesh(topology: Topology, data: int = -1, fsdp: int = 1, devices: int = 0) -> Mesh:
    """The training program's mesh over the chips of `topology`, or the first `devices` of them.

    Raises:
      UserError: libtpu is not installed; the mesh does not divide the chips.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    for name, value in _ABSENT.items():  # before libtpu is loaded
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if topology.chips_per_slice == 1:  # libtpu takes a host for four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.kind == "v4":  # its two cores are one device, as JAX has them on the chips
        options["chip_config_name"] = "megacore"
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    return sharding.make_mesh(data, fsdp, found.devices[: devices or None])


def measure(
    config: Config, model: MViTConfig, mesh: Mesh, *, which: str = "train", effort: float = 0.0
) -> Figures | TooLarge:
    """Compiles for `mesh` the step that training runs with `config`, or the "forward" pass of a
    test with one view of each video, and counts.

    Args:
      effort: of the compiler; `QUICK` compiles some five times as fast. Arithmetic, collectives and
        memory stay what they are; traffic of the main memory (HBM) is overstated, as nothing is
        brought on the chip ahead of time.
    """
    with jax.set_mesh(mesh), jax.default_matmul_precision(config.precision):
        settings = build.settings(config, model.num_classes)
        program = build.program(config, settings, mesh)
        batch = build.batch_shapes(config, model, mesh)
        state = program.state
        if which == "train":
            lowered = program.step.lower(state, batch, jax.ShapeDtypeStruct((), np.float32))
            given = (state.params, state.opt_state, state.ema, batch)
        else:
            clip = batch["clip"]
            views = jax.ShapeDtypeStruct(
                (clip.shape[0], 1, *clip.shape[1:]), clip.dtype, sharding=clip.sharding
            )
            lowered = program.predict.lower(state.params, views)
            given = (state.params, None, None, views)
        began = time.perf_counter()
        try:
            options = {"exec_time_optimization_effort": effort} if effort else None
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            used = wanted(str(error))
            if used is None:
                raise
            kinds = dict(zip(_KINDS, map(_given, given), strict=True))
            kinds["activations"] = max(0, used - sum(kinds.values()))
            return TooLarge(used, kinds, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    counts, memory = counting.count(compiled.as_text()), counting.memory(compiled)
    return Figures(
        counts=counts,
        memory=memory,
        kinds=_held(counts, memory),
        xla_bytes=compiled.cost_analysis()["bytes accessed"],
        seconds=seconds,
    )


def wanted(message: str) -> int | None:
    """Bytes that a program would take, by the compiler's message that they are too many.

    It says either what it planned in all, or that temporaries alone are too many.
    """
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    if not found:
        return None
    return int(float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1))


def _held(counts: counting.Counts, memory: counting.Memory) -> dict[str, int]:
    """Bytes of a chip by kind, as they lie in memory."""
    kinds = {
        kind: sum(size for name, size in counts.arguments if name.startswith(prefixes))
        for kind, prefixes in _KINDS.items()
    }
    kinds["program"] = memory.code
    kinds["activations"] = memory.peak - sum(kinds.values())
    return kinds


def _given(tree: Any) -> int:
    """Bytes of a chip that an argument takes, without the padding of its layouts."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
