"""Builds model, data, optimiser and the jitted step from a config.

The modules `loop`, `step` and `evaluation` use the returned objects and do not read the config.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int32

from mvit_jax.common.errors import UserError
from mvit_jax.config import Config, check
from mvit_jax.data import pipeline, randaugment
from mvit_jax.data.augmentation import Augmentation
from mvit_jax.data.loader import Batch, LoaderOptions
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.source import Source, all_labels, check_multi_label, open_source
from mvit_jax.models.functional import Functional, functional
from mvit_jax.models.plan import MViTConfig, plan
from mvit_jax.models.variants import variant
from mvit_jax.training import custom, optimizer
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import testing
from mvit_jax.training.evaluation.protocol import Protocol
from mvit_jax.training.state import State, init_state
from mvit_jax.training.step import StepConfig, train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of an experiment, one object per component.

    Attributes:
      model: architecture, custom modules, dtype and implementation of the operations.
      clips: frames, size and augmentation of a clip.
      step: augmentation on the device, loss, and dtype of the computation.
      loader: decoding threads and processes.
      test: the test protocol.
      validation: the validation protocol, one centre clip of every video.
    """

    model: Functional
    clips: ClipSettings
    step: StepConfig
    loader: LoaderOptions
    test: Protocol
    validation: Protocol


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted functions of an experiment and its abstract state.

    The functions can be lowered and compiled for devices that are not attached.

    Attributes:
      step: `(state, batch, learning_rate) -> (state, metrics)`; the state is donated.
      predict: `(params, clips [batch, views, T, H, W, 3]) -> probabilities`.
      initial_state: returns the newly initialised state. Each device creates only its shard, so a
        sharded state is never whole on one device.
      state: shapes, dtypes and shardings of the state.
    """

    step: Any  # the type of jitted functions is private
    predict: Any
    initial_state: Callable[[], State]
    state: State


@dataclasses.dataclass(frozen=True)
class Training:
    """The inputs of a training loop, for an experiment and its training list.

    Attributes:
      settings: the settings of all components.
      mesh: the device mesh.
      program: the jitted functions.
      steps: total number of steps of the run.
      validation_steps: steps between validations; 0 for no validation.
      learning_rate: function from the number of finished steps to the learning rate.
      batches: function of `start` (default 0) that yields this process's rows of the batches from
        step `start` on.
    """

    settings: Settings
    mesh: Mesh
    program: Program
    steps: int
    validation_steps: int
    learning_rate: Callable[[int], float]
    batches: Callable[..., Generator[Batch, None, None]]


def training(config: Config, videos: Source, **modules: Any) -> Training:
    """Builds the inputs of the training loop; `modules` are as in `settings`.

    Raises:
      UserError: a value of the config is invalid, values contradict each other, or a custom module
        fails.
    """
    check(config)
    built = settings(config, len(videos.class_names), **modules)
    custom.check(built.model)
    if config.optim.class_weights == "balanced":
        weights = class_weights(all_labels(videos), len(videos.class_names))
        step = dataclasses.replace(built.step, class_weights=weights)
        built = dataclasses.replace(built, step=step)
    mesh = device_mesh(config)
    built = with_loss_reduction(config, built, mesh)
    steps = count_steps(config, config.epochs, len(videos))
    validates = config.data.val_list and config.eval.every_epochs > 0
    between = count_steps(config, config.eval.every_epochs, len(videos))
    return Training(
        settings=built,
        mesh=mesh,
        program=program(config, built, mesh),
        steps=steps,
        validation_steps=between if validates else 0,
        learning_rate=schedule(config, len(videos)),
        batches=functools.partial(batches, config, built, videos, mesh, steps),
    )


def settings(config: Config, num_classes: int, **modules: Any) -> Settings:
    """Returns the settings of all components.

    Args:
      config: the experiment.
      num_classes: number of classes of the data or of the checkpoint.
      modules: custom modules `block`, `attention` and `pooling`, which override the config's.

    Raises:
      UserError: values of the config contradict each other, or a custom module is missing.
    """
    architecture = model_config(config, num_classes)
    _frozen_blocks(config, architecture)  # checks their number
    views = {"batch": config.eval.batch, "max_broken": config.data.max_broken}
    return Settings(
        model=functional(
            architecture,
            dtype=DTYPES[config.dtype],
            ops=config.ops,
            **(custom.load(config) | modules),
        ),
        clips=_clip_settings(config, architecture),
        step=_step_config(config, num_classes),
        loader=LoaderOptions(config.data.threads, config.data.processes, config.data.timeout),
        test=Protocol(
            (config.eval.clips,), config.eval.crops, ensemble=config.eval.ensemble, **views
        ),
        validation=Protocol(**views),
    )


def with_loss_reduction(config: Config, settings: Settings, mesh: Mesh) -> Settings:
    """Returns the settings for the mean over boxes of `optim.loss_reduction` on `mesh`."""
    if config.optim.loss_reduction == "global":
        return settings
    return dataclasses.replace(
        settings, step=dataclasses.replace(settings.step, box_groups=mesh.size)
    )


def class_weights(labels: Int32[np.ndarray, " videos"], classes: int) -> tuple[float, ...]:
    """Returns the weights of `optim.class_weights=balanced`.

    They are inverse to the number of videos, with mean 1 over the classes that have videos. A class
    without videos has the weight 0, and negative labels do not count.
    """
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    inverse = np.divide(1, counts, where=counts > 0, out=np.zeros(classes))
    return tuple((inverse / inverse[counts > 0].mean()).tolist())


def model_config(config: Config, num_classes: int) -> MViTConfig:
    """Returns the architecture of `config.model`: the variant with the changes in that section."""
    fields = {field.name for field in dataclasses.fields(MViTConfig)}
    values = {k: _as_tuple(v) for k, v in config.model.items() if k in fields and v is not None}
    values["task"] = "detection" if config.data.source == "ava" else "classification"
    return variant(config.model.variant, num_classes=num_classes, **values)


def model_fields(name: str, model: MViTConfig) -> dict[str, Any]:
    """Returns the config section `model` of an architecture: the inverse of `model_config`.

    The section has the variant's name and the fields that differ from the variant. The number of
    classes and the task are left out, as they follow from the data.
    """
    base = variant(name)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(MViTConfig)}
    del fields["num_classes"], fields["task"]
    return {"variant": name} | {k: v for k, v in fields.items() if v != getattr(base, k)}


def videos(config: Config, which: str) -> Source:
    """Opens the "train", "val" or "test" list.

    Raises:
      UserError: the config names no such list, or the list cannot be read.
    """
    c = config.data
    name = c[f"{which}_list"]
    if not name:
        raise UserError(f"data.{which}_list is empty: set it to a list of videos, like {which}.csv")
    # `folder` is no required_placeholder, because ml_collections 1.1 cannot lock a config with one.
    return open_source(
        c.folder or None,
        name,
        source=c.source,
        tfds=c.tfds or None,
        train_list=c.train_list,
        prefix=c.prefix,
        separator=c.separator or None,
        multi_label=c.multi_label,
        max_missing=c.max_broken,
        labelled=which == "train",
        boxes=c[f"{which}_boxes"],
        class_list=c.class_list,
        min_score=c.min_score,
        excluded=c.excluded if which != "train" else None,
        first_second=c.first_second,
    )


def check_source(config: Config) -> None:
    """Raises `UserError` if `data.multi_label` does not match the format of the data."""
    c = config.data
    check_multi_label(c.source, c.tfds or None, c.multi_label)


def device_mesh(config: Config) -> Mesh:
    """Returns the mesh of all devices.

    Raises:
      UserError: the devices cannot form the mesh, or cannot share the batch.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check_devices(config, mesh.size)
    return mesh


def check_devices(config: Config, devices: int) -> None:
    """Raises `UserError` if `devices` cannot form the mesh, or cannot share the batch."""
    sharding.mesh_shape(config.mesh.data, config.mesh.fsdp, devices)
    check_batch(config, devices)


def check_batch(config: Config, devices: int) -> None:
    """Checks that the batch is divisible by devices, repeats, micro-batches and mixup groups.

    Raises:
      UserError: the batch is not divisible; the message names a valid multiple or divisor.
    """
    share = devices * config.accumulate
    if config.batch % (devices * config.data.repeats):
        raise UserError(
            f"batch={config.batch} is not divisible by {devices} devices x "
            f"data.repeats={config.data.repeats}; set a multiple of {devices * config.data.repeats}"
        )
    if config.batch % share:
        raise UserError(
            f"batch={config.batch} is not divisible by {devices} devices x "
            f"accumulate={config.accumulate}; set a multiple of {share}"
        )
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    clips, group = config.batch // devices, config.augment.mixup_group_size
    if mixes and clips % group:
        raise UserError(
            f"augment.mixup_group_size={group} does not divide the {clips} clips per device; set "
            f"a divisor of {clips}"
        )


def batches(
    config: Config, settings: Settings, videos: Source, mesh: Mesh, steps: int, start: int = 0
) -> Generator[Batch, None, None]:
    """Yields this process's rows of the training batches of steps `start` to `steps - 1`."""
    return pipeline.train_batches(
        videos,
        settings.clips,
        seed=config.seed,
        batch=config.batch,
        steps=steps,
        start=start,
        rows=sharding.local_rows(config.batch, mesh),
        repeats=config.data.repeats,
        balanced=config.data.balanced,
        loader=settings.loader,
    )


def count_steps(config: Config, epochs: float, videos: int) -> int:
    """Returns the steps of `epochs` passes over `videos` videos, rounded down, at least 1.

    A batch may span two epochs here. The reference code drops the incomplete batch of each epoch.

    Raises:
      UserError: the steps cannot be counted in 32 bits.
    """
    steps = epochs * videos * config.data.repeats / config.batch
    if steps >= 2**31:
        raise UserError(
            f"{epochs:g} epochs are {steps:.1e} steps, too many to count: lower epochs, or "
            "eval.every_epochs"
        )
    return max(int(steps), 1)


def warnings(config: Config, videos: int) -> list[str]:
    """Returns a sentence for each value that does not fit the length of the run.

    Such a run is possible, and short trials of a recipe are useful, so it is no error.
    """
    c, sentences = config.optim, []
    steps = count_steps(config, config.epochs, videos)
    if c.warmup_epochs >= config.epochs:
        rate = schedule(config, videos)
        highest = max(rate(0), rate(steps - 1))
        sentences.append(
            f"the warm-up lasts the whole run (optim.warmup_epochs={c.warmup_epochs:g}, "
            f"epochs={config.epochs:g}): the learning rate only rises, to {highest:.3g} of "
            f"{c.lr * rate_factor(config):g}; for a shorter warm-up set "
            f"--config.optim.warmup_epochs={config.epochs / 10:g}"
        )
    if note := _ema_note(config, steps):
        sentences.append(note)
    return sentences


def schedule(config: Config, videos: int) -> Callable[[int], float]:
    """Returns the learning rate as a function of the step, for `videos` training videos."""
    c, factor = config.optim, rate_factor(config)
    return optimizer.learning_rate(
        lr=c.lr * factor,
        start_lr=c.start_lr * factor,
        end_lr=c.end_lr * factor,
        warmup_epochs=c.warmup_epochs,
        epochs=config.epochs,
        steps_per_epoch=videos * config.data.repeats / config.batch,
    )


def rate_factor(config: Config) -> float:
    """Returns the factor of all learning rates: batch / `optim.lr_batch`, or 1."""
    return config.batch / config.optim.lr_batch if config.optim.lr_batch else 1.0


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    c = config.optim
    common = {
        "weight_decay": c.weight_decay,
        "layer_decay": c.layer_decay,
        "clip_norm": c.clip_norm,
    }
    if c.name == "sgd":
        transform = optimizer.sgd(momentum=c.momentum, **common)
    else:
        transform = optimizer.adamw(b1=c.b1, b2=c.b2, **common)
    return optimizer.of_trained(transform, c.trained_blocks)


def _ema_note(config: Config, steps: int) -> str | None:
    """Returns a sentence if averages of a run of `steps` steps hold too much of their start."""
    c = config.optim
    share = optimizer.ema_initial_share(steps, c.ema, c.ema_warmup) if c.ema > 0 else 0.0
    if share <= 0.01:
        return None
    return (
        f"after {steps:,} steps, {100 * share:.3g} % of the averaged weights are still the initial "
        f"ones, as optim.ema={c.ema:g}: set optim.ema_warmup=True, or lower optim.ema"
    )


def model_apply(config: Config, model: Functional, mesh: Mesh) -> Callable[..., Any]:
    """Returns `model.apply` with the config's rematerialisation, and a scan except on CPUs.

    The scan over identical blocks halves the compile time, but its backward pass is slow on CPUs.
    """
    scan = mesh.devices.flat[0].platform != "cpu"
    return functools.partial(model.apply, remat=config.remat, scan=scan)


def program(config: Config, settings: Settings, mesh: Mesh) -> Program:
    """Returns the jitted functions of an experiment on `mesh`."""
    optimizer, seed, ema = make_optimizer(config), config.seed, config.optim.ema
    task = settings.model.config.task
    apply = model_apply(config, settings.model, mesh)

    def initial_state() -> State:
        params = settings.model.init(jax.random.key(seed))
        return init_state(params, optimizer, ema)

    shapes = jax.eval_shape(initial_state)
    shardings = sharding.state_shardings(mesh, shapes)
    rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    step = jax.jit(
        functools.partial(
            train_step,
            # Loops end at the last frozen block, whose weights have no gradients.
            apply=functools.partial(
                apply, frozen_blocks=_frozen_blocks(config, settings.model.config)
            ),
            optimizer=optimizer,
            recipe=settings.step,
        ),
        in_shardings=(shardings, rows, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    return Program(
        step=step,
        predict=testing.predictor(apply, settings.step, shapes.params, mesh, task),
        initial_state=jax.jit(initial_state, out_shardings=shardings),
        state=sharding.with_shardings(shapes, shardings),
    )


ASSUMED_BOXES = 32
"""Boxes of a clip in plans, where the lists are not read."""


def batch_shapes(config: Config, model: MViTConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns the abstract batch of `train_step` (shapes, dtypes, shardings), for compilation."""
    clip = (config.batch, model.frames, model.size, model.size, 3)
    classes = (model.num_classes,) if config.data.multi_label else ()
    extra = {}
    if model.task == "detection":
        boxes = (config.batch, ASSUMED_BOXES)
        extra["boxes"] = jax.ShapeDtypeStruct((*boxes, 4), jnp.float32)
        extra["box_mask"] = jax.ShapeDtypeStruct(boxes, jnp.bool_)
        classes = (ASSUMED_BOXES, *classes)
    batch = extra | {
        "clip": jax.ShapeDtypeStruct(clip, np.uint8),
        "label": jax.ShapeDtypeStruct(
            (config.batch, *classes), jnp.uint8 if classes else jnp.int32
        ),
        "broken": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
    }
    return sharding.with_shardings(
        batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)
    )


def _frozen_blocks(config: Config, model: MViTConfig) -> int:
    """Returns the number of frozen first blocks.

    Raises:
      UserError: `optim.trained_blocks` exceeds the model's number of blocks.
    """
    depth, trained = len(plan(model)), config.optim.trained_blocks
    if trained is None:
        return 0
    if trained > depth:
        raise UserError(
            f"optim.trained_blocks={trained} exceeds the model's {depth} blocks: set at most "
            f"{depth}, or None to train everything"
        )
    return depth - trained


def _step_config(config: Config, num_classes: int) -> StepConfig:
    values = {**config, **config.data, **config.augment, **config.optim}
    values |= {"num_classes": num_classes, "dtype": DTYPES[config.dtype]}
    values["class_weights"] = None  # those of a training list are set in `training`
    values["box_groups"] = 1  # `training` sets that of `optim.loss_reduction=per_device`
    names = [field.name for field in dataclasses.fields(StepConfig)]
    return StepConfig(**{name: _as_tuple(values[name]) for name in names})


def _clip_settings(config: Config, model: MViTConfig) -> ClipSettings:
    c = config.augment
    policy = randaugment.parse(c.randaugment) if c.randaugment else None
    return ClipSettings(
        frames=model.frames,
        size=model.size,
        stride=config.data.stride,
        short_side=config.data.short_side,
        sampling=config.data.sampling,
        interpolation=config.data.interpolation,
        whole=config.eval.whole_image,
        full_frame=config.eval.full_frame,
        augmentation=Augmentation(
            crop_area=_as_tuple(c.crop_area) or None,  # () is None
            jitter=_as_tuple(c.jitter) or None,
            short_side=c.short_side,
            randaugment=policy,
            fill=_fill_colour(config, model),
            interpolation=config.data.interpolation,
        ),
    )


def _fill_colour(config: Config, model: MViTConfig) -> tuple[int, int, int]:
    """Returns RandAugment's fill colour: grey for videos; for images the mean, as in timm."""
    if model.frames > 1:
        return (128, 128, 128)
    red, green, blue = (min(255, round(255 * mean)) for mean in config.data.mean)
    return red, green, blue


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
