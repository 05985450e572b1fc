"""What a train step and a forward pass cost on TPUs, without a TPU: compiled ahead of time.

    python -m benchmarks.tpu                                 # MViT-B 16x4, MViTv2-S 16x4 on v5e
    python -m benchmarks.tpu --chips=v5e,v5p,v6e --clips=2,4,16 --remat=none,blocks --json=tpu.json
    python -m benchmarks.tpu --models=mvitv2_s --clips=64 --passes=train --largest

For one chip, in bfloat16 with float32 weights, the step that training runs (optimiser, mixing and
donated state included) at the recipe of configs/kinetics.py or configs/imagenet.py. Nothing runs:
the figures are the compiler's plan, repeatable to the byte. Needs the extra `tpu`.

- FLOPs (two per multiply-add) and bytes are counted from the compiled program, loops times their
  trips (`mvit_jax.inspection.compiled`). Custom kernels move their operands and results once each;
  their FLOPs are those that the kernel's author states in its `cost_estimate`, and stand in a
  column of their own.
- "GB" are all operands and results, as XLA counts; "HBM GB" those in main memory alone.
- The roofline's time is the longer of FLOPs / peak and HBM bytes / bandwidth; the share of the
  compute roof is what arithmetic has of it. A real step takes longer: both are bounds.
- "fits" is from the straight line through the memory of two numbers of clips, where two were
  compiled; `--largest` compiles what it promises, and less or more until one fits and a larger one
  does not.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

# Arrays live on the CPU, and on a machine without a TPU nobody asks the metadata server about one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from tqdm import tqdm

from mvit_jax.data.synthetic import Synthetic
from mvit_jax.errors import UserError
from mvit_jax.files import write_whole
from mvit_jax.inspection import compiled as counting
from mvit_jax.models.variants import variant
from mvit_jax.training import experiment, jitted, sharding, trial

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak bfloat16 FLOP/s, bytes/s of HBM, and what the compiler lets a program have of it."""

    topology: str
    flops: float
    bandwidth: float
    memory: float


# "Key specifications" of cloud.google.com/tpu/docs/v4, v5e, v5p, v6e. Memory is the limit in
# libtpu's own errors ("Exceeded hbm capacity"): capacity without what it keeps for itself.
CHIPS = {
    "v4": Chip("v4:2x2x1", 275e12, 1.2e12, 31.75 * GIB),
    "v5e": Chip("v5e:2x2", 197e12, 0.819e12, 15.75 * GIB),
    "v5p": Chip("v5p:2x2x1", 459e12, 2.765e12, 95.74 * GIB),
    "v6e": Chip("v6e:2x2", 918e12, 1.638e12, 31.25 * GIB),
}
PASSES = ("train", "forward")


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    which: str
    chip: str
    clips: int
    remat: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A case's figures; FLOPs and bytes are per clip."""

    case: Case
    flops: float
    kernel_flops: float
    bytes: float
    hbm_bytes: float
    peak: int
    roofline: float  # seconds a step
    compute_share: float
    compile_seconds: float
    unknown_loops: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="mvit_b_16x4,mvitv2_s_16x4")
    parser.add_argument("--passes", default=",".join(PASSES), help="train, forward or both")
    parser.add_argument("--chips", default="v5e", help=f"some of {','.join(CHIPS)}")
    parser.add_argument("--clips", default="4", help="clips on the chip, several with commas")
    parser.add_argument("--remat", default="none", help="values of the config key `remat`")
    parser.add_argument("--largest", action="store_true", help="search the most clips that fit")
    parser.add_argument("--json", help="a file for the same figures")
    parser.add_argument("--text", help="a folder for the compiled programs' texts")
    given = parser.parse_args()
    cases = [
        Case(model, which, chip, clips, remat)
        for model, which, chip, remat, clips in itertools.product(
            chosen(given.models), chosen(given.passes, PASSES), chosen(given.chips, CHIPS),
            chosen(given.remat), map(int, chosen(given.clips)),
        )
    ]  # fmt: skip
    print(HEADER, flush=True)
    rows = []
    for case in tqdm(cases, unit="program"):
        found = measure(case, given.text)
        tqdm.write(line(case, found))
        rows.append((case, found))
    for group, members in groups(rows).items():
        tqdm.write(fits(group, members, given.largest, given.text))
    if given.json:
        report = {
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rows": [dataclasses.asdict(row) for _, row in rows if isinstance(row, Row)],
        }
        write_whole(Path(given.json), json.dumps(report, indent=1).encode())


def chosen(given: str, known: Any = None) -> list[str]:
    words = [word for word in given.split(",") if word]
    for word in words:
        if known is not None and word not in known:
            raise UserError(f"{word} is none of {', '.join(known)}")
    return words


def experiment_of(case: Case) -> Any:
    """The published recipe with so many clips a step."""
    name = "kinetics" if variant(case.model).frames > 1 else "imagenet"
    config = trial.read_config(name, case.model)
    with config.unlocked():
        config.batch = case.clips
        config.dtype = "bfloat16"
        config.augment.group = math.gcd(config.augment.group, case.clips)
        if case.remat != "none" or "remat" in config:
            config.remat = case.remat
    return config


def mesh_of(chip: Chip) -> Mesh:
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    except (RuntimeError, ImportError) as error:
        raise UserError(
            f"this needs libtpu, which compiles for TPUs: pip install 'jax[tpu]' ({error})"
        ) from error
    return sharding.make_mesh(1, 1, np.asarray(topology.devices)[:1])
