r"""Estimates memory, step time and cost of an experiment on a TPU pod, without the pod.

    python -m mvit_jax.podplan --config=configs/kinetics.py:mvit_b_16x4 --topology=v5e:16x16
    python -m mvit_jax.podplan --config=... --topology=v5p-128 --largest_batch
    python -m mvit_jax.podplan --config=... --topology=v5e:16x16 --slices=4 \
        --config.batch=2048 --config.mesh.fsdp=16
    python -m mvit_jax.podplan --config=... --topology=v6e:4x4 --sweep --out=sweep.png

No accelerator is needed: the TPU compiler of the extra `tpu` compiles the train step ahead of time.
The memory, FLOPs, bytes moved and collectives of the compiled step are compared with the chip's
memory and peak rates. All times are lower bounds: a real step takes longer. For a step that does
not fit, the program lists settings that save memory. The data are not needed, only their size:
`data.train_videos` and `data.classes`.

By default the compiler's effort is low (--effort=-1): a full-size step takes about 80 seconds of
CPU time instead of 400. FLOPs, collectives and memory are the same, but HBM traffic is overstated
(by a factor of 2.3 for MViT-B 16x4) and is not used as a bound. --effort=0 compiles as training
does, and HBM traffic becomes a bound.

--largest_batch searches for the number of clips that fills a chip (3 to 6 compilations). --sweep
compiles all combinations of --fsdp, --remat and --clips (per chip), and prints a table. --out is a
file for a figure of all plans. --json is updated after each compilation of a sweep.
"""

import copy
import itertools
import json
import os
import re
from typing import Any

# Arrays are on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from tqdm import tqdm

from mvit_jax.analysis import plots
from mvit_jax.common import errors
from mvit_jax.common.files import check_writable, write_atomically
from mvit_jax.common.text import plural, table
from mvit_jax.config import Config, check, define_flag
from mvit_jax.models.run_blocks import REMAT
from mvit_jax.podplan import accelerators, advice, compile, text
from mvit_jax.podplan import search as largest
from mvit_jax.podplan.accelerators import Topology
from mvit_jax.podplan.advice import Plan
from mvit_jax.podplan.compile import Figures
from mvit_jax.training import dry_run

_CONFIG = define_flag()
_TOPOLOGY = flags.DEFINE_string("topology", None, "A slice: v5e:16x16, or v5e-256 (v4, v5p, v6e).")
_SLICES = flags.DEFINE_integer("slices", 1, "Number of slices.")
_EFFORT = flags.DEFINE_float("effort", compile.QUICK, "Compiler effort: -1 is quick, 0 default.")
_LARGEST = flags.DEFINE_bool("largest_batch", False, "Search the most clips that fit on a chip.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Compare meshes, remat and batches.")
_FSDP = flags.DEFINE_list("fsdp", None, "For --sweep: mesh.fsdp; by default 1 and 4.")
_REMAT = flags.DEFINE_list("remat", ["none", "blocks"], "For --sweep: any of " + ", ".join(REMAT))
_CLIPS = flags.DEFINE_list(
    "clips", None, "For --sweep: clips per chip; by default the config's, and four times as many."
)
_OUT = flags.DEFINE_string("out", None, "File for a figure, .png.")
_JSON = flags.DEFINE_string("json", None, "File for the results as JSON.")
OF_A_SWEEP = ("fsdp", "remat", "clips")


def main(argv: list[str]) -> None:
    """Checks flags, config and output files before the compilations, which take minutes."""
    if len(argv) > 1:
        raise errors.UserError(f"unknown argument {argv[1]!r}: flags look like --topology=v5e:4x4")
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise errors.UserError(
            "give --config=configs/kinetics.py:mvit_b_16x4 and --topology=v5e:16x16"
        )
    topology = accelerators.parse(_TOPOLOGY.value, _SLICES.value)
    check_flags()
    config = _CONFIG.value
    errors.lock(config)
    check(config)
    videos, _ = dry_run.data_and_model(config)
    if videos < 1:
        raise errors.UserError(f"data.train_videos must be at least 1, not {videos}")
    # The compilation cache could store programs for absent chips, but not load them.
    jax.config.update("jax_enable_compilation_cache", False)
    plans = sweep(config, topology) if _SWEEP.value else [plan(config, topology)]
    if _OUT.value is not None:
        plots.save(text.picture(plans), _OUT.value)
        print(f"\nwrote {_OUT.value}")
    if _JSON.value is not None:
        print(f"wrote {_JSON.value}")


def check_flags() -> None:
    """Raises `UserError` for invalid flags, and for flags that would have no effect."""
    if not -1 <= _EFFORT.value <= 1:  # also rejects NaN
        raise errors.UserError(f"--effort={_EFFORT.value:g} must be from -1 to 1")
    if _OUT.value is not None and not _OUT.value.endswith(".png"):
        raise errors.UserError(f"--out={_OUT.value} must be a .png file")
    if _JSON.value == "":
        raise errors.UserError("--json is empty: give a file, like --json=plan.json")
    for path in (_OUT.value, _JSON.value):
        if path is not None:
            check_writable(path)
    if _SWEEP.value and _LARGEST.value:
        raise errors.UserError("give --largest_batch or --sweep, not both")
    for flag in OF_A_SWEEP:
        if flags.FLAGS[flag].present and not _SWEEP.value:
            raise errors.UserError(f"--{flag} needs --sweep: add it, or set keys of --config")


def write_report(plans: list[Plan], max_clips: int | None = None) -> None:
    if _JSON.value is not None:
        config = config_flags.get_config_filename(flags.FLAGS["config"])
        write_atomically(_JSON.value, json.dumps(text.report(plans, config, max_clips), indent=1))


def plan(config: Config, topology: Topology) -> Plan:
    """Compiles the experiment's step and prints the plan."""
    _, changed = advice.fit_config(config, topology.chips)
    mesh = compile.tpu_mesh(topology, config.mesh.data, config.mesh.fsdp)
    print(text.title(config, topology, mesh), flush=True)
    if topology.chip.cores > 1 and "-" in str(_TOPOLOGY.value):
        print(f"{_TOPOLOGY.value} counts cores, {topology.chip.cores} per chip")
    if changed:
        print(changed, flush=True)
    result = compile_plan(config, topology, mesh)
    max_clips = search(result, mesh) if _LARGEST.value else None
    print("\n" + text.text(result, max_clips), flush=True)
    write_report([result], max_clips)
    return result


def compile_plan(config: Config, topology: Topology, mesh: Mesh, quiet: bool = False) -> Plan:
    """Compiles a config's step for a mesh and returns the plan."""
    videos, model = dry_run.data_and_model(config)
    fitted, _ = advice.fit_config(config, topology.chips)
    if not quiet:
        what = plural(config.batch // mesh.size, advice.item_name(config))
        how = f"{what} per chip, remat={config.remat}, effort {_EFFORT.value:g}"
        print(f"compiling ({how}) ...", end=" ", flush=True)
    result = compile.measure(fitted, model, mesh, effort=_EFFORT.value)
    if not quiet:
        print(f"{result.seconds:.0f} s", flush=True)
    fsdp = mesh.shape["fsdp"]
    return Plan(config, model, videos, topology, fsdp, _EFFORT.value, result)


def with_keys(config: Config, **changes: Any) -> Config:
    """Returns a copy of a config with some keys changed."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict(changes)
    return changed


def search(first: Plan, mesh: Mesh) -> int:
    """Returns the largest number of clips found to fit on a chip, or 0."""
    config, topology = first.config, first.topology
    unit = advice.clip_multiple(config)  # the search is over multiples of this number
    memory = topology.chip.memory
    attempts = {first.clips // unit: _attempt(first)}
    while (units := largest.next_clips(attempts, memory)) is not None:
        result = compile_plan(
            with_keys(config, batch=units * unit * topology.chips), topology, mesh
        )
        attempts[units] = _attempt(result)
        print(f"  {text.memory_line(result)}", flush=True)
    print(
        f"per chip, {largest.answer(attempts, memory, unit, advice.item_name(config))}",
        flush=True,
    )
    return unit * largest.bounds(attempts)[0]


def _attempt(plan: Plan) -> largest.Attempt:
    return largest.Attempt(plan.result.used, isinstance(plan.result, Figures))


def sweep(config: Config, topology: Topology) -> list[Plan]:
    """Compiles all combinations of a sweep and prints a table."""
    cases = sweep_cases(config, topology)
    few = "" if len(cases) < 4 else "; fewer by --fsdp, --remat, --clips"
    each = f"{plural(len(cases), 'program')} for {topology}, each a minute or more{few}"
    print(each, flush=True)
    plans = []
    for mesh, changed in tqdm(cases, unit="program"):
        plans.append(compile_plan(changed, topology, mesh, quiet=True))
        tqdm.write(f"{text.name(plans[-1])}: {text.memory_line(plans[-1])}")
        write_report(plans)  # an interrupted sweep leaves its results so far
    print("\n" + table(text.header(plans[0]), [text.row(p) for p in plans]))
    print(f"\n{text.effort_note(plans[0])}")
    return plans


def sweep_cases(config: Config, topology: Topology) -> list[tuple[Mesh, Config]]:
    """Returns mesh and config of every combination; prints config changes that a batch needs."""
    default = [1, 4] if topology.chips_per_slice % 4 == 0 and topology.chips > 4 else [1]
    if config.mesh.fsdp != 1:
        default = [config.mesh.fsdp]
    for word in check_values("remat", _REMAT.value):
        if word not in REMAT:
            raise errors.UserError(f"--remat={word} must be one of {', '.join(REMAT)}")
    unit = advice.clip_multiple(config)
    base = max(unit, config.batch // topology.chips // unit * unit)
    clips = numbers("clips", _CLIPS.value) or [base, 4 * base]
    for n in clips:
        _, changed = advice.fit_config(with_keys(config, batch=n * topology.chips), topology.chips)
        if changed:
            print(changed)
    meshes = [compile.tpu_mesh(topology, -1, n) for n in numbers("fsdp", _FSDP.value) or default]
    return [
        (mesh, with_keys(config, remat=remat, batch=n * topology.chips))
        for mesh, remat, n in itertools.product(meshes, _REMAT.value, clips)
    ]


def check_values(flag: str, values: list[str] | None) -> list[str]:
    if values == []:
        raise errors.UserError(f"--{flag} is empty: give values, or leave it out")
    return values or []


def numbers(flag: str, values: list[str] | None) -> list[int]:
    for word in check_values(flag, values):
        if not re.fullmatch(r"[1-9]\d{0,8}", word):
            raise errors.UserError(f"--{flag} must be numbers like 1,4, not {word!r}")
    return [int(word) for word in values or []]


if __name__ == "__main__":
    errors.run(main)
