"""Costs of train steps and forward passes on TPUs, from ahead-of-time compilation without a TPU.

    python -m benchmarks.tpu                                 # MViT-B 16x4, MViTv2-S 16x4 on v5e
    python -m benchmarks.tpu --chips=v5e,v5p,v6e --clips=2,4,16 --remat=none,blocks --json=tpu.json
    python -m benchmarks.tpu --models=mvitv2_s --clips=64 --passes=train --largest

The program is training's step for one chip, in bfloat16 with float32 weights. Optimiser, mixup and
donated state are included, with the recipe of configs/kinetics.py or configs/imagenet.py. Nothing
is executed: the figures are the compiler's and repeatable to the byte. Needs the extra `tpu`.

- FLOPs (two per multiply-add) and bytes are counted from the compiled program, with loop trip
  counts (`mvit_jax.podplan.hlo.cost`). Custom kernels move their operands and results once each.
  Their FLOPs are those of `cost_estimate`, in the column "in kernels".
- "GB" covers all operands and results, as XLA counts them; "HBM GB" covers main memory alone.
- The roofline time is the larger of FLOPs / peak rate and HBM bytes / bandwidth. "compute bound" is
  FLOPs / peak rate in percent of the roofline time. Both are bounds: a real step takes longer.
- The number of clips that fit is extrapolated linearly from two compiled numbers of clips.
  `--largest` searches for this number with more compilations. The search ends when a fitting
  number fills nine tenths of the chip, or when one clip or a sixteenth more does not fit.
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

# Arrays are on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import check_writable, write_atomically
from mvit_jax.models.run_blocks import REMAT
from mvit_jax.models.variants import variant
from mvit_jax.podplan import accelerators, compile, search
from mvit_jax.podplan.accelerators import CHIPS, GIB
from mvit_jax.podplan.hlo import cost as counting
from mvit_jax.training import build, in_memory

# A slice of each kind of chip; the program uses one chip of the slice.
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
    """Costs of a case; FLOPs and bytes are per clip."""

    case: Case
    flops: float
    kernel_flops: float
    bytes: float
    hbm_bytes: float
    xla_bytes: float  # XLA's count: loop bodies once, prefetched arrays several times
    peak: int
    roofline: float  # seconds per step
    compute_share: float
    compile_seconds: float
    unknown_loops: tuple[str, ...]


# Results by number of clips; if the clips do not fit, the bytes that the program would need.
Rows = dict[int, Row | int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="mvit_b_16x4,mvitv2_s_16x4")
    parser.add_argument("--passes", default=",".join(PASSES), help="train, forward or both")
    parser.add_argument("--chips", default="v5e", help=f"some of {','.join(CHIPS)}")
    parser.add_argument("--clips", default="4", help="clips per chip, comma-separated")
    parser.add_argument("--remat", default="none", help=f"some of {','.join(REMAT)}")
    parser.add_argument("--largest", action="store_true", help="search the most clips that fit")
    parser.add_argument("--json", help="file for the results as JSON")
    parser.add_argument("--top", type=int, default=0, help="list this many operations by HBM bytes")
    options = parser.parse_args()
    # The compilation cache could store programs for absent chips, but not load them.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.json is not None:
        check_writable(options.json)
    cases = [
        Case(model, which, chip, clips, remat)
        for model, which, chip, remat, clips in itertools.product(
            parse_list(options.models), parse_list(options.passes, PASSES),
            parse_list(options.chips, CHIPS), parse_list(options.remat, REMAT),
            numbers("clips", options.clips),
        )
    ]  # fmt: skip
    for model in {case.model for case in cases}:
        variant(model)  # raises before the first compilation
    print(HEADER, flush=True)
    rows = []
    for case in tqdm(cases, unit="program"):
        row = measure(case, options.top)
        tqdm.write(line(case, row))
        rows.append((case, row))
    for group, members in groups(rows).items():
        memory = CHIPS[group.chip].memory
        while (
            options.largest and (clips := search.next_clips(attempts(members), memory)) is not None
        ):
            case = dataclasses.replace(group, clips=clips)
            members[clips] = measure(case, options.top)
            rows.append((case, members[clips]))
            print(line(case, members[clips]), flush=True)
        print(fits(group, members, memory), flush=True)
    if options.json:
        report = {
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rows": [dataclasses.asdict(row) for _, row in rows if isinstance(row, Row)],
        }
        write_atomically(options.json, json.dumps(report, indent=1))


def parse_list(text: str, allowed: Any = None) -> list[str]:
    words = [word for word in text.split(",") if word]
    for word in words:
        if allowed is not None and word not in allowed:
            raise UserError(f"{word!r} is not one of {', '.join(allowed)}")
    return words


def numbers(flag: str, text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UserError(f"--{flag} must be numbers like 2,4,16, not {text!r}")
    return [int(word) for word in text.split(",")]


def experiment_of(case: Case) -> Any:
    """Returns the config of the published recipe, with the case's clips per step."""
    name = "kinetics" if variant(case.model).frames > 1 else "imagenet"
    config = in_memory.read_config(name, case.model)
    with config.unlocked():
        config.batch = case.clips
        config.dtype = "bfloat16"
        config.augment.mixup_group_size = math.gcd(config.augment.mixup_group_size, case.clips)
        config.remat = case.remat
    return config


def measure(case: Case, top: int) -> Row | int:
    """Returns the costs of a case, or if it does not fit, the bytes that it would need."""
    config = experiment_of(case)
    result = compile.measure(
        config,
        build.model_config(config, config.data.classes),
        compile.tpu_mesh(accelerators.parse(TOPOLOGIES[case.chip]), devices=1),
        which=case.which,
    )
    if isinstance(result, compile.TooLarge):
        return result.used
    counts = result.counts
    if top:
        tqdm.write(breakdown(counts, top))
    bounds = accelerators.roofline_bounds(counts, CHIPS[case.chip])
    return Row(
        case=case,
        flops=counts.flops / case.clips,
        kernel_flops=counts.kernel_flops / case.clips,
        bytes=counts.bytes / case.clips,
        hbm_bytes=counts.hbm_bytes / case.clips,
        xla_bytes=result.xla_bytes / case.clips,
        peak=result.used,
        roofline=bounds.longest,
        compute_share=bounds.compute / bounds.longest,
        compile_seconds=result.seconds,
        unknown_loops=counts.unknown_loops,
    )


def breakdown(counts: counting.Counts, top: int) -> str:
    """Returns tables of costs by kind of operation and by block, and the `top` operations."""
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
        parts.append(f"\n{title}: GB, HBM GB, GFLOP, million cycles as estimated by the compiler")
        parts += [f"{a:8.3f} {b:8.3f} {c:8.1f} {d:8.2f}  {name}" for name, (a, b, c, d) in rows]
    parts.append("\noperation: HBM GB, trips")
    largest = sorted(operations, key=lambda op: -op.trips * op.hbm_bytes)[:top]
    parts += [
        f"{op.trips * op.hbm_bytes / 1e9:8.3f} {op.trips:4d}  {op.category} {op.name} {op.op_name}"
        for op in largest
    ]
    return "\n".join(parts)


def block(op: counting.Operation) -> str:
    """Returns an operation's block and pass, such as "stage2/block3 backward"."""
    scopes = [part for part in counting.scopes(op.op_name) if re.match(r"(stage|block)s?\d", part)]
    direction = "backward" if "transpose(" in op.op_name else "forward"
    return f"{'/'.join(scopes)} {direction}" if scopes else "outside the blocks"


HEADER = """\
| model | pass | chip | clips | remat | GFLOP a clip | in kernels | GB a clip | HBM GB a clip \
| peak GiB | roofline ms a step | clips/s | compute bound | compile s |
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
    """Groups cases that differ only in the number of clips."""
    by_group: dict[Case, Rows] = {}
    for case, row in rows:
        by_group.setdefault(dataclasses.replace(case, clips=0), {})[case.clips] = row
    return by_group


def fits(group: Case, rows: Rows, memory: int | float) -> str:
    """Returns a sentence on the number of clips that fit on the chip."""
    name = f"{group.model}, {group.which}, {group.chip}, remat={group.remat}"
    results = attempts(rows)
    if search.is_done(results, memory):
        return f"{name}: {search.answer(results, memory)}"
    if len(rows) < 2:
        return f"{name}: give two numbers of clips for an estimate of how many fit (--clips=2,4)"
    basis = f"by linear extrapolation from {sorted(rows)}"
    return f"{name}: about {search.estimate(results, memory)} clips fit, {basis}"


def attempts(rows: Rows) -> dict[int, search.Attempt]:
    """Converts rows to results of a search."""
    return {
        n: search.Attempt(row, False) if isinstance(row, int) else search.Attempt(row.peak, True)
        for n, row in rows.items()
    }


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
