"""Many runs of `podplan` after one import, with a stand-in for the compiler.

    python -m tests.support.podplans < runs.json

Reads a list of lists of flags; prints a list of [exit status, stdout, stderr]. A program of the
stand-in has 1.5 GiB of state and 1.05 GiB for each clip of a micro-batch (of 16 frames or fewer),
halved by `remat=blocks`. It computes 197 GFLOP, 1 ms on a v5e; main memory takes twice as long. It
fails for 13 clips on a chip.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass

from mvit_jax.common import errors
from mvit_jax.podplan import __main__ as podplan
from mvit_jax.podplan import compile
from mvit_jax.podplan.accelerators import GIB
from mvit_jax.podplan.hlo.cost import Collective, Counts, Memory, Operation
from mvit_jax.training.distributed import sharding

A_CLIP, STATE = 1.05, {"parameters": 0.5, "optimiser": 1.0, "average": 0.0}
WORK = Operation("dot", "dot", "matrix", "", 1, int(197e9), 0, 0, 0, int(0.819e12 * 0.002))


@dataclass(frozen=True)
class Chip:
    """The attributes of a device that a mesh reads."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "tpu"


def tpu_mesh(topology, data=-1, fsdp=1, devices=0):
    size = topology.chips_per_slice
    return sharding.make_mesh(
        data, fsdp, [Chip(i, i // 4, i // size) for i in range(topology.chips)]
    )


def measure(config, model, mesh, *, which="train", effort=0.0):
    clips = config.batch // mesh.size
    if clips == 13:
        raise errors.UserError("thirteen")
    share = 0.5 if config.remat == "blocks" else 1.0
    a_clip = A_CLIP * max(1, model.frames / 16) * share
    sizes = STATE | {"batch": 0.0, "activations": a_clip * clips / config.accumulate}
    kinds = {kind: int(size * GIB) for kind, size in sizes.items()}
    used = sum(kinds.values())
    if used > 15.75 * GIB:
        return compile.TooLarge(used, kinds, 0.0)
    sums = (Collective("all-reduce", "", 1, 10**7, mesh.size),)
    counts = Counts((WORK,), sums, ())
    return compile.Figures(counts, Memory(used, 0, 0, 0, 0), kinds | {"program": 0}, 0.0, 0.0)


def run(flags):
    """Runs `podplan` in a fork, as flags can be parsed only once."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as file:
            result = json.load(file)
        os.waitpid(child, 0)
        return result
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv[:] = ["podplan", *flags]  # read for keys of --config
            errors._guarded(podplan.main, errors._parse(sys.argv))
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    with os.fdopen(writer, "w") as file:
        json.dump([status, out.getvalue(), err.getvalue()], file)
    os._exit(0)


if __name__ == "__main__":
    compile.measure, compile.tpu_mesh = measure, tpu_mesh
    json.dump([run(flags) for flags in json.load(sys.stdin)], sys.stdout)
