"""Plans for pods (`podplan.advice`) as text, table, figure and JSON."""

import math
import time
from typing import Any

import jax
from jax.sharding import Mesh
from matplotlib.figure import Figure

from mvit_jax.analysis import plots
from mvit_jax.common.text import Lines, indent, plural, section, table
from mvit_jax.config import Config
from mvit_jax.podplan import accelerators
from mvit_jax.podplan import advice as pods
from mvit_jax.podplan.accelerators import GIB, RESOURCES, Topology
from mvit_jax.podplan.advice import Plan, item_name
from mvit_jax.podplan.compile import Figures, TooLarge
from mvit_jax.podplan.hlo import cost as counting


def title(config: Config, topology: Topology, mesh: Mesh) -> str:
    return (
        f"{config.model.variant} on {topology}: {plural(topology.chips, 'chip')} of "
        f"{plural(topology.hosts, 'host')}, mesh data {mesh.shape['data']} x fsdp "
        f"{mesh.shape['fsdp']}, {config.dtype}"
    )


def text(plan: Plan, max_clips: int | None) -> str:
    """Returns a plan as text in sections.

    Args:
      plan: the compiled plan.
      max_clips: result of a search for the most clips per chip; None without a search.
    """
    parts = [memory_line(plan), section("Memory of a chip, GiB", _memory_lines(plan))]
    advice = _bullets(pods.advice(plan, max_clips))
    if isinstance(plan.result, TooLarge):
        return "\n\n".join([*parts, f"Ways to make it fit\n{advice}"])
    return "\n\n".join([
        *parts,
        section("A step, on each chip", _step_lines(plan)),
        "Collectives of a step\n" + indent(_collectives(plan)),
        section("Step time, lower bounds", _bound_lines(plan)),
        section("All steps of the recipe, lower bounds", _recipe_lines(plan)),
        section("Each host reads and decodes, at most", _host_lines(plan)),
        f"Batch\n{advice}",
        "Notes\n" + _bullets([effort_note(plan), *_notes(plan)]),
    ])  # fmt: skip


def _bullets(lines: list[str]) -> str:
    return indent("\n".join(f"- {line}" for line in lines))


def memory_line(plan: Plan) -> str:
    memory, used = plan.topology.chip.memory / GIB, plan.result.used / GIB
    if isinstance(plan.result, TooLarge):
        return f"DOES NOT FIT: it needs {used:.2f} of {memory:.2f} GiB of a chip"
    if used > memory:
        return (
            f"fits, according to the compiler: {used:.2f} of {memory:.2f} GiB of a chip, some of "
            "which is reused within the step"
        )
    return f"fits: {used:.2f} of {memory:.2f} GiB of a chip"


def _memory_lines(plan: Plan) -> Lines:
    lines = [(kind, f"{size / GIB:8.3f}") for kind, size in plan.result.kinds.items() if size]
    return sorted(lines, key=lambda line: -float(line[1]))


def _step_lines(plan: Plan) -> Lines:
    assert isinstance(plan.result, Figures)
    counts, clips, item = plan.result.counts, plan.clips, item_name(plan.config)
    overstated = ", overstated" if plan.effort < 0 else ""
    hbm = (
        f"{_format_si(counts.hbm_bytes)}B, {_format_si(counts.hbm_bytes / clips)}B each{overstated}"
    )
    flops = counts.flops + counts.kernel_flops
    kernels = f"{counts.kernel_flops / flops:.0%} in {plural(len(counts.kernels), 'kernel')}"
    return [
        (f"{item}s", f"{clips} (batch {plan.config.batch:,})"),
        ("arithmetic", f"{_format_si(flops)}FLOP, {_format_si(flops / clips)}FLOP each; {kernels}"),
        ("main memory", hbm),
        ("all operands", f"{_format_si(counts.bytes)}B, {_format_si(counts.bytes / clips)}B each"),
    ]


def _collectives(plan: Plan) -> str:
    assert isinstance(plan.result, Figures)
    rows = [
        (kind, f"{devices:,}", f"{_format_si(size)}B", _time(seconds))
        for kind, devices, size, seconds in accelerators.sum_by_kind(
            plan.result.counts.collectives, plan.topology.chip
        )
    ]
    return table(("kind", "devices", "per chip", "at least"), rows) if rows else "none"


def _bound_lines(plan: Plan) -> Lines:
    bounds = plan.bounds
    rate = plan.config.batch / bounds.longest
    share = f"arithmetic then has {bounds.compute / bounds.longest:.0%} of its peak"
    lines = [
        *((RESOURCES[name], _time(seconds)) for name, seconds in vars(bounds).items() if seconds),
        ("a step", f"{_time(bounds.longest)} at least, bound by {RESOURCES[bounds.bound]}"),
        ("rate", f"{rate:,.0f} {item_name(plan.config)}s/s at most; {share}"),
    ]
    if plan.effort < 0:
        seconds = plan.roofline_bounds.memory
        bound = f"{_time(seconds)} by this program's traffic, overstated at this effort"
        lines.append((RESOURCES["memory"], f"{bound}: no bound; --effort=0 measures it"))
    return lines


def _recipe_lines(plan: Plan) -> Lines:
    config = plan.config
    what = "videos" if plan.model.frames > 1 else "images"
    epochs = f"{config.epochs:g} epochs of {plan.videos:,} {what} x {config.data.repeats}"
    return [
        ("steps", f"{plan.steps:,}: {epochs}"),
        ("hours", f"{_number(plan.hours)} at least"),
        ("chip-hours", f"{_number(plan.chip_hours)} at least"),
        ("not included", "compilation, validation, checkpoints, waiting for data, and all losses"),
        ("", "against peak rates"),
    ]


def _host_lines(plan: Plan) -> Lines:
    hosts, config = plan.topology.hosts, plan.config
    need = pods.input_rate(config, plan.model, hosts, plan.bounds.longest)
    what, augmented = ("videos", "clips") if plan.model.frames > 1 else ("images", "as augmented")
    whole_host = plan.topology.chips_per_slice >= accelerators.CHIPS_PER_HOST
    of = f" of {plan.topology.chip.host_cpus} vCPUs" if whole_host else ""
    return [
        (augmented, f"{_number(need.clips)} a second"),
        (what, f"{_number(need.videos)} a second"),
        *(
            (kind, f"about {math.ceil(cores):,} cores{of}, by our measurement of one core")
            for kind, cores in need.cores.items()
        ),
    ]


def _format_si(value: int | float) -> str:
    """Formats a value with three digits and a prefix: "1.23 G"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _number(value: int | float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _notes(plan: Plan) -> list[str]:
    """Returns caveats that apply to a plan."""
    assert isinstance(plan.result, Figures)
    config, loops = plan.config, plan.result.counts.unknown_loops
    lines = []
    if config.precision != "default":
        lines.append(
            f"precision={config.precision} needs several bfloat16 passes; peak rates are of one"
        )
    if loops:
        scopes = sorted({counting.scopes(loop)[0] for loop in loops})
        lines.append(
            f"{plural(len(loops), 'loop')} in {', '.join(scopes)} with a data-dependent number of "
            "iterations (rejection sampling), counted once"
        )
    return lines


def effort_note(plan: Plan) -> str:
    if plan.effort >= 0:
        return f"compiled with effort {plan.effort:g}"
    return (
        f"compiled with effort {plan.effort:g}: traffic of the main memory (HBM) is overstated "
        "(by a factor of 2.3 for MViT-B 16x4) and is not used as a bound; --effort=0 compiles as "
        "training does, takes about five times as long, and measures it"
    )


def header(plan: Plan) -> tuple[str, ...]:
    """Returns the header of a table of plans."""
    item = item_name(plan.config)
    return (
        *("mesh", "remat", f"{item}s a chip", "batch", "GiB", "HBM, ms", "ms a step, at least"),
        *("bound by", f"{item}s/s, at most", "hours", "chip-hours"),
    )


def name(plan: Plan) -> str:
    return f"fsdp {plan.fsdp}, remat={plan.config.remat}, {plan.clips} per chip"


def row(plan: Plan) -> tuple[str, ...]:
    mesh = f"{plan.topology.chips // plan.fsdp} x {plan.fsdp}"
    first = (mesh, plan.config.remat, f"{plan.clips}", f"{plan.config.batch:,}")
    used = f"{plan.result.used / GIB:.2f}"
    if isinstance(plan.result, TooLarge):
        return (*first, used, "", "does not fit", "", "", "", "")
    bounds = plan.bounds
    return (
        *first, used, f"{1000 * plan.roofline_bounds.memory:.2f}", f"{1000 * bounds.longest:.2f}",
        RESOURCES[bounds.bound], f"{plan.config.batch / bounds.longest:,.0f}", _number(plan.hours),
        _number(plan.chip_hours),
    )  # fmt: skip


def picture(plans: list[Plan]) -> Figure:
    """Plots memory by kind and roofline bounds of several plans."""
    first = plans[0]
    causes = {"compute": "arithmetic", "memory": "HBM", "ici": "ICI", "dcn": "DCN"}
    if first.effort < 0:
        causes["memory"] += " (overstated, no bound)"
    times = [
        None
        if isinstance(p.result, TooLarge)
        else {causes[k]: 1000 * v / p.clips for k, v in vars(p.roofline_bounds).items() if v}
        for p in plans
    ]
    return plots.budgets(
        [name(p) for p in plans],
        [{k: size / GIB for k, size in p.result.kinds.items() if size} for p in plans],
        first.topology.chip.memory / GIB,
        times,
        each=item_name(first.config),
        title=f"{first.config.model.variant} on {first.topology}, "
        f"{plural(first.topology.chips, 'chip')}",
    )


def report(plans: list[Plan], config: str, max_clips: int | None = None) -> dict[str, Any]:
    """Returns all results as a JSON-serialisable dict, in seconds, bytes and hours.

    Args:
      plans: plans for one config and topology.
      config: the value of `--config`.
      max_clips: as for `text`, with a single plan.
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
        "plans": [_entry(p, max_clips) for p in plans],
    }


def _entry(plan: Plan, max_clips: int | None) -> dict[str, Any]:
    config = plan.config
    entry = {
        "data": plan.topology.chips // plan.fsdp,
        "fsdp": plan.fsdp,
        "remat": config.remat,
        "dtype": config.dtype,
        "accumulate": config.accumulate,
        "augment_group": pods.group_size(config, plan.clips),
        "batch": config.batch,
        "clips_a_chip": plan.clips,
        "largest_clips_a_chip": max_clips,  # None: not searched
        "fits": isinstance(plan.result, Figures),
        "memory_bytes": plan.result.used,
        "memory_by_kind": plan.result.kinds,
        "compile_seconds": round(plan.result.seconds, 1),
        "advice": pods.advice(plan, max_clips),
    }
    if isinstance(plan.result, TooLarge):
        return entry
    counts, bounds = plan.result.counts, plan.bounds
    rate = pods.input_rate(config, plan.model, plan.topology.hosts, bounds.longest)
    return entry | {
        "flops": counts.flops + counts.kernel_flops,
        "hbm_bytes": counts.hbm_bytes,
        "hbm_bytes_overstated": plan.effort < 0,
        "collectives": [
            {"kind": kind, "devices": devices, "bytes": size, "seconds": seconds}
            for kind, devices, size, seconds in accelerators.sum_by_kind(
                counts.collectives, plan.topology.chip
            )
        ],
        "roofline_seconds": vars(plan.roofline_bounds),
        "step_seconds_at_least": bounds.longest,
        "bound_by": bounds.bound,
        "clips_a_second_at_most": config.batch / bounds.longest,
        "host_at_most": vars(rate),  # clips and videos per second, cores by storage format
        "steps": plan.steps,
        "hours": plan.hours,
        "chip_hours": plan.chip_hours,
    }
