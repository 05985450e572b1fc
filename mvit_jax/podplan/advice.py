"""Estimates for an experiment on a pod, from its compiled step: hours, hosts, largest batch.

Times are lower bounds, at peak rates of the chip (`podplan.accelerators.RooflineBounds`).
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
from mvit_jax.podplan.accelerators import GIB, RooflineBounds, Topology
from mvit_jax.podplan.compile import STATE, Figures, TooLarge
from mvit_jax.training import build

# Clips and images per second of one core (`benchmarks.input_pipeline`, 2026-11-23; vary by a third
# between runs). Clips have 16 x 224 x 224 pixels, with RandAugment and crop; each decoding of a
# 10-second video at 340 x 256 gives two clips. Images have 224 x 224 pixels, from JPEGs.
CLIPS_OF_A_CORE = {"files": 38.0, "shards": 56.0}
IMAGES_OF_A_CORE = 290.0
MEASURED_REPEATS = 2
FULL = 0.9  # share of a chip's memory that the largest batch should fill


@dataclass(frozen=True)
class Plan:
    """An experiment on a topology, with the costs of its compiled step.

    Attributes:
      config: the experiment's config; the compiled config is `fit_config(config, chips)`.
      model: the architecture.
      videos: number of training videos.
      topology: the slices.
      fsdp: chips over which the state is sharded.
      effort: the compiler's effort.
      result: costs of the compiled step.
    """

    config: Config
    model: MViTConfig
    videos: int
    topology: Topology
    fsdp: int
    effort: float
    result: Figures | TooLarge

    @property
    def clips(self) -> int:
        """Clips per chip and step."""
        return self.config.batch // self.topology.chips

    @property
    def steps(self) -> int:
        return build.count_steps(self.config, self.config.epochs, self.videos)

    @property
    def roofline_bounds(self) -> RooflineBounds:
        """Roofline bounds of the compiled program; the step must fit."""
        assert isinstance(self.result, Figures)
        return accelerators.roofline_bounds(self.result.counts, self.topology.chip)

    @property
    def bounds(self) -> RooflineBounds:
        """Roofline bounds that hold for training's program too.

        With a negative effort, the compiler prefetches nothing into on-chip memory. HBM traffic is
        then overstated, so the memory bound is 0.
        """
        bounds = self.roofline_bounds
        return bounds if self.effort >= 0 else dataclasses.replace(bounds, memory=0.0)

    @property
    def hours(self) -> float:
        """Lower bound of the time of all steps, in hours."""
        return self.steps * self.bounds.longest / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.topology.chips


@dataclass(frozen=True)
class InputRate:
    """Upper bound of the input throughput that a host needs, with chips at their peak rates.

    Attributes:
      clips, videos: per second.
      cores: CPU cores for this throughput, by storage format.
    """

    clips: float
    videos: float
    cores: dict[str, float]


def input_rate(config: Config, model: MViTConfig, hosts: int, seconds: float) -> InputRate:
    """Returns the input throughput that each of `hosts` hosts needs for steps of `seconds`.

    The number of cores is scaled by pixels from measurements with two clips per decoded video. With
    one clip per decoding, the cost per clip is doubled, as if decoding were all of the work.
    """
    clips = config.batch / seconds / hosts
    pixels = model.frames * model.size**2
    if model.frames == 1:
        rates, measured = {"JPEGs": IMAGES_OF_A_CORE}, 224**2
    else:
        rates, measured = CLIPS_OF_A_CORE, 16 * 224**2
    decodings = max(1.0, MEASURED_REPEATS / config.data.repeats) if model.frames > 1 else 1.0
    work = pixels / measured * decodings
    return InputRate(
        clips=clips,
        videos=clips / config.data.repeats,
        cores={name: clips * work / rate for name, rate in rates.items()},
    )


def item_name(config: Config) -> str:
    """Returns the name of a batch's items: "clip" or "image"."""
    return "clip" if build.model_config(config, 2).frames > 1 else "image"


def clip_multiple(config: Config) -> int:
    """Returns the number that must divide the clips per chip."""
    return math.lcm(config.data.repeats, config.accumulate)


def group_size(config: Config, clips: int) -> int:
    """Returns the mixup group size for `clips` per chip: the gcd of clips and the config's size.

    Without mixup and cutmix, the config's size is returned unchanged.
    """
    if config.augment.mixup <= 0 and config.augment.cutmix <= 0:
        return config.augment.mixup_group_size
    return math.gcd(config.augment.mixup_group_size, clips)


def fit_config(config: Config, chips: int) -> tuple[Config, str]:
    """Adapts a config to a number of chips: the clips of a mixup group must be on one chip.

    Returns:
      The config, and a sentence on the change (empty without one).

    Raises:
      UserError: the batch is not divisible over the chips; the message proposes a batch and its
        learning rate.
    """
    share, what = chips * clip_multiple(config), item_name(config)
    if config.batch % share:
        batch = math.ceil(config.batch / share) * share
        raise UserError(
            f"batch={config.batch} cannot be divided over {plural(chips, 'chip')} (the {what}s per "
            f"chip must be a multiple of data.repeats={config.data.repeats} and accumulate="
            f"{config.accumulate}): use fewer chips, or {batch_flags(config, batch, chips)}"
        )
    clips, group = config.batch // chips, config.augment.mixup_group_size
    divisor = group_size(config, clips)
    if divisor == group:
        return config, ""
    changed = copy.deepcopy(config)
    changed.augment.mixup_group_size = divisor
    build.check_batch(changed, chips)
    warning = ""
    if divisor == 1:
        warning = (
            f"; a group of one mixes each {what} with itself, so mixup and cutmix DO NOTHING: "
            "use fewer chips or a larger batch"
        )
    return changed, (
        f"augment.mixup_group_size={group} does not divide {plural(clips, what)} per chip, so "
        "training would fail: this plan uses, and training needs, "
        f"--config.augment.mixup_group_size={divisor}{warning}"
    )


def batch_flags(config: Config, batch: int, chips: int) -> str:
    """Returns flags for another batch, with learning rates in proportion to it.

    If the config scales its learning rate (`optim.lr_batch`), a note with the resulting rate
    follows the flags.
    """
    c, group = config.optim, group_size(config, batch // chips)
    flags, note = [f"--config.batch={batch}"], ""
    if c.lr_batch is not None:
        note = f" (optim.lr_batch makes the peak learning rate {c.lr * batch / c.lr_batch:.4g})"
    else:
        rates = {name: c[name] * batch / config.batch for name in ("lr", "start_lr", "end_lr")}
        flags += [f"--config.optim.{name}={rate:.4g}" for name, rate in rates.items()]
    if group != config.augment.mixup_group_size:
        flags.append(f"--config.augment.mixup_group_size={group}")
    return " ".join(flags) + note


def state_bytes(result: Figures | TooLarge) -> int:
    """Returns bytes per chip of parameters, optimiser state and averaged parameters."""
    return sum(result.kinds[kind] for kind in STATE)


def free_bytes(plan: Plan) -> float:
    """Returns bytes per chip left for batch and activations, up to `FULL` of the memory."""
    fixed = state_bytes(plan.result) + plan.result.kinds.get("program", 0)
    return FULL * plan.topology.chip.memory - fixed


def bytes_per_clip(plan: Plan) -> float:
    """Returns the mean bytes of activations and batch per clip, an estimate for each more clip."""
    return (plan.result.kinds["activations"] + plan.result.kinds["batch"]) / plan.clips


def largest_batch(plan: Plan, max_clips: int | None = None) -> int:
    """Returns the largest multiple of `clip_multiple` clips per chip that fits, or 0.

    With mixup or cutmix, it is also a multiple of the mixup group size if that many clips fit.

    Args:
      plan: the compiled plan.
      max_clips: result of a search for the most clips that fit; by default an estimate.
    """
    if max_clips is None:
        max_clips = max(0, int(free_bytes(plan) / bytes_per_clip(plan)))
        if (
            isinstance(plan.result, TooLarge) and max_clips >= plan.clips
        ):  # the estimate is too high
            max_clips = plan.clips // 2
    step, config = clip_multiple(plan.config), plan.config
    mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    whole = math.lcm(step, config.augment.mixup_group_size) if mixed else step
    return max_clips - max_clips % (whole if max_clips >= whole else step)


def advice(plan: Plan, max_clips: int | None = None) -> list[str]:
    """Returns lines on the largest batch and, if the step does not fit, on flags that save memory.

    Args:
      plan: the compiled plan.
      max_clips: result of a search for the most clips per chip; by default an estimate.
    """
    config, chips, what = plan.config, plan.topology.chips, item_name(plan.config)
    best, lines = largest_batch(plan, max_clips), []
    fits = isinstance(plan.result, Figures)
    if fits:
        lines.append(
            f"{plural(config.batch, what)} on {plural(chips, 'chip')} are {plan.clips} per chip "
            f"and take {plan.result.used / plan.topology.chip.memory:.0%} of its memory"
        )
    if fits and best <= plan.clips:
        lines.append("about the largest number that fits")
    elif best:
        how = "fit" if max_clips is not None else "should fit, estimated from this step's memory"
        lines.append(f"{best} per chip {how}: {batch_flags(config, best * chips, chips)}")
    return lines if fits else [*lines, *_savings(plan)]


def _savings(plan: Plan) -> list[str]:
    """Returns lines on flags that reduce the memory of the same batch."""
    config, kinds, lines = plan.config, plan.result.kinds, []
    if config.remat != "blocks":
        lines.append("--config.remat=blocks rematerialises blocks in the backward pass")
    room, work = free_bytes(plan) - kinds["batch"], kinds["activations"] * config.accumulate
    for parts in range(config.accumulate + 1, plan.clips + 1):
        if plan.clips % math.lcm(parts, config.data.repeats) == 0 and work / parts <= room:
            lines.append(f"--config.accumulate={parts} accumulates gradients over micro-batches")
            break
    if plan.fsdp < plan.topology.chips_per_slice:
        size = (
            f"{state_bytes(plan.result) / GIB:.2f} GiB of parameters, optimiser state and average"
        )
        lines.append(f"--config.mesh.fsdp={plan.topology.chips_per_slice} shards {size}")
    if config.dtype == "float32":
        lines.append("--config.dtype=bfloat16 halves activations")
    return lines
