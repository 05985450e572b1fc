"""From a config to the things that it describes. Besides the programs, only this reads configs."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import AnyPath, to_path
from mvit_jax.data import randaugment
from mvit_jax.data.augmentation import Augmentation, Interpolation
from mvit_jax.data.formats.video_list import read_class_names
from mvit_jax.data.pipeline import ClipSettings
from mvit_jax.data.sampling import Sampling
from mvit_jax.data.source import SOURCES, Source, open_source
from mvit_jax.models import mvit, trees
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.run_blocks import REMAT
from mvit_jax.models.variants import variant
from mvit_jax.training import evaluation, optimizer
from mvit_jax.training.distributed import sharding
from mvit_jax.training.evaluation import Ensemble
from mvit_jax.training.run import nan_policy, workdir
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.step import Recipe
from mvit_jax.weights import adapt

Config = Any  # an ml_collections ConfigDict: no type checker knows its keys

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PRECISIONS = ("default", "high", "highest")
CHOICES = {
    "dtype": tuple(DTYPES),
    "precision": PRECISIONS,
    "remat": REMAT,
    "on_nan": nan_policy.POLICIES,
    "data.interpolation": get_args(Interpolation),
    "data.source": SOURCES,
    "data.sampling": get_args(Sampling),
    "augment.erase_mode": ("pixel", "const"),
    "eval.ensemble": get_args(Ensemble),
    "eval.crops": (1, 3),
    "init.inflate": (None, *adapt.INFLATIONS),
    "optim.name": ("adamw", "sgd"),
}
INF = float("inf")
RANGES = {  # smallest and largest value
    "seed": (0, 2**31 - 1),
    "batch": (1, INF),
    "accumulate": (1, INF),
    "log_every": (1, INF),
    "data.stride": (1, INF),
    "data.short_side": (1, INF),
    "data.threads": (0, INF),
    "data.processes": (0, INF),
    "data.timeout": (0, 1e6),  # of seconds; the operating system takes few more
    "data.repeats": (1, INF),
    "data.max_broken": (0, 1),
    "augment.erase": (0, 1),
    "augment.flip": (0, 1),
    "augment.mixup": (0, INF),
    "augment.cutmix": (0, INF),
    "augment.switch": (0, 1),
    "augment.group": (1, INF),
    "augment.label_smoothing": (0, 1),
    "augment.short_side": (1, INF),
    "eval.every_epochs": (0, INF),
    "optim.lr": (0, INF),
    "optim.start_lr": (0, INF),
    "optim.end_lr": (0, INF),
    "optim.warmup_epochs": (0, INF),
    "optim.weight_decay": (0, INF),
    "optim.lr_batch": (1, INF),
    "optim.layer_decay": (0, 1),
    "optim.momentum": (0, 1),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.clip_norm": (0, INF),
    "optim.ema": (0, 1),
    "checkpoint.every": (1, INF),
    "checkpoint.keep": (1, INF),
    "eval.batch": (1, INF),
    "eval.clips": (1, INF),
}


def check(config: Config) -> None:
    """One sentence for each value that no part of the program could work with."""
    for key, allowed in CHOICES.items():
        if _value(config, key) not in allowed:
            known = ", ".join(str(value) for value in allowed if value is not None)
            raise UserError(f"{key} must be one of {known}, not {_value(config, key)!r}")
    for key, (low, high) in RANGES.items():
        value = _value(config, key)
        if value is not None and not low <= value <= high:  # None: a key without a default
            limits = f"at least {low}" if high == INF else f"from {low} to {high}"
            raise UserError(f"{key} must be {limits}, not {value}")
    if config.epochs <= 0:
        raise UserError(f"epochs must be above 0, not {config.epochs}")
    _check_augmentation(config)
    if config.eval.whole_image and config.eval.crops != 1:
        raise UserError("eval.whole_image leaves nothing to crop: set eval.crops=1")
    if config.data.sampling == "segments" and config.eval.clips != 1:
        raise UserError("segments make one clip of the whole video: set eval.clips=1")
    if config.data.multi_label and config.augment.mixup + config.augment.cutmix > 0:
        raise UserError("sets of classes (data.multi_label) are not mixed: set mixup and cutmix 0")


def _check_augmentation(config: Config) -> None:
    area, jitter = config.augment.crop_area, config.augment.jitter
    if area is not None and not (len(area) == 2 and 0 < area[0] <= area[1] <= 1):
        raise UserError(f"augment.crop_area must be two shares, 0 < low <= high <= 1, not {area}")
    if jitter is not None and not (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]):
        raise UserError(f"augment.jitter must be two sides, 0 < low <= high pixels, not {jitter}")
    if area is not None and jitter is not None:
        raise UserError(
            "augment.crop_area and augment.jitter are two ways to crop: set one of them to None"
        )
    if config.augment.randaugment:
        randaugment.parse(config.augment.randaugment)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


def check_start(config: Config) -> None:
    """A recipe that starts from weights must be given some."""
    if missing_weights(config):
        raise UserError(
            f"this experiment starts from {config.init.needed}: give them with "
            "--config.init.checkpoint=DIR, a run's folder or one that mvit_jax.convert made "
            "(or start without them, by --config.init.needed=)"
        )


def missing_weights(config: Config) -> bool:
    given = config.init.checkpoint is not None or config.resume is not None
    return bool(config.init.needed) and not given


def check_batch(config: Config, devices: int) -> None:
    """The batch must cut evenly into devices, accumulated parts, and groups that mix."""
    share = devices * config.accumulate
    if config.batch % (devices * config.data.repeats):
        raise UserError(
            f"batch={config.batch} does not divide into {devices} devices x "
            f"data.repeats={config.data.repeats}; set a multiple of {devices * config.data.repeats}"
        )
    if config.batch % share:
        raise UserError(
            f"batch={config.batch} does not divide into {devices} devices x "
            f"accumulate={config.accumulate}; set a multiple of {share}"
        )
    mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
    if mixes and (config.batch // devices) % config.augment.group:
        raise UserError(
            f"augment.group={config.augment.group} does not divide the {config.batch // devices} "
            "clips of a device; set a divisor of it"
        )


def model_config(config: Config, num_classes: int) -> MViTConfig:
    values = {k: _plain(v) for k, v in config.model.items() if k != "variant" and v is not None}
    return variant(config.model.variant, num_classes=num_classes, **values)


def read_config(name: str, arg: str | None = None) -> Config:
    """The experiment `configs/NAME.py`, where the package stands beside that folder."""
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.parent.is_dir():
        raise UserError(
            f"{path.parent} is missing: install mvit_jax from a clone, `pip install -e .`"
        )
    if spec is None or spec.loader is None or not path.exists():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.py")))
        raise UserError(f"there is no config {name!r} in {path.parent}: it has {known}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if arg is None else module.get_config(arg)


def base() -> Config | None:
    """All keys with their defaults; None in an installation without configs/."""
    try:
        return read_config("base")
    except UserError:
        return None


def frozen(folder: str | AnyPath) -> Config:
    """The config that a run was started with; keys that are newer than it have their defaults."""
    return workdir.frozen(folder, base())


def model_fields(name: str, model: MViTConfig) -> dict[str, Any]:
    """The section `model` of a config that gives this architecture: the variant's name, and the
    fields in which it differs. The number of classes follows from the data."""
    plain = variant(name)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(MViTConfig)}
    return {"variant": name} | {
        k: v for k, v in fields.items() if v != getattr(plain, k) and k != "num_classes"
    }


def read_params(folder: AnyPath, which: str = "last") -> tuple[Any, MViTConfig]:
    """Parameters of a run (the averaged ones, where it has them) or of a converted folder, as NumPy
    arrays, and their architecture."""
    if folder.is_file():
        raise UserError(
            f"{folder} is a file: make a folder of it first, "
            f"python -m mvit_jax.convert {folder} --variant=NAME --out=DIR"
        )
    config = frozen(folder)
    with closing(Checkpoints(folder)) as checkpoints:
        params = checkpoints.read_params(which, "ema" if config.optim.ema > 0 else "params")
    classes = params["head"]["classifier"]["kernel"].shape[-1]
    return params, model_config(config, classes)


def initial_params(config: Config, model: MViTConfig) -> tuple[Any, str]:
    """The weights that `config.init` names, made to fit `model`, and what was done in a few words.

    Positions are resized, and what the model does not share with them, like a classifier of another
    number of classes, is new.
    """
    folder, inflate = config.init.checkpoint, config.init.inflate
    params, was = read_params(to_path(folder))
    params, report = adapt.carry_over(params, was, model, inflate)
    new = [line.path for line in report.lines if line.done.startswith("new")]
    what = "; ".join(f"{count} {done}" for done, count in report.counts.items())
    return params, f"weights from {folder}: {what}" + (f"; new: {', '.join(new)}" if new else "")


def check_resume(config: Config, model: MViTConfig) -> None:
    """Whether `config.resume` is a run's folder with a state of this model."""
    folder = to_path(config.resume)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"resume={folder} holds no checkpoint: check the folder")
    with closing(Checkpoints(folder)) as checkpoints:
        shapes, whole = checkpoints.shapes(), checkpoints.has_training()
    if not whole:
        raise UserError(
            f"resume={folder} holds weights alone, no state of training: start from them with "
            f"--config.init.checkpoint={folder}"
        )
    expected = jax.eval_shape(partial(mvit.init, model), jax.random.key(0))
    difference = trees.first_difference(expected, shapes)
    if difference:
        raise UserError(f"resume={folder} is of another architecture: {difference}")


def check_classes(folder: AnyPath, which: str, videos: Source) -> None:
    """Whether a model's classes are those of the data, as far as the two lists of names tell."""
    count = num_classes(folder, which)
    if count != len(videos.class_names):
        raise UserError(
            f"the data's labels.txt names {len(videos.class_names)} classes, and the model has "
            f"{count}: use the list that it was trained with"
        )
    own = folder / "labels.txt"
    if own.exists():
        names = read_class_names(own)
        if names != videos.class_names and sorted(names) == sorted(videos.class_names):
            raise UserError(
                f"the data's labels.txt has the classes of {own} in another order: labels would "
                "mean other classes; bring them into the same order"
            )


def model_apply(config: Config, model: MViTConfig, mesh: Mesh) -> Callable[..., Any]:
    """The model as the devices of `mesh` run it. Loops over equal blocks compile in half the time,
    but on CPUs run slowly backwards."""
    loops = mesh.devices.flat[0].platform != "cpu"
    return partial(mvit.apply, config=model, remat=config.remat, scan=loops)


def num_classes(folder: AnyPath, which: str = "last") -> int:
    """Of the classifier in a run's "last" or "best" checkpoint."""
    with closing(Checkpoints(folder)) as checkpoints:
        return checkpoints.shapes(which)["head"]["classifier"]["bias"].shape[0]


def load_params(
    config: Config, model: MViTConfig, folder: AnyPath, which: str, mesh: Mesh
) -> tuple[Any, int]:
    """Parameters of a run's "last" or "best" checkpoint (the averaged ones, where it has them) in
    float32 on `mesh`, which need not be the run's own; and the step of that checkpoint."""
    shapes = jax.eval_shape(partial(mvit.init, model), jax.random.key(0))
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )
    item = "ema" if config.optim.ema > 0 else "params"
    with closing(Checkpoints(folder)) as checkpoints:
        params = checkpoints.restore_params(like, which, item)
        step = checkpoints.step(which)
    assert step is not None
    return params, step


def score(
    config: Config,
    folder: AnyPath,
    videos: Source,
    *,
    which: str,
    shuffle: bool = False,
    clips: Sequence[int] | None = None,
) -> tuple[list[evaluation.Scores], int]:
    """Scores of a run's "last" or "best" checkpoint on a list of videos by the test protocol, for
    each number of `clips` (by default one, the config's), and the step of that checkpoint."""
    check_classes(folder, which, videos)
    model = model_config(config, len(videos.class_names))
    shown = jax.process_index() == 0 and sys.stderr.isatty()
    mesh = sharding.make_mesh()  # the run's own mesh may need more devices than are here
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision(config.precision),
        tqdm(total=len(videos), unit="video", disable=not shown) as bar,
    ):
        params, step = load_params(config, model, folder, which, mesh)
        scores = evaluation.evaluate(
            evaluation.predictor(
                model_apply(config, model, mesh), recipe(config, model.num_classes), params, mesh
            ),
            params,
            videos,
            clip_settings(config, model),
            clips=clips or (config.eval.clips,),
            crops=config.eval.crops,
            batch=config.eval.batch,
            mesh=mesh,
            ensemble=config.eval.ensemble,
            max_broken=config.data.max_broken,
            threads=config.data.threads,
            processes=config.data.processes,
            timeout=config.data.timeout,
            shuffle_seed=config.seed if shuffle else None,
            progress=lambda done: bar.update(done - bar.n),
        )
    return scores, step


def recipe(config: Config, num_classes: int) -> Recipe:
    known = {**config, **config.data, **config.augment, "ema": config.optim.ema}
    known |= {"num_classes": num_classes, "dtype": DTYPES[config.dtype]}
    names = [field.name for field in dataclasses.fields(Recipe)]
    return Recipe(**{name: _plain(known[name]) for name in names})


def clip_settings(config: Config, model: MViTConfig) -> ClipSettings:
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
        augmentation=Augmentation(
            crop_area=None if c.crop_area is None else _plain(c.crop_area),
            jitter=None if c.jitter is None else _plain(c.jitter),
            short_side=c.short_side,
            randaugment=policy,
            fill=_fill(config, model),
            interpolation=config.data.interpolation,
        ),
    )


def _fill(config: Config, model: MViTConfig) -> tuple[int, int, int]:
    """What RandAugment fills corners with: grey in the recipes of videos, the mean in timm's."""
    if model.frames > 1:
        return (128, 128, 128)
    red, green, blue = (min(255, round(255 * mean)) for mean in config.data.mean)
    return red, green, blue


def videos(config: Config, which: str) -> Source:
    """The list `which`: "train", "val" or "test"."""
    c = config.data
    name = c[f"{which}_list"]
    if not name:
        raise UserError(f"data.{which}_list is empty: name a list of videos, like {which}.csv")
    # Folder is not a required_placeholder: ml_collections 1.1 cannot lock a config that has one.
    return open_source(
        c.folder,
        name,
        source=c.source,
        tfds=c.tfds,
        train_list=c.train_list,
        prefix=c.prefix,
        separator=c.separator,
        multi_label=c.multi_label,
        max_missing=c.max_broken,
    )


def steps(config: Config, epochs: float, videos: Source) -> int:
    return count_steps(config, epochs, len(videos))


def count_steps(config: Config, epochs: float, videos: int) -> int:
    """Steps of so many passes over `videos`, rounded down. Batches run on from one epoch into the
    next, where the reference code drops what is left of each."""
    return max(int(epochs * videos * config.data.repeats / config.batch), 1)


def schedule(config: Config, videos: int) -> optax.Schedule:
    """The learning rate of each step, for a training list of `videos`."""
    c = config.optim
    factor = 1 if c.lr_batch is None else config.batch / c.lr_batch
    return optimizer.learning_rate(
        lr=c.lr * factor,
        start_lr=c.start_lr * factor,
        end_lr=c.end_lr * factor,
        warmup_epochs=c.warmup_epochs,
        epochs=config.epochs,
        steps_per_epoch=videos * config.data.repeats / config.batch,
    )


def make_optimizer(
    config: Config, videos: Source
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    c = config.optim
    rates = schedule(config, len(videos))
    common = {
        "weight_decay": c.weight_decay,
        "layer_decay": c.layer_decay,
        "clip_norm": c.clip_norm,
    }
    if c.name == "sgd":
        return optimizer.sgd(rates, momentum=c.momentum, **common), rates
    return optimizer.adamw(rates, b1=c.b1, b2=c.b2, **common), rates


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
