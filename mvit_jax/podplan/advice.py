"""What a compiled step means for a whole experiment on a pod: hours, hosts, the largest batch.

Times are bounds: those of a chip that is busy all the time (`podplan.accelerators.Roofs`).
"""

import copy
import dataclasses
import math
from dataclasses import dataclass

from mvit_jax.common.errors import UserError
from mvit_jax.common.text import plural
from mvit_jax.config import Config
from mvit_jax.models.plan import MViTConfig
from mvit_jax.podplan import accelerators
from mvit_jax.podplan.accelerators import GIB, Roofs, Topology
from mvit_jax.podplan.compile import STATE, Figures, TooLarge
from mvit_jax.training import build

# Clips of 16 x 224 x 224 a second of one core, two out of each decoding of 10 seconds of 340 x 256,
# RandAugment and crop included, of files as they come and of packed shards; and images of 224 x 224
# out of JPEGs (`benchmarks.input_pipeline`, 2026-11-23; they vary by a third from run to run).
CLIPS_OF_A_CORE = {"files": 38.0, "shards": 56.0}
IMAGES_OF_A_CORE = 290.0
MEASURED_REPEATS = 2
FULL = 0.9  # share of a chip's memory that a batch may be expected to fill


@dataclass(frozen=True)
class Plan:
    """An experiment, where it runs, and what its compiled step costs there.

    Attributes:
      config: as given; `fitted` makes of it what was compiled.
      videos: to train on.
      fsdp: chips that share one copy of the state.
      effort: of the compiler.
    """

    config: Config
    model: MViTConfig
    videos: int
    topology: Topology
    fsdp: int
    effort: float
    found: Figures | TooLarge

    @property
    def clips(self) -> int:
        """Of a chip, in a step."""
        return self.config.batch // self.topology.chips

    @property
    def steps(self) -> int:
        return build.count_steps(self.config, self.config.epochs, self.videos)

    @property
    def roofs(self) -> Roofs:
        """Of the program that was compiled."""
        assert isinstance(self.found, Figures)
        return accelerators.roofs(self.found.counts, self.topology.chip)

    @property
    def bounds(self) -> Roofs:
        """Those of them that no program beats. With less effort than training's the compiler brings
        nothing on the chip ahead of time: main memory then moves more than it must."""
        found = self.roofs
        return found if self.effort >= 0 else dataclasses.replace(found, memory=0.0)

    @property
    def hours(self) -> float:
        """At least, of all steps."""
        return self.steps * self.bounds.longest / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.topology.chips


@dataclass(frozen=True)
class Reading:
    """What each host has to read and decode, at most: as fast as chips could ever eat it.

    Attributes:
      clips, videos: a second.
      cores: that it takes, by how the videos are stored.
    """

    clips: float
    videos: float
    cores: dict[str, float]


def reading(config: Config, model: MViTConfig, hosts: int, seconds: float) -> Reading:
    """Of each of so many hosts, for steps of so many seconds.

    Cores are scaled from our own measurements by pixels. With one clip out of each decoding, where
    two were measured, decoding is taken as all of the work, which makes it twice as much.
    """
    clips = config.batch / seconds / hosts
    pixels = model.frames * model.size**2
    if model.frames == 1:
        rates, measured = {"JPEGs": IMAGES_OF_A_CORE}, 224**2
    else:
        rates, measured = CLIPS_OF_A_CORE, 16 * 224**2
    decodings = max(1.0, MEASURED_REPEATS / config.data.repeats) if model.frames > 1 else 1.0
    work = pixels / measured * decodings
    return Reading(
        clips=clips,
        videos=clips / config.data.repeats,
        cores={name: clips * work / rate for name, rate in rates.items()},
    )


def noun(config: Config) -> str:
    """What a batch is made of: "clip" or "image"."""
    return "clip" if build.model_config(config, 2).frames > 1 else "image"


def unit(config: Config) -> int:
    """Clips of a chip come in multiples of this."""
    return math.lcm(config.data.repeats, config.accumulate)


def group_of(config: Config, clips: int) -> int:
    """Returns the mixup group size for so many clips of a chip: a divisor of both."""
    if config.augment.mixup <= 0 and config.augment.cutmix <= 0:
        return config.augment.mixup_group_size
    return math.gcd(config.augment.mixup_group_size, clips)


def fitted(config: Config, chips: int) -> tuple[Config, str]:
    """The config as it can run on so many chips, and a sentence on what had to change: clips that
    share a mixing weight must be on one chip.

    Raises:
      UserError: the batch does not divide among the chips; says which does, and its rate.
    """
    share, what = chips * unit(config), noun(config)
    if config.batch % share:
        batch = math.ceil(config.batch / share) * share
        raise UserError(
            f"batch={config.batch} does not divide into {plural(chips, 'chip')} in whole {what}s "
            f"(of each chip a multiple of data.repeats={config.data.repeats} and accumulate="
            f"{config.accumulate}): take fewer chips, or {batch_flags(config, batch, chips)}"
        )
    clips, group = config.batch // chips, config.augment.mixup_group_size
    own = group_of(config, clips)
    if own == group:
        return config, ""
    changed = copy.deepcopy(config)
    changed.augment.mixup_group_size = own
    build.check_batch(changed, chips)
    warning = ""
    if own == 1:
        warning = (
            f"; a group of one mixes each {what} with itself, so mixup and cutmix DO NOTHING then: "
            "fewer chips or a larger batch keep them"
        )
    return changed, (
        f"augment.mixup_group_size={group} does not divide {plural(clips, what)} of a chip, and "
        "training would refuse it: this plan, and training, take "
        f"--config.augment.mixup_group_size={own}{warning}"
    )


def batch_flags(config: Config, batch: int, chips: int) -> str:
    """Flags for another batch on so many chips, with rates in proportion, and the rate in words."""
    c, own = config.optim, group_of(config, batch // chips)
    flags, note = [f"--config.batch={batch}"], ""
    if c.lr_batch is not None:
        note = f" (optim.lr_batch makes the highest rate {c.lr * batch / c.lr_batch:.4g})"
    else:
        rates = {name: c[name] * batch / config.batch for name in ("lr", "start_lr", "end_lr")}
        flags += [f"--config.optim.{name}={rate:.4g}" for name, rate in rates.items()]
    if own != config.augment.mixup_group_size:
        flags.append(f"--config.augment.mixup_group_size={own}")
    return " ".join(flags) + note


def state(found: Figures | TooLarge) -> int:
    """Bytes of a chip that parameters, optimiser and average hold."""
    return sum(found.kinds[kind] for kind in STATE)


def spare(plan: Plan) -> float:
    """Bytes of a chip that are left for what grows with the batch, were it nearly full."""
    fixed = state(plan.found) + plan.found.kinds.get("program", 0)
    return FULL * plan.topology.chip.memory - fixed


def of_a_clip(plan: Plan) -> float:
    """Bytes of a chip that a clip more takes, about: what each of those that are there takes."""
    return (plan.found.kinds["activations"] + plan.found.kinds["batch"]) / plan.clips


def largest_batch(plan: Plan, most: int | None = None) -> int:
    """Clips of a chip that nearly fill it and keep the mixing group; what no group divides into
    where there are fewer; 0 where none fit.

    Args:
      most: clips that were found to be the most that fit; else they are estimated.
    """
    if most is None:
        most = max(0, int(spare(plan) / of_a_clip(plan)))
        if isinstance(plan.found, TooLarge) and most >= plan.clips:  # the line promised too much
            most = plan.clips // 2
    step, config = unit(plan.config), plan.config
    mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    whole = math.lcm(step, config.augment.mixup_group_size) if mixed else step
    return most - most % (whole if most >= whole else step)


def advice(plan: Plan, most: int | None = None) -> list[str]:
    """The largest batch, and flags for what may help where the step does not fit; a line each.

    Args:
      most: clips that were found to be the most that fit on a chip; else they are estimated.
    """
    config, chips, what = plan.config, plan.topology.chips, noun(plan.config)
    best, lines = largest_batch(plan, most), []
    fits = isinstance(plan.found, Figures)
    if fits:
        lines.append(
            f"{plural(config.batch, what)} on {plural(chips, 'chip')} are {plan.clips} a chip, "
            f"which take {plan.found.used / plan.topology.chip.memory:.0%} of its memory"
        )
    if fits and best <= plan.clips:
        lines.append("that is about as many as fit")
    elif best:
        how = "fit" if most is not None else "should fit, by this step's memory"
        lines.append(f"{best} a chip {how}: {batch_flags(config, best * chips, chips)}")
    return lines if fits else [*lines, *_savings(plan)]


def _savings(plan: Plan) -> list[str]:
    """Flags with which the same batch takes less memory."""
    config, kinds, lines = plan.config, plan.found.kinds, []
    if config.remat != "blocks":
        lines.append("--config.remat=blocks computes blocks again in the backward pass")
    room, work = spare(plan) - kinds["batch"], kinds["activations"] * config.accumulate
    for parts in range(config.accumulate + 1, plan.clips + 1):
        if plan.clips % math.lcm(parts, config.data.repeats) == 0 and work / parts <= room:
            lines.append(f"--config.accumulate={parts} works on a part of the batch at a time")
            break
    if plan.fsdp < plan.topology.chips_per_slice:
        held = f"{state(plan.found) / GIB:.2f} GiB of parameters, optimiser and average"
        lines.append(f"--config.mesh.fsdp={plan.topology.chips_per_slice} splits {held}")
    if config.dtype == "float32":
        lines.append("--config.dtype=bfloat16 halves activations")
    return lines
