"""What a compiled step means for a whole experiment on a pod: hours, hosts, batch, what would fit.

Times are bounds: those of a chip that is busy all the time (`podplan.accelerators.Roofs`).
"""

import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import MViTConfig
from mvit_jax.podplan import accelerators
from mvit_jax.podplan.accelerators import GIB, Roofs, Topology
from mvit_jax.podplan.compile import STATE, Figures, TooLarge
from mvit_jax.training import build, experiment
from mvit_jax.training.build import Config

# Clips of 16 x 224 x 224 a second of one core, two out of each decoding of 10 seconds of 340 x 256,
# RandAugment and crop included, of files as they come and of packed shards; and images of 224 x 224
# out of JPEGs (`benchmarks.input_pipeline`, 2026-11-23; they vary by a third from run to run).
CLIPS_OF_A_CORE = {"files": 38.0, "shards": 56.0}
IMAGES_OF_A_CORE = 290.0
MEASURED_REPEATS = 2
FULL = 0.9  # share of a chip's memory that a batch may be expected to fill
MOST_SHARED = 16  # chips that are asked to share a state


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


def count(number: int, noun: str) -> str:
    """ "1 chip", "2 chips"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def noun(config: Config) -> str:
    """What a batch is made of: "clip" or "image"."""
    return "clip" if build.model_config(config, 2).frames > 1 else "image"


def unit(config: Config) -> int:
    """Clips of a chip come in multiples of this."""
    return math.lcm(config.data.repeats, config.accumulate)


def group_of(config: Config, clips: int) -> int:
    """`augment.group` of so many clips of a chip: a divisor of theirs, and of the one given."""
    if config.augment.mixup <= 0 and config.augment.cutmix <= 0:
        return config.augment.group
    return math.gcd(config.augment.group, clips)


def unmixed(config: Config, clips: int) -> bool:
    """Whether mixup and cutmix would be off with so many clips of a chip: a group of one pairs a
    clip with itself (`mixing.mix`)."""
    return group_of(config, clips) == 1 < config.augment.group


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
            f"batch={config.batch} does not divide into {count(chips, 'chip')} in whole {what}s "
            f"(of each chip a multiple of data.repeats={config.data.repeats} and accumulate="
            f"{config.accumulate}): take fewer chips, or {batch_flags(config, batch, chips)}"
        )
    clips, group = config.batch // chips, config.augment.group
    own = group_of(config, clips)
    if own == group:
        return config, ""
    changed = copy.deepcopy(config)
    changed.augment.group = own
    experiment.check_batch(changed, chips)
    warning = ""
    if own == 1:
        warning = (
            f"; a group of one mixes each {what} with itself, so mixup and cutmix DO NOTHING then: "
            "fewer chips or a larger batch keep them"
        )
    return changed, (
        f"augment.group={group} does not divide {count(clips, what)} of a chip, and training would "
        f"refuse it: this plan, and training, take --config.augment.group={own}{warning}"
    )


def batch_flags(config: Config, batch: int, chips: int) -> str:
    """Flags for another batch on so many chips, with rates in proportion, and the rate in words."""
    factor, own = batch / config.batch, group_of(config, batch // chips)
    c = config.optim
    flags, notes = [f"--config.batch={batch}"], []
    if c.lr_batch is not None:
        rate = c.lr * batch / c.lr_batch
        notes.append(f"optim.lr_batch makes the highest rate {rate:.4g}")
    else:
        rates = {name: c[name] * factor for name in ("lr", "start_lr", "end_lr")}
        flags += [f"--config.optim.{name}={rate:.4g}" for name, rate in rates.items()]
    if own != config.augment.group:
        flags.append(f"--config.augment.group={own}")
    if unmixed(config, batch // chips):
        notes.append("a group of one turns mixup and cutmix off")
    return " ".join(flags) + (f" ({'; '.join(notes)})" if notes else "")


def state(found: Figures | TooLarge) -> int:
    """Bytes of a chip that parameters, optimiser and average hold."""
    return sum(found.kinds[kind] for kind in STATE)


def fixed(found: Figures | TooLarge) -> int:
    """Bytes of a chip that do not grow with the batch."""
    return state(found) + found.kinds.get("program", 0)


def of_a_clip(plan: Plan) -> float:
    """Bytes of a chip that a clip more takes, about: what each of those that are there takes."""
    return (plan.found.kinds["activations"] + plan.found.kinds["batch"]) / plan.clips


def room(plan: Plan) -> int:
    """How many clips nearly fill a chip, about; a multiple of `unit`."""
    most = int((FULL * plan.topology.chip.memory - fixed(plan.found)) / of_a_clip(plan))
    return max(0, most - most % unit(plan.config))


def roundest(config: Config, low: int, high: int) -> int | None:
    """Of so many clips to so many, those whose groups mix most as the config says, and of these
    the most; None where there are none, or none that mix."""
    step = unit(config)
    numbers = range(math.ceil(low / step) * step, high + 1, step)
    return max(
        (n for n in numbers if n > 0 and not unmixed(config, n)),
        key=lambda n: (group_of(config, n), n),
        default=None,
    )


def slices_for(plan: Plan, most: int) -> Topology | None:
    """The fewest chips that there are on which the batch, as it is, is at most so many clips a
    chip."""
    config, share = plan.config, unit(plan.config)
    known = accelerators.by_size(plan.topology.kind)
    for place in itertools.takewhile(lambda place: place.chips <= config.batch, known):
        clips, left = divmod(config.batch, place.chips)
        meshes = (-1, place.chips // plan.fsdp)
        divides = not (left or clips % share or place.chips_per_slice % plan.fsdp)
        if divides and clips <= most and config.mesh.data in meshes and not unmixed(config, clips):
            return place
    return None


def batch_advice(plan: Plan, largest: int | None = None) -> list[str]:
    """Whether the recipe's batch makes sense on so many chips, in sentences.

    Args:
      largest: clips that were found to be the most that fit on a chip; else they are estimated.
    """
    config, chips, clips = plan.config, plan.topology.chips, plan.clips
    what, memory = noun(config), plan.topology.chip.memory
    lines = [
        f"{count(config.batch, what)} on {count(chips, 'chip')} are {clips} a chip, which take "
        f"{plan.found.used / memory:.0%} of its memory"
    ]
    most = room(plan) if largest is None else largest
    if most < clips + max(unit(config), clips // 8):
        return [*lines, "that is about as many as fit"]
    better = roundest(config, clips + 1, most)
    # Of an estimate a power of two, which leaves room for its error.
    power = unit(config) * 2 ** ((most // unit(config)).bit_length() - 1)
    if largest is None and power > clips:
        better = power
    if better is None:
        return [*lines, f"{most} a chip would fit, and do not divide into groups that mix"]
    about = (fixed(plan.found) + better * of_a_clip(plan)) / memory
    how = f"{largest} do" if largest is not None else f"about {about:.0%}, by this step's memory"
    lines.append(f"{better} a chip would fit ({how}): {batch_flags(config, better * chips, chips)}")
    place = slices_for(plan, better)
    if place is not None and place.chips < chips:
        lines.append(f"or this batch as it is on {_spread(config, place)}")
    lines.append(
        f"rates in proportion are a rule with limits: this config is stated for {config.batch:,} "
        f"{what}s, and a much larger batch is an experiment of its own"
    )
    return lines


def _spread(config: Config, place: Topology) -> str:
    """The batch as it is on other chips, in words."""
    clips = config.batch // place.chips
    own = group_of(config, clips)
    group = f" (--config.augment.group={own})" if own != config.augment.group else ""
    chips = count(place.chips, "chip")
    return f"{place}: {chips}, {count(clips, noun(config))} on each{group}"


@dataclass(frozen=True)
class Remedy:
    """Something to do about a step that does not fit.

    Attributes:
      what: flags, in words.
      used: bytes of a chip that it would then take; estimated, unless it was compiled.
      fits: whether that alone suffices.
    """

    what: str
    used: int
    fits: bool


def remedies(plan: Plan, largest: int | None = None, again: Plan | None = None) -> list[Remedy]:
    """What would help a step that does not fit; estimates but for what was compiled.

    Args:
      largest: clips that were found to be the most that fit on a chip.
      again: the same with `remat=blocks`.
    """
    found = [*_fewer_clips(plan, largest), *_parts(plan)]
    if again is not None:
        what = "--config.remat=blocks, which computes blocks again in the backward pass"
        found.append(Remedy(what, again.found.used, isinstance(again.found, Figures)))
    found += _split(plan)
    if plan.config.dtype == "float32":
        used = plan.found.used - plan.found.kinds["activations"] // 2
        found.append(_estimated(plan, "--config.dtype=bfloat16, which halves activations", used))
    return found


def _estimated(plan: Plan, what: str, used: int | float) -> Remedy:
    return Remedy(what, int(used), used <= FULL * plan.topology.chip.memory)


def _fewer_clips(plan: Plan, largest: int | None) -> list[Remedy]:
    """A smaller batch, or more chips."""
    config, chips, most = plan.config, plan.topology.chips, largest
    if most is None:
        most = room(plan)
        if most >= plan.clips:  # the line promised too much
            most = plan.clips // 2
    found = []

    def add(what: str, clips: int) -> None:
        used = fixed(plan.found) + clips * of_a_clip(plan)
        remedy = _estimated(plan, what, used)
        found.append(remedy if largest is None else dataclasses.replace(remedy, fits=True))

    fewer = roundest(config, 1, most)
    if fewer is not None:
        flags = batch_flags(config, fewer * chips, chips)
        add(f"a smaller batch, {count(fewer, noun(config))} a chip: {flags}", fewer)
    place = slices_for(plan, most)
    if place is not None:
        add(f"more chips, {_spread(config, place)}", config.batch // place.chips)
    return found


def _parts(plan: Plan) -> list[Remedy]:
    """The same batch, a part of it after the other: the fewest that suffice, or else the most."""
    config, kinds = plan.config, plan.found.kinds
    work = kinds["activations"] * config.accumulate
    best = None
    for parts in range(config.accumulate + 1, plan.clips + 1):
        if plan.clips % math.lcm(parts, config.data.repeats):
            continue
        what = f"the same batch in {parts} parts, one after the other: --config.accumulate={parts}"
        best = _estimated(plan, what, fixed(plan.found) + kinds["batch"] + work / parts)
        if best.fits:
            break
    return [] if best is None else [best]


def _split(plan: Plan) -> list[Remedy]:
    """A state that more chips share: the fewest that suffice, or else the most."""
    held, best = state(plan.found), None
    for chips in range(plan.fsdp + 1, MOST_SHARED + 1):
        if plan.topology.chips_per_slice % chips:
            continue
        share = held * plan.fsdp / chips
        what = (
            f"--config.mesh.fsdp={chips}: parameters, optimiser and average take "
            f"{share / GIB:.2f} in place of {held / GIB:.2f} GiB of a chip"
        )
        best = _estimated(plan, what, plan.found.used - held + share)
        if best.fits:
            break
    return [] if best is None else [best]
