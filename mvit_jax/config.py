"""The keys of an experiment: default, type, unit, range or choices, and meaning of each.

    from mvit_jax import config

    c = config.base()  # all keys with their defaults
    c.optim.lr = 1e-3
    config.check(c)

An experiment is a file with a function `get_config()` that returns such a config. Setting a key
that is not in `KEYS` is an error. On the command line, keys are flags:
`--config=configs/moving_digits.py --config.optim.lr=1e-3`. The text `None` sets a key to None.

This module does not import JAX.
"""

import difflib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ml_collections import ConfigDict, config_dict

from mvit_jax.common.errors import UserError, renamed_keys
from mvit_jax.common.files import expanded
from mvit_jax.models.plan import MViTConfig, check_field

Config = Any  # a ConfigDict: no type checker knows its keys

_PACKAGE = Path(__file__).parent
# In a wheel, the folder configs/ is inside the package; in a clone, it is next to the package.
RECIPES = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The folder of the experiments that come with the package."""


@dataclass(frozen=True)
class Key:
    """A key of the config: its default and valid values.

    `low` and `high` are inclusive bounds, `above` and `below` are exclusive bounds. They bound each
    of the `length` numbers of a tuple, which have the type `item` (None: float). A key whose
    default is None, or that is `optional`, can be None. `kind` is the type of the values; it must
    be set if the default has another type, such as None. A `required` text is not empty.
    """

    default: Any
    meaning: str = ""  # empty for `model.*`, explained by comments in `MViTConfig`
    _: KW_ONLY
    unit: str = ""
    low: int | float | None = None
    high: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    length: int | None = None
    item: type | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    required: bool = False
    kind: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or type(self.default))

    @property
    def can_be_none(self) -> bool:
        return self.optional or self.default is None

    @property
    def limits(self) -> str:
        """Range or choices in words; empty if every value of the type is valid."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.low is not None and self.high is not None:
            return f"from {self.low} to {self.high}"
        words = {"above": self.above, "at least": self.low, "below": self.below,
                 "at most": self.high}  # fmt: skip
        return " and ".join(f"{word} {x}" for word, x in words.items() if x is not None)

    def problem(self, value: Any) -> str:
        """Returns what a value other than None must be, like "a number"; empty if it is valid."""
        kinds = {float: (int, float), tuple: (tuple, list)}.get(self.kind, self.kind)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind in (int, float)):
            return _WORDS[self.kind]
        if self.choices:
            return "" if value in self.choices else self.limits
        if self.length is not None and isinstance(value, tuple | list):
            if self.can_be_none and len(value) == 0:  # () is a way to write None
                return ""
            item = self.item or float
            number = Key(None, kind=item, low=self.low, high=self.high, above=self.above)
            if len(value) == self.length and not any(number.problem(x) for x in value):
                return ""
            return f"{self.length} {_WORDS[item].removeprefix('a ')}s, each {self.limits}"
        if self.kind in (int, float):
            if isinstance(value, float) and not math.isfinite(value):
                return "a finite number"
            if self.kind is int and abs(value) >= 2**31:  # JAX's integers have 32 bits
                return f"below {2**31} in size"
            return "" if self._in_range(value) else self.limits
        return "a text that is not empty" if self.required and not value else ""

    def _in_range(self, value: int | float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def _model_key(annotation: Any) -> Key:
    """Returns the key for a field of `MViTConfig`; the default None means the variant's value."""
    origin = get_origin(annotation)
    if origin is Literal:
        return Key(None, kind=str, choices=get_args(annotation))
    if origin is tuple:
        return Key(None, kind=tuple)
    return Key(None, kind=annotation if isinstance(annotation, type) else object)


# fmt: off
KEYS: dict[str, Key] = {
    "published": Key(None, "result that a paper reports for this experiment, with its table; "
                     "printed by --dry_run", kind=str),
    "seed": Key(0, "seed of initial weights, data order, augmentation and drop path", low=0,
                high=2**31 - 1),
    "epochs": Key(200.0, "passes over the training list; may be fractional", above=0),
    "batch": Key(512, "clips in a step, over all devices, repeats included", low=1),
    "accumulate": Key(1, "micro-batches per step (gradient accumulation), to save memory", low=1),
    "remat": Key("none", "activations that are rematerialised in the backward pass, to save "
                 "memory: none; cheap (norms, activation functions); first_stage (the blocks on "
                 "its grid, which hold the most); blocks (all)",
                 choices=("none", "cheap", "first_stage", "blocks")),
    "dtype": Key("float32", "dtype of the computation; parameters are float32",
                 choices=("float32", "bfloat16")),
    "precision": Key("default", 'precision of matrix products; "default" multiplies float32 in '
                     'bfloat16 on TPUs, in TF32 on GPUs', choices=("default", "high", "highest")),
    "ops": Key("auto", "implementation of the model's operations: auto, the fastest on the "
               "platform; reference, slow and simple, for debugging",
               choices=("auto", "reference")),
    "on_nan": Key("stop", "policy for a non-finite loss or gradient, whose update is always "
                  "skipped: stop ends the run; skip continues with the next batch; rollback also "
                  "restores the last checkpoint",
                  choices=("stop", "skip", "rollback")),
    "resume": Key(None, "folder of another run whose last checkpoint this run resumes from; a "
                  "workdir that has checkpoints resumes from its own", kind=str),
    "log_every": Key(20, "interval of log lines", unit="steps", low=1),

    "init.checkpoint": Key(None, "folder of a run, or of converted weights, to start from",
                           kind=str),
    "init.weights": Key(None, "weights of that run: plain, or ema for averaged ones; None takes "
                        "averaged ones if the run has any", kind=str, choices=("plain", "ema")),
    "init.inflate": Key(None, "inflation of an image model's patch kernel: centre fills only the "
                        "centre frame; repeat fills every frame; mean also divides by their number",
                        kind=str, choices=("centre", "mean", "repeat")),
    "init.needed": Key(None, "description of the weights that the recipe must start from",
                       kind=str),

    "model.variant": Key("mvit_b_16x4", "variant by name, see `python -m mvit_jax.describe --all`",
                         required=True),
    **{f"model.{field.name}": _model_key(field.type) for field in fields(MViTConfig)
       # The data determine num_classes, and the programs train classifiers.
       if field.name not in ("num_classes", "task")},
    "model.block": Key(None, "custom block, MODULE:CLASS (docs/variants.md)", kind=str),
    "model.attention": Key(None, "custom attention, MODULE:CLASS", kind=str),
    "model.pooling": Key(None, "custom pooling of Q, K and V, MODULE:CLASS", kind=str),

    "data.folder": Key(None, "required: folder with the lists and labels.txt; for `data.tfds` "
                       "its data_dir", kind=str),
    "data.source": Key("list", "format of the folder. list: video or image files, named in lists; "
                       "folders: CLASS/FILE in a folder for each list; shards: written by "
                       "`prepare videos`; ssv2, charades: frames, with that data set's lists; "
                       "ava: key frames with boxes, for action detection; "
                       "synthetic: random clips, no files, for benchmarks",
                       choices=("list", "folders", "shards", "ssv2", "charades", "ava",
                                "synthetic")),
    "data.tfds": Key(None, "images prepared by TensorFlow Datasets, like imagenet2012:5.1.0, "
                     "instead of a source; lists are then splits, like train[:90%]", kind=str),
    "data.prefix": Key("", "prefix of each path in the lists"),
    "data.separator": Key(None, "separator of path and label in the lists; None: white space",
                          kind=str),
    "data.train_videos": Key(None, "number of training videos, for plans made without the data",
                             low=1, kind=int),
    "data.classes": Key(None, "number of classes, for plans made without the data",
                        low=1, kind=int),
    "data.train_list": Key("train.csv", 'training list, with lines "path label"', required=True),
    "data.val_list": Key("val.csv", "list for validation during training; None for none",
                         optional=True),
    "data.test_list": Key("test.csv", "list for `evaluate`; None for none", optional=True),
    "data.sampling": Key("span", "sampling of a clip's frames. span: evenly over frames * stride "
                         "/ 30 seconds (Kinetics); segments: one from each of as many equal parts "
                         "(SSv2); stride: each stride-th (Charades); key_frame: each stride-th of "
                         "30 a second, around the key frame (AVA)",
                         choices=("span", "segments", "stride", "key_frame")),
    "data.stride": Key(4, "distance between sampled frames; for a span, at 30 frames a second",
                       unit="frames", low=1),
    "data.repeats": Key(1, "augmented copies of each decoded clip (repeated augmentation)",
                        low=1),
    "data.balanced": Key(False, "draw training videos so that every epoch has each class equally "
                         "often: videos of small classes repeat, those of large classes alternate"),
    "data.multi_label": Key(False, "videos with any number of classes, as in Charades: sigmoids, "
                            'binary cross-entropy, mAP. Lists have lines "path label,label", '
                            'folders a labels.csv with lines "file,class;class"'),
    "data.train_boxes": Key(None, "person boxes beside the training labels, of AVA's format; None "
                            "for none", kind=str),
    "data.val_boxes": Key(None, "person boxes to classify in validation; None: the labelled ones",
                          kind=str),
    "data.test_boxes": Key(None, "person boxes to classify in `evaluate`; None: the labelled ones",
                           kind=str),
    "data.min_score": Key(0.9, "smallest score of a person box", low=0, high=1),
    "data.excluded": Key(None, "list of key frames, `video,second`, that the mAP leaves out",
                         kind=str),
    "data.class_list": Key(None, "required by source ava: classes that the mAP is the mean of "
                           "(.pbtxt)", kind=str),
    "data.first_second": Key(900, "second that AVA's lists assign to the first frame", low=0,
                             high=100_000),
    "data.short_side": Key(256, "short side of test videos before the crop",
                           unit="pixels", low=1),
    "data.interpolation": Key("bilinear", "interpolation when resizing; bicubic is antialiased, as "
                              "for ImageNet", choices=("bilinear", "bicubic")),
    "data.mean": Key((0.45, 0.45, 0.45), "mean of red, green, blue in [0, 1]; clips are "
                     "(value - mean) / std", length=3, low=0, high=1),
    "data.std": Key((0.225, 0.225, 0.225), "standard deviation of red, green, blue in [0, 1]",
                    length=3, above=0, high=1),
    "data.threads": Key(4, "decoding threads per host; 0 decodes in the main thread", low=0),
    "data.processes": Key(0, "decoding processes per host, each with data.threads threads; 0 "
                          "for none", low=0),
    # The upper bound is far below the longest timeout of the operating system.
    "data.timeout": Key(600.0, "time limit for loading a batch, after which the run saves and "
                        "ends; 0 for no limit", unit="seconds", low=0, high=10**6),
    "data.max_broken": Key(0.2, "largest accepted share of decode failures, in a test's list or "
                           "among the clips drawn since the start (at least 200); above it, the "
                           "run ends",
                           low=0, high=1),

    "augment.short_side": Key(None, "resized short side of training frames; None: no resizing",
                              unit="pixels", low=1, kind=int),
    "augment.randaugment": Key("", 'policy in the notation of timm, like '
                               'rand-m7-n4-mstd0.5-inc1; "" for none'),
    "augment.crop_area": Key((0.08, 1.0), "lowest and highest share of the frame's area in a "
                             "random resized crop; None: no random crop", length=2, above=0, high=1,
                             optional=True),
    "augment.jitter": Key(None, "lowest and highest short side before a random square crop (its "
                          "inverse is uniform); instead of crop_area",
                          unit="pixels", length=2, item=int, low=1, kind=tuple),
    "augment.flip": Key(0.5, "probability of a left-right flip", low=0, high=1),
    "augment.random_erase_prob": Key(0.0, "probability of random erasing",
                                     low=0, high=1),
    "augment.random_erase_mode": Key("pixel", 'fill: "pixel", normal noise; "const", the mean '
                                     'colour', choices=("pixel", "const")),
    "augment.mixup": Key(0.8, "alpha of mixup's Beta distribution; 0 for none", low=0),
    "augment.cutmix": Key(1.0, "alpha of cutmix's Beta distribution; 0 for none", low=0),
    "augment.mixup_switch_prob": Key(0.5, "probability of cutmix if mixup and cutmix are both on",
                                     low=0, high=1),
    "augment.mixup_group_size": Key(4, "clips that share one mixing weight; must divide the "
                                    "clips per device", low=1),
    "augment.label_smoothing": Key(0.1, "share of the target spread over all classes",
                                   low=0, high=1),

    "optim.name": Key("adamw", "optimiser; sgd has Nesterov momentum", choices=("adamw", "sgd")),
    "optim.lr_batch": Key(None, "batch size of the three learning rates below, which are "
                          "multiplied by batch / lr_batch (linear scaling). None: no scaling",
                          low=1, kind=int),
    "optim.lr": Key(1.6e-3, "learning rate after the warm-up", low=0),
    "optim.start_lr": Key(1.6e-5, "learning rate at step 0", low=0),
    "optim.end_lr": Key(1.6e-5, "learning rate at the end of the half cosine", low=0),
    "optim.warmup_epochs": Key(30.0, "linear warm-up of the learning rate", unit="epochs", low=0),
    "optim.weight_decay": Key(0.05, "weight decay; not of biases, norms and other 1-D tensors",
                              low=0),
    "optim.layer_decay": Key(1.0, "layer decay: factor of the learning rate from each block to the "
                             "previous one; 1 for none", low=0, high=1),
    "optim.b1": Key(0.9, "decay of AdamW's mean of gradients", low=0, below=1),
    "optim.b2": Key(0.999, "decay of AdamW's mean of squared gradients", low=0, below=1),
    "optim.momentum": Key(0.9, "momentum of SGD", low=0, below=1),
    "optim.class_weights": Key(None, "weights of the classes in the loss. balanced: inverse to the "
                               "number of training videos, with mean 1; None: all equal",
                               kind=str, choices=("balanced",)),
    "optim.loss_reduction": Key("global", "mean over the boxes: global, of the batch; per_device, "
                                "the mean of each device's mean, as in PySlowFast",
                                choices=("global", "per_device")),
    "optim.clip_norm": Key(1.0, "gradient clipping by global norm; 0 for none", low=0),
    "optim.trained_blocks": Key(None, "number of last blocks that are trained, with the final norm "
                                "and the head; all other weights are frozen. 0 trains the head "
                                "alone (linear probe), None everything", low=0, kind=int),
    "optim.ema": Key(0.0, "decay of averaged weights (EMA), which are then tested; 0 for none",
                     low=0, below=1),
    "optim.ema_warmup": Key(False, "warm-up of that decay, to at most 1 - (1 + step)^(-2/3) as in "
                            "timm: averages of short runs then forget the initial weights"),

    "mesh.data": Key(-1, "size of the mesh axis along which weights are replicated; -1 for all "
                     "remaining devices", low=-1),
    "mesh.fsdp": Key(1, "size of the mesh axis along which weights are sharded", low=1),

    "checkpoint.every": Key(500, "interval of checkpoints", unit="steps", low=1),
    "checkpoint.keep": Key(2, "last checkpoints to keep, besides the best one", low=1),

    "eval.every_epochs": Key(5.0, "interval of validations, 1 clip x 1 crop; 0 for none",
                             unit="epochs", low=0),
    "eval.batch": Key(8, "videos in a batch; rounded up to a multiple of the devices", low=1),
    "eval.clips": Key(5, "clips of a test video, evenly spread", low=1),
    "eval.crops": Key(1, "crops of a clip; 1 is the centre", choices=(1, 3)),
    "eval.ensemble": Key("mean", 'aggregation of scores over a video\'s views; "max" for Charades',
                         choices=("mean", "max")),
    "eval.whole_image": Key(False, 'resize the whole image to the crop, ignoring its aspect ratio: '
                            'the papers\' column "resize"'),
    "eval.full_frame": Key(False, "test boxes in the whole frame instead of the centre square, "
                           "which compiles once per shape of the frames"),
}
# fmt: on

RENAMED = {
    "augment.erase": "augment.random_erase_prob",
    "augment.erase_mode": "augment.random_erase_mode",
    "augment.switch": "augment.mixup_switch_prob",
    "augment.group": "augment.mixup_group_size",
}
"""Renamed keys: new names by old names, which `config.json` of older runs contains."""

SECTIONS = {
    "": "the run",
    "init": "initial weights; a workdir that has checkpoints resumes from them instead",
    "model": "the architecture; None takes the value of the variant. "
    "Kernels and strides are (time, height, width)",
    "data": "the training, validation and test lists, and how clips are read",
    "augment": "augmentation of training clips, in this order: short_side, RandAugment, random "
    "crop, flip, random erasing, mixup or cutmix (images are cropped before RandAugment)",
    "optim": "the optimiser and its learning rates",
    "mesh": "the devices",
    "checkpoint": "saved training states",
    "eval": "validation and test",
}

_WORDS = {
    int: "a whole number", float: "a number", bool: "True or False", str: "text",
    tuple: "values in brackets, like (1, 2)",
}  # fmt: skip


class _Section(ConfigDict):
    """A section of the config; an assignment of a wrong type names the key and its type."""

    _prefix = ""

    def __setitem__(self, field: str, value: Any) -> None:
        section = field in self and isinstance(self[field], ConfigDict)
        if section and not isinstance(value, dict | ConfigDict):
            raise UserError(f"{field}={value!r}: it is a section; set its keys, like {field}.KEY")
        name = f"{self._prefix}{field}"
        # `ConfigDict` would convert True to 1.0.
        number = name in KEYS and KEYS[name].kind in (int, float)
        if isinstance(value, bool) and number and self.is_type_safe:
            raise UserError(f"{name}={value!r}: {_wrong_type(name)}")
        try:
            super().__setitem__(field, value)
        except TypeError:
            if name not in KEYS:
                raise
            raise UserError(f"{name}={value!r}: {_wrong_type(name)}") from None


def _wrong_type(name: str) -> str:
    return f"it must be {_WORDS[KEYS[name].kind]}"


def base() -> Config:
    """Returns a locked config of all keys with their defaults."""
    config: Any = _Section()
    for name, key in KEYS.items():
        section, _, field = name.rpartition(".")
        if section and section not in config:
            config[section] = _Section()
            object.__setattr__(config[section], "_prefix", f"{section}.")
        holder = config[section] if section else config
        if key.can_be_none:
            holder[field] = config_dict.placeholder(key.kind)
        if key.default is not None:
            holder[field] = key.default
    return config.lock()


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Renames old keys in the nested values of a config, in place; returns the values."""
    for old, new in RENAMED.items():
        section, _, field = old.rpartition(".")
        if field in values.get(section, {}):
            values[section][new.rpartition(".")[2]] = values[section].pop(field)
    return values


def value(config: Config, name: str) -> Any:
    """Returns the value of a key by its dotted name, like "optim.lr"."""
    section, _, field = name.rpartition(".")
    return (config[section] if section else config)[field]


def change(config: Config, changes: Mapping[str, Any]) -> None:
    """Sets values by dotted keys, like {"optim.lr": 1e-3}.

    Raises:
      UserError: a key does not exist, or a value has another type.
    """
    for key, value in changes.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError) as error:
            unknown = isinstance(error, KeyError) or key not in KEYS
            reason = f"there is no such key{nearest(key)}" if unknown else _wrong_type(key)
            raise UserError(f"{key}={value!r}: {reason}") from None


def nearest(name: str) -> str:
    """Returns a hint about an unknown key, for the end of a message: the new or a similar name."""
    if name in RENAMED:
        return f"; it is now called {RENAMED[name]!r}"
    close = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; mvit_jax/config.py lists all keys"


def check(config: Config) -> None:
    """Checks every value, and the combinations of values.

    Raises:
      UserError: a value or a combination is invalid; the message names the first one.
    """
    for name, key in KEYS.items():
        _check_key(name, key, value(config, name))
    area, jitter = config.augment.crop_area, config.augment.jitter
    if area and area[0] > area[1]:
        raise UserError(f"augment.crop_area must be two shares, 0 < low <= high <= 1, not {area}")
    if jitter and jitter[0] > jitter[1]:
        raise UserError(
            f"augment.jitter must be two short sides, 0 < low <= high pixels, not {jitter}"
        )
    if area and jitter:
        raise UserError(
            "augment.crop_area and augment.jitter exclude each other: set one of them to None"
        )
    if config.mesh.data == 0:
        raise UserError("mesh.data must be -1, for all other devices, or at least 1, not 0")
    if config.eval.whole_image and config.eval.crops != 1:
        raise UserError("eval.whole_image tests the whole image, without crops: set eval.crops=1")
    if config.data.sampling == "segments" and config.eval.clips != 1:
        raise UserError("data.sampling=segments samples one clip per video: set eval.clips=1")
    if config.data.multi_label and config.augment.mixup + config.augment.cutmix > 0:
        raise UserError(
            "mixup and cutmix do not support data.multi_label: set augment.mixup=0 and "
            "augment.cutmix=0"
        )
    _check_detection(config)
    corrections = {
        "data.balanced=True": config.data.balanced,
        "optim.class_weights=balanced": config.optim.class_weights is not None,
    }
    chosen = [name for name, on in corrections.items() if on]
    if len(chosen) == 2:
        raise UserError(f"{' and '.join(chosen)} both correct for rare classes: choose one")
    if chosen and config.data.multi_label:
        raise UserError(f"{chosen[0]} requires one label per video: set data.multi_label=False")


def _check_detection(config: Config) -> None:
    """Raises `UserError` if values do not match the task, detection for the source ava."""
    detects = config.data.source == "ava" and config.data.tfds is None
    if detects != (config.data.sampling == "key_frame"):
        raise UserError(
            "data.source=ava and data.sampling=key_frame require each other, but they are "
            f"{config.data.source} and {config.data.sampling}: set both or neither"
        )
    if not detects:
        defaults = {
            "eval.full_frame": False, "optim.loss_reduction": "global", "data.train_boxes": None,
            "data.val_boxes": None, "data.test_boxes": None, "data.excluded": None,
            "data.class_list": None,
        }  # fmt: skip
        for name, default in defaults.items():
            if value(config, name) != default:
                raise UserError(f"{name} requires data.source=ava: set it to {default!r}")
        return
    if not config.data.class_list:
        raise UserError(
            "data.source=ava requires the list of the evaluated classes: set data.class_list to "
            "AVA's .pbtxt file"
        )
    # Mixed clips have the boxes of two, and RandAugment and whole_image would move pixels alone.
    required = {
        "data.multi_label": True, "data.balanced": False, "augment.mixup": 0, "augment.cutmix": 0,
        "augment.randaugment": "", "augment.short_side": None, "augment.label_smoothing": 0,
        "eval.clips": 1, "eval.crops": 1, "eval.whole_image": False,
    }  # fmt: skip
    for name, only in required.items():
        if value(config, name) != only:
            raise UserError(
                f"{name}={value(config, name)!r} does not support boxes (data.source=ava): set "
                f"{name}={only!r}"
            )


def _check_key(name: str, key: Key, value: Any) -> None:
    if value is None:
        if not key.can_be_none:
            raise UserError(f"{name} cannot be None: its default is {key.default!r}")
        return
    if problem := key.problem(value):
        raise UserError(f"{name} must be {problem}, not {value!r}")
    section, _, field = name.rpartition(".")
    if section == "model" and field in MViTConfig.__dataclass_fields__:
        check_field(field, tuple(value) if isinstance(value, list) else value, name)


def check_start(config: Config) -> None:
    """Checks that the config names the initial weights that it requires.

    Raises:
      UserError: the recipe requires weights, or fresh weights would be frozen.
    """
    if config.optim.trained_blocks is not None and not (config.init.checkpoint or config.resume):
        raise UserError(
            f"optim.trained_blocks={config.optim.trained_blocks} would freeze fresh weights: set "
            "--config.init.checkpoint=DIR to a run's folder or one made by mvit_jax.convert"
        )
    if missing_weights(config):
        raise UserError(
            f"this experiment starts from {config.init.needed}: set --config.init.checkpoint=DIR "
            "to a run's folder or one made by mvit_jax.convert; to start from fresh weights, set "
            "--config.init.needed="
        )


def missing_weights(config: Config) -> bool:
    """Returns True if the recipe requires initial weights and the config names none."""
    return bool(config.init.needed) and not (config.init.checkpoint or config.resume)


def find(path: str) -> Path:
    """Returns the file of an experiment; a missing configs/NAME.py is taken from the package."""
    local = expanded(path)
    installed = RECIPES / local.name
    if local.parent == Path("configs") and not local.exists() and installed.exists():
        return installed
    return local


def load(name: str, arg: str | None = None) -> Config:
    """Returns the config of the experiment `configs/NAME.py`.

    A file in the working directory takes precedence over the package's file of the same name.

    Args:
      name: NAME, or a path that ends with .py.
      arg: the part after the colon in `--config=configs/NAME.py:ARG`.

    Raises:
      UserError: there is no such file.
      ValueError: the experiment has no such `arg`.
    """
    path = find(name if name.endswith(".py") else f"configs/{name}.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.py")))
        raise UserError(f"there is no config {name!r}: {RECIPES} has {names}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if arg is None else module.get_config(arg)


def define_flag() -> Any:
    """Defines the flag --config=FILE[:ARG] and a flag for each key; returns the flag holder.

    Like `config_flags.DEFINE_config_file`, but finds files as `load` does, and accepts None for
    every key (`check` rejects it where it is not valid).
    """
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags.tuple_parser import TupleParser

    renamed_keys.update({old.rpartition(".")[2]: (old, new) for old, new in RENAMED.items()})
    flags.disclaim_key_flags()  # so that --help lists --config under the program

    class OrNone(flags.ArgumentParser):
        """A parser that returns None for the word None, and calls `parse` for all other texts."""

        def __init__(self, kind: type, parse: Callable[[Any], Any]) -> None:
            self._kind, self._parse = kind, parse

        def parse(self, argument: Any) -> Any:
            if self._kind is tuple and argument == "":
                return ()
            try:
                return None if argument == "None" else self._parse(argument)
            except (TypeError, ValueError):
                raise ValueError(f"it must be {_WORDS[self._kind]}") from None

    parsers = (
        (int, flags.IntegerParser()), (float, flags.FloatParser()), (bool, flags.BooleanParser()),
        (str, flags.ArgumentParser()), (tuple, TupleParser()),
    )  # fmt: skip
    for kind, parser in parsers:
        config_flags.register_flag_parser_for_type(kind, OrNone(kind, parser.parse))
    holder = config_flags.DEFINE_config_file(
        "config", None, "An experiment: configs/NAME.py[:arg].", flags.FLAGS
    )
    parser: Any = flags.FLAGS["config"].parser
    read = parser.parse

    def parse(text: str) -> Any:
        path, colon, arg = text.partition(":")
        return read(f"{find(path)}{colon}{arg}")

    parser.parse = parse
    return holder
