"""Weak scaling by the compiled program: what passes between chips as a pod grows from 4 to 1,024.

    python -m benchmarks.scaling --json=scaling.json
    python -m benchmarks.scaling --model=mvitv2_s_16x4 --topologies=v5e:4x4,v5e:16x16*4 --clips=8

The training step of a published recipe in bfloat16, at the same number of clips on every chip,
compiled ahead of time (the extra `tpu`, no TPU needed; little effort of the compiler, which changes
neither arithmetic nor collectives). "v5e:16x16*4" are 4 slices. The state is copied to every chip
("replicated"), or split over --fsdp chips of a slice and copied from one such group to the next,
over slices too ("fsdp", with several slices a hybrid mesh).

Of every mesh: FLOPs of a chip, bytes of a chip by kind of collective, and the least time of each
part. Where arithmetic stays and the links' time does too, chips added are chips used.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from typing import Any

# Arrays live on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from benchmarks.tpu import numbers
from mvit_jax.common.errors import UserError
from mvit_jax.common.files import check_writable, write_whole
from mvit_jax.models.variants import variant
from mvit_jax.podplan import accelerators, advice, compile
from mvit_jax.training import build, in_memory

TOPOLOGIES = "v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16,v5e:16x16*2,v5e:16x16*4"
HEADER = (
    "| topology | chips | mesh | GFLOP a chip | sums, MB | scattered, MB | gathered, MB "
    "| moved, MB | between slices, MB | arithmetic, ms | links, ms | network, ms | compile s |\n|"
) + 13 * " --- |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mvit_b_16x4")
    parser.add_argument("--topologies", default=TOPOLOGIES, help="NAME or NAME*SLICES, with commas")
    parser.add_argument("--clips", default="2", help="on each chip")
    parser.add_argument("--fsdp", default="1,16", help="chips that share one copy of the state")
    parser.add_argument("--effort", type=float, default=compile.QUICK, help="of the compiler")
    parser.add_argument("--json", help="a file for the same figures")
    given = parser.parse_args()
    cases = cases_of(given)
    rows = []
    print(HEADER, flush=True)
    for topology, fsdp, clips in cases:
        rows.append(measure(given.model, topology, fsdp, clips, given.effort))
        print(line(rows[-1]), flush=True)
        if given.json:  # each takes minutes: what is there is kept
            report = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
            write_whole(given.json, json.dumps(report, indent=1))


def cases_of(given: argparse.Namespace) -> list[tuple[accelerators.Topology, int, int]]:
    """Topologies, chips that share a state, clips on a chip; checks all before any is compiled."""
    variant(given.model)
    if not -1 <= given.effort <= 1:
        raise UserError(f"--effort={given.effort:g} must be from -1 to 1")
    if given.json is not None:
        check_writable(given.json)
    topologies = [parse(text) for text in given.topologies.split(",")]
    shares = numbers("fsdp", given.fsdp)
    for fsdp in shares:
        if all(topology.chips_per_slice % fsdp for topology in topologies):
            raise UserError(f"--fsdp={fsdp} divides the chips of no slice of {given.topologies}")
    return [
        (topology, fsdp, clips)
        for topology, fsdp, clips in itertools.product(
            topologies, shares, numbers("clips", given.clips)
        )
        if topology.chips_per_slice % fsdp == 0
    ]


def parse(text: str) -> accelerators.Topology:
    found = re.fullmatch(r"([^*]+)(?:\*(\d+))?", text)
    if not found:
        raise UserError(f"{text!r} is no topology like v5e:4x4 or v5e:16x16*4")
    return accelerators.parse(found.group(1), int(found.group(2) or 1))


def measure(
    name: str, topology: accelerators.Topology, fsdp: int, clips: int, effort: float
) -> Any:
    """Figures of one mesh; bytes and FLOPs of a chip in a step."""
    config = in_memory.read_config("kinetics" if variant(name).frames > 1 else "imagenet", name)
    with config.unlocked():
        config.update_from_flattened_dict(
            {"batch": clips * topology.chips, "dtype": "bfloat16", "data.repeats": 1}
        )
    config, _ = advice.fitted(config, topology.chips)
    found = compile.measure(
        config,
        build.model_config(config, config.data.classes),
        compile.tpu_mesh(topology, -1, fsdp),
        effort=effort,
    )
    row = {
        "model": name, "topology": topology.name, "slices": topology.slices, "fsdp": fsdp,
        "chips": topology.chips, "clips_a_chip": clips, "effort": effort,
        "memory_bytes": found.used, "compile_seconds": found.seconds,
    }  # fmt: skip
    if isinstance(found, compile.TooLarge):
        return row
    counts = found.counts
    return row | {
        "flops": counts.flops + counts.kernel_flops,
        "kernels": len(counts.kernels),
        "collectives": accelerators.by_kind(counts.collectives, topology.chip),
        "seconds": vars(accelerators.roofs(counts, topology.chip)),
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
    times = [f"{1000 * row['seconds'][part]:.2f}" for part in ("compute", "links", "outside")]
    cells += [f"{row['flops'] / 1e9:.0f}", *map(total, kinds), f"{outside / 1e6:.1f}", *times]
    return f"| {' | '.join([*cells, format(row['compile_seconds'], '.0f')])} |"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
