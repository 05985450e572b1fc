"""Weak scaling of the compiled train step: collectives of a pod from 4 to 1,024 chips.

    python -m benchmarks.scaling --json=scaling.json
    python -m benchmarks.scaling --model=mvitv2_s_16x4 --topologies=v5e:4x4,v5e:16x16*4 --clips=8

The program is the train step of a published recipe in bfloat16, with the same number of clips per
chip on every mesh, compiled ahead of time (extra `tpu`, no TPU needed). By default the compiler's
effort is low, which changes neither FLOPs nor collectives. "v5e:16x16*4" means 4 slices.

With --fsdp=1 the state is replicated on every chip ("replicated" in the table). With --fsdp=N the
state is sharded over groups of N chips of a slice, and each group has a copy ("fsdp N"). Several
slices form a hybrid mesh.

For each mesh, the table has FLOPs per chip, bytes per chip by kind of collective, and roofline
bounds. Scaling is linear as long as FLOPs and link time per chip remain constant.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from typing import Any

# Arrays are on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from benchmarks.tpu import numbers
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import check_writable, write_atomically
from mvit_jax.models.variants import variant
from mvit_jax.podplan import accelerators, advice, compile
from mvit_jax.training import build, in_memory

TOPOLOGIES = "v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16,v5e:16x16*2,v5e:16x16*4"
HEADER = (
    "| topology | chips | mesh | GFLOP a chip | all-reduce, MB | reduce-scatter, MB "
    "| all-gather, MB | permute, MB | between slices, MB | arithmetic, ms | links, ms "
    "| network, ms | compile s |\n|"
) + 13 * " --- |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mvit_b_16x4")
    parser.add_argument(
        "--topologies", default=TOPOLOGIES, help="NAME or NAME*SLICES, comma-separated"
    )
    parser.add_argument("--clips", default="2", help="clips per chip")
    parser.add_argument("--fsdp", default="1,16", help="chips over which the state is sharded")
    parser.add_argument("--effort", type=float, default=compile.QUICK, help="compiler effort")
    parser.add_argument("--json", help="file for the results as JSON")
    options = parser.parse_args()
    cases = cases_of(options)
    rows = []
    print(HEADER, flush=True)
    for topology, fsdp, clips in cases:
        rows.append(measure(options.model, topology, fsdp, clips, options.effort))
        print(line(rows[-1]), flush=True)
        if options.json:  # after every row, as each takes minutes
            report = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
            write_atomically(options.json, json.dumps(report, indent=1))


def cases_of(options: argparse.Namespace) -> list[tuple[accelerators.Topology, int, int]]:
    """Returns (topology, fsdp, clips per chip) of all cases; checks all flags first."""
    variant(options.model)
    if not -1 <= options.effort <= 1:
        raise UserError(f"--effort={options.effort:g} must be from -1 to 1")
    if options.json is not None:
        check_writable(options.json)
    topologies = [parse(text) for text in options.topologies.split(",")]
    shares = numbers("fsdp", options.fsdp)
    for fsdp in shares:
        if all(topology.chips_per_slice % fsdp for topology in topologies):
            raise UserError(
                f"--fsdp={fsdp} does not divide the chips of a slice in {options.topologies}"
            )
    return [
        (topology, fsdp, clips)
        for topology, fsdp, clips in itertools.product(
            topologies, shares, numbers("clips", options.clips)
        )
        if topology.chips_per_slice % fsdp == 0
    ]


def parse(text: str) -> accelerators.Topology:
    match = re.fullmatch(r"([^*]+)(?:\*(\d+))?", text)
    if not match:
        raise UserError(f"{text!r} must be a topology like v5e:4x4 or v5e:16x16*4")
    return accelerators.parse(match.group(1), int(match.group(2) or 1))


def measure(
    name: str, topology: accelerators.Topology, fsdp: int, clips: int, effort: float
) -> Any:
    """Returns the costs of one training step on a mesh; bytes and FLOPs are per chip."""
    config = in_memory.read_config("kinetics" if variant(name).frames > 1 else "imagenet", name)
    with config.unlocked():
        config.update_from_flattened_dict(
            {"batch": clips * topology.chips, "dtype": "bfloat16", "data.repeats": 1}
        )
    config, _ = advice.fit_config(config, topology.chips)
    result = compile.measure(
        config,
        build.model_config(config, config.data.classes),
        compile.tpu_mesh(topology, -1, fsdp),
        effort=effort,
    )
    row = {
        "model": name, "topology": topology.name, "slices": topology.slices, "fsdp": fsdp,
        "chips": topology.chips, "clips_a_chip": clips, "effort": effort,
        "memory_bytes": result.used, "compile_seconds": result.seconds,
    }  # fmt: skip
    if isinstance(result, compile.TooLarge):
        return row
    counts = result.counts
    return row | {
        "flops": counts.flops + counts.kernel_flops,
        "kernels": len(counts.kernels),
        "collectives": accelerators.sum_by_kind(counts.collectives, topology.chip),
        "seconds": vars(accelerators.roofline_bounds(counts, topology.chip)),
    }


def line(row: dict[str, Any]) -> str:
    data = row["chips"] // row["fsdp"]
    shape = row["topology"] + (f" x {row['slices']}" if row["slices"] > 1 else "")
    mesh = "replicated" if row["fsdp"] == 1 else f"{data} x fsdp {row['fsdp']}"
    cells = [shape, f"{row['chips']:,}", mesh]
    if "flops" not in row:
        return f"| {' | '.join(cells)} | does not fit |"

    def total(kind: str) -> str:
        return f"{sum(size for name, _, size, _ in row['collectives'] if name == kind) / 1e6:.1f}"

    outside = sum(size for name, _, size, _ in row["collectives"] if "slices" in name)
    kinds = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute")
    times = [f"{1000 * row['seconds'][part]:.2f}" for part in ("compute", "ici", "dcn")]
    cells += [f"{row['flops'] / 1e9:.0f}", *map(total, kinds), f"{outside / 1e6:.1f}", *times]
    return f"| {' | '.join([*cells, format(row['compile_seconds'], '.0f')])} |"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
