"""What a train step and a forward pass cost on TPUs, without a TPU: compiled ahead of time.

    python -m benchmarks.tpu                                 # MViT-B 16x4, MViTv2-S 16x4 on v5e
    python -m benchmarks.tpu --chips=v5e,v5p,v6e --clips=2,4,16 --remat=none,blocks --json=tpu.json
    python -m benchmarks.tpu --models=mvitv2_s --clips=64 --passes=train --largest

For one chip, in bfloat16 with float32 weights, the step that training runs (optimiser, mixing and
donated state included) at the recipe of configs/kinetics.py or configs/imagenet.py. Nothing runs:
the figures are the compiler's plan, repeatable to the byte. Needs the extra `tpu`.

- FLOPs (two per multiply-add) and bytes are counted from the compiled program, loops times their
  trips (`mvit_jax.podplan.hlo.cost`). Custom kernels move their operands and results once each;
  their FLOPs are those that the kernel's author states in its `cost_estimate`, and stand in a
  column of their own.
- "GB" are all operands and results, as XLA counts; "HBM GB" those in main memory alone.
- The roofline's time is the longer of FLOPs / peak and HBM bytes / bandwidth; the share of the
  compute roof is what arithmetic has of it. A real step takes longer: both are bounds.
- "fits" is from the straight line through the memory of two numbers of clips, where two were
  compiled; `--largest` compiles what it promises, and less or more until one fits that fills the
  chip to nine tenths, or one fits and a larger one does not.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from typing import Any

# Arrays live on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import check_writable, write_whole
from mvit_jax.models.run_blocks import REMAT
from mvit_jax.models.variants import variant
from mvit_jax.podplan import accelerators, compile, search
from mvit_jax.podplan.accelerators import CHIPS, GIB
from mvit_jax.podplan.hlo import cost as counting
from mvit_jax.training import build, in_memory

# A slice of each kind of chip, of which one chip is taken.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
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
    xla_bytes: float  # XLA's own count: loop bodies once, prefetched arrays twice over
    peak: int
    roofline: float  # seconds a step
    compute_share: float
    compile_seconds: float
    unknown_loops: tuple[str, ...]


# What was found for each number of clips; where they do not fit, the bytes that they would take.
Rows = dict[int, Row | int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="mvit_b_16x4,mvitv2_s_16x4")
    parser.add_argument("--passes", default=",".join(PASSES), help="train, forward or both")
    parser.add_argument("--chips", default="v5e", help=f"some of {','.join(CHIPS)}")
    parser.add_argument("--clips", default="4", help="clips on the chip, several with commas")
    parser.add_argument("--remat", default="none", help=f"some of {','.join(REMAT)}")
    parser.add_argument("--largest", action="store_true", help="search the most clips that fit")
    parser.add_argument("--json", help="a file for the same figures")
    parser.add_argument("--top", type=int, default=0, help="and so many operations, by HBM bytes")
    given = parser.parse_args()
    # What is compiled for chips that are not here can be written to a user's cache, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    if given.json is not None:
        check_writable(given.json)
    cases = [
        Case(model, which, chip, clips, remat)
        for model, which, chip, remat, clips in itertools.product(
            chosen(given.models), chosen(given.passes, PASSES), chosen(given.chips, CHIPS),
            chosen(given.remat, REMAT), numbers("clips", given.clips),
        )
    ]  # fmt: skip
    for model in {case.model for case in cases}:
        variant(model)  # refused before anything is compiled
    print(HEADER, flush=True)
    rows = []
    for case in tqdm(cases, unit="program"):
        found = measure(case, given.top)
        tqdm.write(line(case, found))
        rows.append((case, found))
    for group, members in groups(rows).items():
        memory = CHIPS[group.chip].memory
        while given.largest and (clips := search.next_clips(tried(members), memory)) is not None:
            case = dataclasses.replace(group, clips=clips)
            members[clips] = measure(case, given.top)
            rows.append((case, members[clips]))
            print(line(case, members[clips]), flush=True)
        print(fits(group, members, memory), flush=True)
    if given.json:
        report = {
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rows": [dataclasses.asdict(row) for _, row in rows if isinstance(row, Row)],
        }
        write_whole(given.json, json.dumps(report, indent=1))


def chosen(given: str, known: Any = None) -> list[str]:
    words = [word for word in given.split(",") if word]
    for word in words:
        if known is not None and word not in known:
            raise UserError(f"{word} is none of {', '.join(known)}")
    return words


def numbers(flag: str, given: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given):
        raise UserError(f"--{flag} takes numbers, like 2,4,16, not {given!r}")
    return [int(word) for word in given.split(",")]


def experiment_of(case: Case) -> Any:
    """The published recipe with so many clips a step."""
    name = "kinetics" if variant(case.model).frames > 1 else "imagenet"
    config = in_memory.read_config(name, case.model)
    with config.unlocked():
        config.batch = case.clips
        config.dtype = "bfloat16"
        config.augment.mixup_group_size = math.gcd(config.augment.mixup_group_size, case.clips)
        config.remat = case.remat
    return config


def measure(case: Case, top: int) -> Row | int:
    """The figures, or where it does not fit the bytes that it would take."""
    config = experiment_of(case)
    found = compile.measure(
        config,
        build.model_config(config, config.data.classes),
        compile.tpu_mesh(accelerators.parse(TOPOLOGIES[case.chip]), devices=1),
        which=case.which,
    )
    if isinstance(found, compile.TooLarge):
        return found.used
    counts = found.counts
    if top:
        tqdm.write(breakdown(counts, top))
    roofs = accelerators.roofs(counts, CHIPS[case.chip])
    return Row(
        case=case,
        flops=counts.flops / case.clips,
        kernel_flops=counts.kernel_flops / case.clips,
        bytes=counts.bytes / case.clips,
        hbm_bytes=counts.hbm_bytes / case.clips,
        xla_bytes=found.xla_bytes / case.clips,
        peak=found.used,
        roofline=roofs.longest,
        compute_share=roofs.compute / roofs.longest,
        compile_seconds=found.seconds,
        unknown_loops=counts.unknown_loops,
    )


def breakdown(counts: counting.Counts, top: int) -> str:
    """Bytes by kind of operation, by block and direction, and the largest operations."""
    operations = counts.operations
    parts = []
    for title, key in (("kind", lambda op: op.category), ("block", block)):
        groups: dict[str, list[float]] = {}
        for op in operations:
            total = groups.setdefault(key(op), [0, 0, 0, 0])
            flops = op.flops + op.kernel_flops
            for i, value in enumerate((op.bytes, op.hbm_bytes, flops, 1000 * op.cycles)):
                total[i] += op.trips * value / 1e9
        rows = sorted(groups.items(), key=lambda item: -item[1][1])
        parts.append(f"\n{title}: GB, HBM GB, GFLOP, million cycles as the compiler estimates")
        parts += [f"{a:8.3f} {b:8.3f} {c:8.1f} {d:8.2f}  {name}" for name, (a, b, c, d) in rows]
    parts.append("\noperation: HBM GB, trips")
    search = sorted(operations, key=lambda op: -op.trips * op.hbm_bytes)[:top]
    parts += [
        f"{op.trips * op.hbm_bytes / 1e9:8.3f} {op.trips:4d}  {op.category} {op.name} {op.op_name}"
        for op in search
    ]
    return "\n".join(parts)


def block(op: counting.Operation) -> str:
    """Of the scopes that the model sets, "stage2/block3", and which way."""
    where = [part for part in counting.scopes(op.op_name) if re.match(r"(stage|block)s?\d", part)]
    way = "backward" if "transpose(" in op.op_name else "forward"
    return f"{'/'.join(where)} {way}" if where else "outside the blocks"


HEADER = """\
| model | pass | chip | clips | remat | GFLOP a clip | in kernels | GB a clip | HBM GB a clip \
| peak GiB | roofline ms a step | clips/s | compute roof | compile s |
|{}""".format(" --- |" * 14)


def line(case: Case, row: Row | int) -> str:
    cells = [case.model, case.which, case.chip, str(case.clips), case.remat]
    if isinstance(row, int):
        cells += ["does not fit"] + 3 * [""] + [f"{row / GIB:.1f}"] + 4 * [""]
    else:
        cells += [
            f"{row.flops / 1e9:.0f}", f"{row.kernel_flops / 1e9:.0f}", f"{row.bytes / 1e9:.2f}",
            f"{row.hbm_bytes / 1e9:.2f}", f"{row.peak / GIB:.2f}", f"{1000 * row.roofline:.1f}",
            f"{case.clips / row.roofline:.0f}", f"{100 * row.compute_share:.0f} %",
            f"{row.compile_seconds:.0f}",
        ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def groups(rows: list[tuple[Case, Row | int]]) -> dict[Case, Rows]:
    """Cases that differ in clips alone, by their number of clips."""
    found: dict[Case, Rows] = {}
    for case, row in rows:
        found.setdefault(dataclasses.replace(case, clips=0), {})[case.clips] = row
    return found


def fits(group: Case, rows: Rows, memory: int | float) -> str:
    """How many clips the chip holds, in a sentence."""
    name = f"{group.model}, {group.which}, {group.chip}, remat={group.remat}"
    known = tried(rows)
    if search.is_found(known, memory):
        return f"{name}: {search.answer(known, memory)}"
    if len(rows) < 2:
        return f"{name}: how many clips fit follows from two numbers of them (--clips=2,4)"
    line = f"by the line through {sorted(rows)}"
    return f"{name}: about {search.estimate(known, memory)} clips fit, {line}"


def tried(rows: Rows) -> dict[int, search.Tried]:
    """What each number of clips takes."""
    return {
        n: search.Tried(row, False) if isinstance(row, int) else search.Tried(row.peak, True)
        for n, row in rows.items()
    }


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
