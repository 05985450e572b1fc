"""Whether an experiment fits a TPU pod that one does not have, and how fast it can be there.

    python -m mvit_jax.podplan --config=configs/kinetics.py:mvit_b_16x4 --topology=v5e:16x16
    python -m mvit_jax.podplan --config=... --topology=v5p-128 --largest_batch
    python -m mvit_jax.podplan --config=... --topology=v5e:16x16 --slices=4 \\
        --config.batch=2048 --config.mesh.fsdp=16
    python -m mvit_jax.podplan --config=... --topology=v6e:4x4 --sweep --out=sweep.png

Needs no accelerator: the step that training runs is compiled ahead of time by the TPU compiler of
the extra `tpu`, and what it says of memory, arithmetic, traffic and collectives is put beside what
a chip can do. All times are bounds: a real step takes longer. A step that does not fit is an
answer, with what may make it fit. The data need not be there (`data.train_videos` and
`data.classes` say how much there is).

By default the compiler makes little effort (--effort=-1), as a full-size step takes it some 80
seconds of processor time then and 400 otherwise. Arithmetic, collectives and memory are the same;
the traffic of the main memory (HBM) is overstated, for MViT-B 16x4 by 2.3, and therefore bounds
nothing. --effort=0 compiles as training does, and then it counts.

--largest_batch searches how many clips fill a chip (3 to 6 compilations). --sweep compiles
every mesh of --fsdp, every --remat and every number of --clips on a chip, and prints a table, and
draws it into --out; --json is written again after each.
"""

import copy
import itertools
import json
import os
import re
from typing import Any

# Arrays live on the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from tqdm import tqdm

from mvit_jax.analysis import plots
from mvit_jax.common import errors
from mvit_jax.common.files import check_writable, write_whole
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
_SLICES = flags.DEFINE_integer("slices", 1, "How many of them.")
_EFFORT = flags.DEFINE_float("effort", compile.QUICK, "Of the compiler: -1 is quick, 0 its own.")
_LARGEST = flags.DEFINE_bool("largest_batch", False, "Search the most clips that a chip holds.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Compare meshes, remat and batches.")
_FSDP = flags.DEFINE_list("fsdp", None, "Of a sweep: mesh.fsdp; by default 1 and 4.")
_REMAT = flags.DEFINE_list("remat", ["none", "blocks"], "Of a sweep: some of " + ", ".join(REMAT))
_CLIPS = flags.DEFINE_list("clips", None, "Of a sweep: clips on a chip; by default as given, x 4.")
_OUT = flags.DEFINE_string("out", None, "A picture of it, a .png file.")
_JSON = flags.DEFINE_string("json", None, "A file for all figures.")
OF_A_SWEEP = ("fsdp", "remat", "clips")


def main(argv: list[str]) -> None:
    """Checks all that can be checked before the first compilation, which takes minutes."""
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
    # What is compiled for chips that are not here can be written to a user's cache, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    plans = sweep(config, topology) if _SWEEP.value else [plan(config, topology)]
    if _OUT.value is not None:
        plots.save(text.picture(plans), _OUT.value)
        print(f"\nwrote {_OUT.value}")
    if _JSON.value is not None:
        print(f"wrote {_JSON.value}")


def check_flags() -> None:
    """One sentence for what cannot be, or would be passed over."""
    if not -1 <= _EFFORT.value <= 1:  # not a number is neither
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
            raise errors.UserError(f"--{flag} is of a sweep: add --sweep, or set keys of --config")


def write_report(plans: list[Plan], most: int | None = None) -> None:
    if _JSON.value is not None:
        config = config_flags.get_config_filename(flags.FLAGS["config"])
        write_whole(_JSON.value, json.dumps(text.report(plans, config, most), indent=1))


def plan(config: Config, topology: Topology) -> Plan:
    """Compiles the experiment's own step, and prints all about it."""
    _, changed = advice.fitted(config, topology.chips)
    mesh = compile.tpu_mesh(topology, config.mesh.data, config.mesh.fsdp)
    print(text.title(config, topology, mesh), flush=True)
    if topology.chip.cores > 1 and "-" in str(_TOPOLOGY.value):
        print(f"{_TOPOLOGY.value} counts cores, {topology.chip.cores} a chip")
    if changed:
        print(changed, flush=True)
    found = compiled(config, topology, mesh)
    most = search(found, mesh) if _LARGEST.value else None
    print("\n" + text.text(found, most), flush=True)
    write_report([found], most)
    return found


def compiled(config: Config, topology: Topology, mesh: Mesh, quiet: bool = False) -> Plan:
    """One compilation, and what is known of it."""
    videos, model = dry_run.data_and_model(config)
    runs, _ = advice.fitted(config, topology.chips)
    if not quiet:
        what = plural(config.batch // mesh.size, advice.noun(config))
        how = f"{what} a chip, remat={config.remat}, effort {_EFFORT.value:g}"
        print(f"compiling ({how}) ...", end=" ", flush=True)
    found = compile.measure(runs, model, mesh, effort=_EFFORT.value)
    if not quiet:
        print(f"{found.seconds:.0f} s", flush=True)
    fsdp = mesh.shape["fsdp"]
    return Plan(config, model, videos, topology, fsdp, _EFFORT.value, found)


def with_keys(config: Config, **changes: Any) -> Config:
    """A copy with other values."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict(changes)
    return changed


def search(first: Plan, mesh: Mesh) -> int:
    """The most clips that a chip holds, or that nearly fill it; 0 where none fit."""
    config, topology = first.config, first.topology
    unit = advice.unit(config)  # what is searched is a number of units
    memory = topology.chip.memory
    tried = {first.clips // unit: _tried(first)}
    while (units := largest.next_clips(tried, memory)) is not None:
        found = compiled(with_keys(config, batch=units * unit * topology.chips), topology, mesh)
        tried[units] = _tried(found)
        print(f"  {text.memory_line(found)}", flush=True)
    print(f"of a chip, {largest.answer(tried, memory, unit, advice.noun(config))}", flush=True)
    return unit * largest.bounds(tried)[0]


def _tried(found: Plan) -> largest.Tried:
    return largest.Tried(found.found.used, isinstance(found.found, Figures))


def sweep(config: Config, topology: Topology) -> list[Plan]:
    """Compiles all combinations, and prints them as a table."""
    cases = sweep_cases(config, topology)
    few = "" if len(cases) < 4 else "; fewer by --fsdp, --remat, --clips"
    each = f"{plural(len(cases), 'program')} for {topology}, each a minute or more{few}"
    print(each, flush=True)
    plans = []
    for mesh, changed in tqdm(cases, unit="program"):
        plans.append(compiled(changed, topology, mesh, quiet=True))
        tqdm.write(f"{text.name(plans[-1])}: {text.memory_line(plans[-1])}")
        write_report(plans)  # what is there is kept
    print("\n" + table(text.header(plans[0]), [text.row(p) for p in plans]))
    print(f"\n{text.effort_note(plans[0])}")
    return plans


def sweep_cases(config: Config, topology: Topology) -> list[tuple[Mesh, Config]]:
    """Mesh and config of every combination; says what of a config has to change."""
    default = [1, 4] if topology.chips_per_slice % 4 == 0 and topology.chips > 4 else [1]
    if config.mesh.fsdp != 1:
        default = [config.mesh.fsdp]
    for word in words("remat", _REMAT.value):
        if word not in REMAT:
            raise errors.UserError(f"--remat={word} is none of {', '.join(REMAT)}")
    unit = advice.unit(config)
    own = max(unit, config.batch // topology.chips // unit * unit)
    clips = numbers("clips", _CLIPS.value) or [own, 4 * own]
    for n in clips:
        _, changed = advice.fitted(with_keys(config, batch=n * topology.chips), topology.chips)
        if changed:
            print(changed)
    meshes = [compile.tpu_mesh(topology, -1, n) for n in numbers("fsdp", _FSDP.value) or default]
    return [
        (mesh, with_keys(config, remat=remat, batch=n * topology.chips))
        for mesh, remat, n in itertools.product(meshes, _REMAT.value, clips)
    ]


def words(flag: str, given: list[str] | None) -> list[str]:
    if given == []:
        raise errors.UserError(f"--{flag} is empty: give some, or leave it out")
    return given or []


def numbers(flag: str, given: list[str] | None) -> list[int]:
    for word in words(flag, given):
        if not re.fullmatch(r"[1-9]\d{0,8}", word):
            raise errors.UserError(f"--{flag} takes numbers, like 1,4, not {word!r}")
    return [int(word) for word in given or []]


if __name__ == "__main__":
    errors.run(main)
