"""Plans for pods (`podplan.advice`) in words, as a table, a picture and a report for programs."""

import math
import time
from typing import Any

import jax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from mvit_jax.analysis import plots
from mvit_jax.common.text import Lines, indented, plural, section, table
from mvit_jax.config import Config
from mvit_jax.podplan import accelerators
from mvit_jax.podplan import advice as pods
from mvit_jax.podplan.accelerators import GIB, ROOFS, Topology
from mvit_jax.podplan.advice import Plan, noun
from mvit_jax.podplan.compile import Figures, TooLarge
from mvit_jax.podplan.hlo import cost as counting


def title(config: Config, topology: Topology, mesh: Mesh) -> str:
    return (
        f"{config.model.variant} on {topology}: {plural(topology.chips, 'chip')} of "
        f"{plural(topology.hosts, 'host')}, mesh data {mesh.shape['data']} x fsdp "
        f"{mesh.shape['fsdp']}, {config.dtype}"
    )


def text(found: Plan, most: int | None) -> str:
    """All that is known, in sections; `most` clips were found to be the most that fit on a chip."""
    parts = [memory_line(found), section("Memory of a chip, GiB", _memory_lines(found))]
    advice = _listed(pods.advice(found, most))
    if isinstance(found.found, TooLarge):
        return "\n\n".join([*parts, f"What may make it fit\n{advice}"])
    return "\n\n".join([
        *parts,
        section("A step, on each chip", _step_lines(found)),
        "What passes between chips in a step\n" + indented(_collectives(found)),
        section("The least time of a step: bounds, no promise", _roof_lines(found)),
        section("The whole recipe: bounds, no promise", _recipe_lines(found)),
        section("Each host reads and decodes, at most", _host_lines(found)),
        f"Batch\n{advice}",
        "Notes\n" + _listed([effort_note(found), *_notes(found)]),
    ])  # fmt: skip


def _listed(lines: list[str]) -> str:
    return indented("\n".join(f"- {line}" for line in lines))


def memory_line(found: Plan) -> str:
    memory, used = found.topology.chip.memory / GIB, found.found.used / GIB
    if isinstance(found.found, TooLarge):
        return f"DOES NOT FIT: it would take {used:.2f} of {memory:.2f} GiB of a chip"
    if used > memory:
        return (
            f"fits, by the compiler's word: parts add up to {used:.2f} of {memory:.2f} GiB of a "
            "chip, and some lie where others were"
        )
    return f"fits: {used:.2f} of {memory:.2f} GiB of a chip"


def _memory_lines(found: Plan) -> Lines:
    lines = [(kind, f"{size / GIB:8.3f}") for kind, size in found.found.kinds.items() if size]
    return sorted(lines, key=lambda line: -float(line[1]))


def _step_lines(found: Plan) -> Lines:
    assert isinstance(found.found, Figures)
    counts, clips, what = found.found.counts, found.clips, noun(found.config)
    overstated = ", overstated" if found.effort < 0 else ""
    hbm = f"{_big(counts.hbm_bytes)}B, {_big(counts.hbm_bytes / clips)}B each{overstated}"
    flops = counts.flops + counts.kernel_flops
    kernels = f"{counts.kernel_flops / flops:.0%} in {plural(len(counts.kernels), 'kernel')}"
    return [
        (f"{what}s", f"{clips} (batch {found.config.batch:,})"),
        ("arithmetic", f"{_big(flops)}FLOP, {_big(flops / clips)}FLOP each; {kernels}"),
        ("main memory", hbm),
        ("all operands", f"{_big(counts.bytes)}B, {_big(counts.bytes / clips)}B each"),
    ]


def _collectives(found: Plan) -> str:
    assert isinstance(found.found, Figures)
    rows = [
        (kind, f"{among:,}", f"{_big(size)}B", _time(seconds))
        for kind, among, size, seconds in accelerators.by_kind(
            found.found.counts.collectives, found.topology.chip
        )
    ]
    return table(("kind", "among", "of a chip", "at least"), rows) if rows else "nothing"


def _roof_lines(found: Plan) -> Lines:
    bounds = found.bounds
    rate = found.config.batch / bounds.longest
    share = f"arithmetic then has {bounds.compute / bounds.longest:.0%} of its peak"
    lines = [
        *((ROOFS[roof], _time(seconds)) for roof, seconds in vars(bounds).items() if seconds),
        ("a step", f"{_time(bounds.longest)} at least, bound by {ROOFS[bounds.bound]}"),
        ("rate", f"{rate:,.0f} {noun(found.config)}s/s at most; {share}"),
    ]
    if found.effort < 0:
        told = f"{_time(found.roofs.memory)} by this program's traffic, overstated at this effort"
        lines.append((ROOFS["memory"], f"{told}: no bound; --effort=0 tells it"))
    return lines


def _recipe_lines(found: Plan) -> Lines:
    config = found.config
    what = "videos" if found.model.frames > 1 else "images"
    epochs = f"{config.epochs:g} epochs of {found.videos:,} {what} x {config.data.repeats}"
    return [
        ("steps", f"{found.steps:,}: {epochs}"),
        ("hours", f"{_number(found.hours)} at least"),
        ("chip-hours", f"{_number(found.chip_hours)} at least"),
        ("left out", "compiling, validation, checkpoints, waiting for data, and all that keeps a"),
        ("", "chip from its peaks"),
    ]


def _host_lines(found: Plan) -> Lines:
    hosts, config = found.topology.hosts, found.config
    need = pods.reading(config, found.model, hosts, found.bounds.longest)
    what, made = ("videos", "clips") if found.model.frames > 1 else ("images", "as augmented")
    whole = found.topology.chips_per_slice >= accelerators.CHIPS_PER_HOST
    of = f" of {found.topology.chip.host_cpus} vCPUs" if whole else ""
    return [
        (made, f"{_number(need.clips)} a second"),
        (what, f"{_number(need.videos)} a second"),
        *(
            (kind, f"about {math.ceil(cores):,} cores{of}, by what one of ours does")
            for kind, cores in need.cores.items()
        ),
    ]


def _big(value: int | float) -> str:
    """Three digits and a prefix: "1.23 G"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _number(value: int | float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _notes(found: Plan) -> list[str]:
    """What a reader should know besides, where it is so."""
    assert isinstance(found.found, Figures)
    config, loops = found.config, found.found.counts.unknown_loops
    lines = []
    if config.precision != "default":
        lines.append(f"precision={config.precision} multiplies several times: peaks are bfloat16's")
    if loops:
        where = sorted({counting.scopes(loop)[0] for loop in loops})
        lines.append(
            f"{plural(len(loops), 'loop')} in {', '.join(where)} run until their data says so "
            "(draws that are tried again), and count once"
        )
    return lines


def effort_note(found: Plan) -> str:
    if found.effort >= 0:
        return f"compiled with effort {found.effort:g}"
    return (
        f"compiled with effort {found.effort:g}: traffic of the main memory (HBM) is overstated "
        "(for MViT-B 16x4 by 2.3) and bounds nothing here; --effort=0 compiles as training does, "
        "in some five times the time, and tells it"
    )


def header(found: Plan) -> tuple[str, ...]:
    """Of a table of plans."""
    what = noun(found.config)
    return (
        *("mesh", "remat", f"{what}s a chip", "batch", "GiB", "HBM, ms", "ms a step, at least"),
        *("bound by", f"{what}s/s, at most", "hours", "chip-hours"),
    )


def name(found: Plan) -> str:
    return f"fsdp {found.fsdp}, remat={found.config.remat}, {found.clips} a chip"


def row(found: Plan) -> tuple[str, ...]:
    mesh = f"{found.topology.chips // found.fsdp} x {found.fsdp}"
    first = (mesh, found.config.remat, f"{found.clips}", f"{found.config.batch:,}")
    used = f"{found.found.used / GIB:.2f}"
    if isinstance(found.found, TooLarge):
        return (*first, used, "", "does not fit", "", "", "", "")
    bounds = found.bounds
    return (
        *first, used, f"{1000 * found.roofs.memory:.2f}", f"{1000 * bounds.longest:.2f}",
        ROOFS[bounds.bound], f"{found.config.batch / bounds.longest:,.0f}", _number(found.hours),
        _number(found.chip_hours),
    )  # fmt: skip


def picture(plans: list[Plan]) -> Figure:
    """Memory by kind, and what each part of a step takes at its peak, of each plan."""
    first = plans[0]
    causes = {"compute": "arithmetic", "memory": "HBM", "links": "ICI", "outside": "DCN"}
    if first.effort < 0:
        causes["memory"] += " (overstated, no bound)"
    times = [
        None
        if isinstance(p.found, TooLarge)
        else {causes[k]: 1000 * v / p.clips for k, v in vars(p.roofs).items() if v}
        for p in plans
    ]
    return plots.budgets(
        [name(p) for p in plans],
        [{k: size / GIB for k, size in p.found.kinds.items() if size} for p in plans],
        first.topology.chip.memory / GIB,
        times,
        each=noun(first.config),
        title=f"{first.config.model.variant} on {first.topology}, "
        f"{plural(first.topology.chips, 'chip')}",
    )


def report(plans: list[Plan], config: str, most: int | None = None) -> dict[str, Any]:
    """All figures, for other programs: seconds, bytes, hours.

    Args:
      config: which one it is, as `--config` names it.
      most: of a single plan, as for `text`.
    """
    first = plans[0]
    return {
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "config": config,
        "variant": first.config.model.variant,
        "topology": first.topology.name,
        "slices": first.topology.slices,
        "chips": first.topology.chips,
        "hosts": first.topology.hosts,
        "videos": first.videos,
        "effort": first.effort,
        "plans": [_entry(p, most) for p in plans],
    }


def _entry(found: Plan, most: int | None) -> dict[str, Any]:
    config = found.config
    known = {
        "data": found.topology.chips // found.fsdp,
        "fsdp": found.fsdp,
        "remat": config.remat,
        "dtype": config.dtype,
        "accumulate": config.accumulate,
        "augment_group": pods.group_of(config, found.clips),
        "batch": config.batch,
        "clips_a_chip": found.clips,
        "largest_clips_a_chip": most,  # None: not searched
        "fits": isinstance(found.found, Figures),
        "memory_bytes": found.found.used,
        "memory_by_kind": found.found.kinds,
        "compile_seconds": round(found.found.seconds, 1),
        "advice": pods.advice(found, most),
    }
    if isinstance(found.found, TooLarge):
        return known
    counts, bounds = found.found.counts, found.bounds
    reading = pods.reading(config, found.model, found.topology.hosts, bounds.longest)
    return known | {
        "flops": counts.flops + counts.kernel_flops,
        "hbm_bytes": counts.hbm_bytes,
        "hbm_bytes_overstated": found.effort < 0,
        "collectives": [
            {"kind": kind, "devices": among, "bytes": size, "seconds": seconds}
            for kind, among, size, seconds in accelerators.by_kind(
                counts.collectives, found.topology.chip
            )
        ],
        "roofs_seconds": vars(found.roofs),
        "step_seconds_at_least": bounds.longest,
        "bound_by": bounds.bound,
        "clips_a_second_at_most": config.batch / bounds.longest,
        "host_at_most": vars(reading),  # clips and videos a second, cores by how they are stored
        "steps": found.steps,
        "hours": found.hours,
        "chip_hours": found.chip_hours,
    }
