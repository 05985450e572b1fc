"""The plan of an experiment as text (`train --dry_run`).

All numbers are computed by the functions that training uses. Without a training list, the numbers
of videos and classes are taken from `data.train_videos` and `data.classes`.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from mvit_jax.common.errors import MissingDataError, UserError
from mvit_jax.common.files import expanded
from mvit_jax.common.text import Lines, align, indent, plural, section, table
from mvit_jax.config import Config, check, missing_weights
from mvit_jax.data.formats.ava import KeyFrameClips
from mvit_jax.data.source import Source
from mvit_jax.models.functional import Functional
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.summary import totals
from mvit_jax.models.variants import variant
from mvit_jax.training import build, custom, optimizer


def describe(config: Config, devices: int) -> str:
    """Returns the plan of training `config` on `devices` devices, as text.

    Reads only the lists of videos, if they exist; writes nothing. The plan names data and weights
    that are missing, and a batch or mesh that does not fit the devices.

    Raises:
      UserError: a value of the config is invalid, a training or validation list cannot be read,
        or there is neither a training list nor `data.train_videos`.
    """
    check(config)
    build.check_source(config)
    lists = {name: _open_list(config, name) for name in ("train", "val", "test")}
    videos, model = _videos_and_model(config, lists["train"])
    handle = build.settings(config, model.num_classes).model  # also checks the clip settings
    custom.check(handle)
    params = jax.eval_shape(handle.init, jax.random.key(0))
    trained, _ = optimizer.partition(params, config.optim.trained_blocks)
    parts = [
        align(
            [
                ("published", config.published or "no result for this experiment"),
                *_model_lines(config, handle),
                ("weights", _weights(config)),
            ]
        ),
        section("Data", [*_data(config, lists, videos), ("clips", _clips(config, model))]),
        _numbered("Augmentation, in this order", _augmentation(config, model)),
        section("Steps", _steps(config, videos, devices)),
        "Learning rate\n" + indent(_rates(config, videos)),
        section("Optimiser", [("trained", _trained(config, params)), *_optimizer(config)]),
        "Weight decay\n" + indent(_decay(config, trained)),
    ]
    if config.optim.layer_decay != 1:
        parts.append("Learning rates by layers\n" + indent(_layers(config, params)))
    parts.append(section("Tests", _tests(config, model, videos)))
    parts += [f"Warning: {sentence}" for sentence in build.warnings(config, videos)]
    return "\n\n".join(parts)


def data_and_model(config: Config) -> tuple[int, MViTConfig]:
    """Returns the number of training videos, and the architecture for the data's classes.

    Raises:
      UserError: the training list cannot be read, or there is neither one nor
        `data.train_videos`.
    """
    return _videos_and_model(config, _open_list(config, "train"))


def _videos_and_model(config: Config, train: Source | str) -> tuple[int, MViTConfig]:
    videos = config.data.train_videos if isinstance(train, str) else len(train)
    if videos is None:
        raise UserError(
            f"the number of training videos is unknown ({train}): give --config.data.train_videos=N"
        )
    return videos, _model_config(config, train)


def _open_list(config: Config, which: str) -> Source | str:
    """Opens a list of videos, or returns the reason why there is none.

    Raises:
      UserError: there is a list that training reads, but it cannot be read.
    """
    if not config.data.folder:
        return "give --config.data.folder=DIR"
    if not config.data[f"{which}_list"]:
        return "none"
    try:
        return build.videos(config, which)
    except MissingDataError as error:
        return str(error)
    except UserError as error:
        if which == "train" or (which == "val" and config.eval.every_epochs > 0):
            raise
        return str(error)


def _model_config(config: Config, train: Source | str) -> MViTConfig:
    classes = config.data.classes if isinstance(train, str) else len(train.class_names)
    if classes is not None:
        return build.model_config(config, classes)
    return build.model_config(config, variant(config.model.variant).num_classes)


def _model_lines(config: Config, handle: Functional) -> Lines:
    model = handle.config
    changed = [
        f"{k}={v}" for k, v in sorted(config.model.items()) if k != "variant" and v is not None
    ]
    return [
        ("model", config.model.variant + (f" with {', '.join(changed)}" if changed else "")),
        ("", f"{totals(handle.cost())}, {model.num_classes:,} classes"),
        ("", f"drop path {model.drop_path:g}, dropout {model.dropout:g} before the classifier"),
        ("computes", f"in {config.dtype}, matrix products with precision {config.precision}"),
    ]


def _weights(config: Config) -> str:
    if config.resume:
        return f"resumed from the last checkpoint of {config.resume}{_if_missing(config.resume)}"
    if missing_weights(config):
        return f"MISSING: {config.init.needed}; give --config.init.checkpoint=DIR"
    inflate = config.init.inflate
    inflation = f", image to video: {inflate}" if inflate else ""
    if not config.init.checkpoint:
        return "fresh"
    folder = config.init.checkpoint
    needed = f" (should be {config.init.needed})" if config.init.get("needed") else ""
    kind = {"plain": ", plain", "ema": ", averaged"}.get(config.init.weights, "")
    return f"from {folder}{_if_missing(folder)}{needed}{kind}{inflation}"


def _if_missing(path: str) -> str:
    return "" if expanded(path).exists() else " (missing)"


def _data(config: Config, lists: dict[str, Source | str], videos: int) -> Lines:
    d, items = config.data, _items(config)
    name = d.tfds and f"{d.tfds} of TensorFlow Datasets"
    lines = [
        ("source", name or d.source),
        ("folder", f"{d.folder}{_if_missing(d.folder)}" if d.folder else "not set"),
    ]
    if d.prefix:
        lines.append(("prefix", f"{d.prefix}, prepended to the paths in the lists"))
    for which, source in lists.items():
        if isinstance(source, str):
            assumed = f"; assuming {videos:,} {items} (data.train_videos)"
            reason = source + (assumed if which == "train" else "")
            lines.append((which, f"{d[f'{which}_list'] or 'no list'}: {reason}"))
        else:
            lines.append((which, f"{source.list_file}: {_count(source)}"))
    if _detects(config):
        lines += _box_files(config)
    per = "box" if _detects(config) else "video"
    lines.append(("labels", f"any number per {per}" if d.multi_label else f"one per {per}"))
    if d.balanced:
        lines.append(("drawn", "each class equally often in an epoch"))
    workers = f"{d.processes} processes x " if d.processes else ""
    lines.append(("decoded", f"by {workers}{d.threads} threads per host"))
    lines.append(("broken", f"replaced by others, up to {100 * d.max_broken:g} % of all {items}"))
    return lines


def _detects(config: Config) -> bool:
    return config.data.source == "ava"


def _items(config: Config) -> str:
    return "key frames" if _detects(config) else "videos"


def _count(source: Source) -> str:
    if isinstance(source, KeyFrameClips):
        boxes = len(source.key_frames.score)
        return f"{len(source):,} key frames, {boxes:,} boxes"
    return f"{len(source):,}"


def _box_files(config: Config) -> Lines:
    """Returns the files of boxes and classes beside the lists of a detection data set."""
    d = config.data

    def listed(name: str) -> str:
        file = d[name]
        return f"{file}{_if_missing(f'{d.folder}/{file}') if d.folder else ''}"

    boxes = "the labelled ones"
    lines = [
        ("train boxes", f"{boxes} and {listed('train_boxes')}" if d.train_boxes else boxes),
        *(
            (f"{which} boxes", listed(f"{which}_boxes") if d[f"{which}_boxes"] else boxes)
            for which in ("val", "test")
            if d[f"{which}_list"]
        ),
    ]
    if d.train_boxes or d.val_boxes or d.test_boxes:
        lines.append(("detected", f"persons with a score of at least {d.min_score:g}"))
    lines.append(("classes", f"{listed('class_list')}, of which the mAP is the mean"))
    if d.excluded:
        lines.append(("left out", f"key frames of {listed('excluded')}, in tests alone"))
    return lines


def _clips(config: Config, model: MViTConfig) -> str:
    d, size = config.data, f"{model.size} x {model.size}"
    if model.frames == 1:
        return f"images of {size}"
    sampling = {
        "span": f"spread evenly over {model.frames * d.stride / 30:.2f} s, from a random start",
        "segments": f"one at random from each of {model.frames} equal parts of the video",
        "stride": f"{d.stride} frames apart, from a random start",
        "key_frame": f"{d.stride} apart at 30 a second, around the key frame",
    }.get(d.sampling, d.sampling)
    return f"{model.frames} frames of {size}, {sampling}"


def _augmentation(config: Config, model: MViTConfig) -> list[str]:
    a = config.augment
    scaled = [f"frames scaled to a short side of {a.short_side} pixels"] if a.short_side else []
    alike = ", the same for all frames" if model.frames > 1 else ""
    random = [f"RandAugment {a.randaugment}{alike}"] if a.randaugment else []
    if a.jitter:
        crop = f"short side drawn from {a.jitter[0]} to {a.jitter[1]} (uniform inverse), then "
        crop += f"a random square of {model.size}"
    elif a.crop_area:
        crop = f"random crop of {100 * a.crop_area[0]:g} to {100 * a.crop_area[1]:g} % of the area"
        crop += f", resized to {model.size} ({config.data.interpolation})"
    else:
        crop = f"no random crop: short side to {model.size}, then the centre square"
    of_boxes = ", of pixels and boxes" if _detects(config) else ""
    crop += "; boxes are cut to the square" if _detects(config) else ""
    before = [*scaled, *random, crop] if model.frames > 1 else [*scaled, crop, *random]
    lines = [
        *before,
        f"left-right flip with probability {a.flip:g}{of_boxes}" if a.flip else "",
        f"(value / 255 - {_rgb(config.data.mean)}) / {_rgb(config.data.std)}",
        f"random erasing with probability {a.random_erase_prob:g} ({a.random_erase_mode})"
        if a.random_erase_prob
        else "",
        _mixing(config),
        f"label smoothing {a.label_smoothing:g}" if a.label_smoothing else "",
    ]
    return [line for line in lines if line]


def _mixing(config: Config) -> str:
    a = config.augment
    shared = f", one weight per {a.mixup_group_size} clips"
    if a.mixup and a.cutmix:
        return (
            f"cutmix (alpha {a.cutmix:g}) with probability {a.mixup_switch_prob:g}, else mixup "
            f"(alpha {a.mixup:g}){shared}"
        )
    for name in ("mixup", "cutmix"):
        if a[name]:
            return f"{name} (alpha {a[name]:g}){shared}"
    return ""


def _steps(config: Config, videos: int, devices: int) -> Lines:
    repeats, batch = config.data.repeats, config.batch
    steps = build.count_steps(config, config.epochs, videos)
    per_epoch = videos * repeats / batch
    content = f"{batch / repeats:g} {_items(config)}" + (
        f" x {repeats} clips" if repeats > 1 else ""
    )
    share = f"{batch / devices:g} clips per device, on {devices} devices ({jax.default_backend()})"
    if config.accumulate > 1:
        share += f", in {config.accumulate} micro-batches"
    try:
        build.check_devices(config, devices)
    except UserError as error:
        share += f": {error}"
    return [
        ("batch", f"{batch} clips = {content}"),
        ("share", share),
        ("steps", f"{steps:,} = {config.epochs:g} epochs x {per_epoch:,.2f}"),
        ("warm-up", f"{config.optim.warmup_epochs * per_epoch:,.2f} of them = "
                    f"{config.optim.warmup_epochs:g} epochs"),
        ("checkpoints", f"every {config.checkpoint.every:,} steps"),
    ]  # fmt: skip


def _rates(config: Config, videos: int) -> str:
    """Returns a table of learning rates: start, middle and end of the warm-up, cosine quarters."""
    schedule = build.schedule(config, videos)
    steps = build.count_steps(config, config.epochs, videos)
    per_epoch = videos * config.data.repeats / config.batch
    warm = min(config.optim.warmup_epochs, config.epochs)
    epochs = [0.0, warm / 2, *(warm + (config.epochs - warm) * i / 4 for i in range(4))]
    chosen = sorted({*(min(math.ceil(e * per_epoch), steps - 1) for e in epochs), steps - 1})
    rows = [(f"{step:,}", f"{step / per_epoch:.2f}", f"{schedule(step):.4g}") for step in chosen]
    return table(("step", "epoch", "rate"), rows)


def _trained(config: Config, params: Any) -> str:
    blocks = config.optim.trained_blocks
    if blocks is None:
        return "all parameters"
    trained, frozen = (
        sum(int(np.prod(shape.shape)) for shape in jax.tree.leaves(part))
        for part in optimizer.partition(params, blocks)
    )
    last = "the last block" if blocks == 1 else f"the last {blocks} blocks"
    parts = f"{last}, norm and head" if blocks else "the head"
    return f"{trained:,} of {trained + frozen:,} parameters: {parts}; the others are frozen"


_BOX_LOSS = {
    "global": "mean over all boxes of the batch and all classes",
    "per_device": "mean over the boxes of each device and all classes, then over devices",
}


def _optimizer(config: Config) -> Lines:
    c = config.optim
    average = f"decay {c.ema:g}{', after a warm-up from 0' if c.ema_warmup else ''}"
    rates = f"{c.lr:g}, from {c.start_lr:g}, to {c.end_lr:g}"
    if c.lr_batch:
        rates += f", for {c.lr_batch} clips; scaled by {build.rate_factor(config):g}"
    weights = [("classes", "weighted by inverse frequency, mean 1")] if c.class_weights else []
    sgd = f"SGD, Nesterov momentum {c.momentum:g}, L2 weight decay"
    kind = sgd if c.name == "sgd" else f"AdamW, b1 {c.b1:g}, b2 {c.b2:g}, decoupled weight decay"
    return [
        ("kind", kind),
        *([("loss", _BOX_LOSS[c.loss_reduction])] if _detects(config) else []),
        *weights,
        ("rates", rates),
        ("clipping", f"gradients to a global norm of {c.clip_norm:g}" if c.clip_norm else "none"),
        ("EMA", f"{average}; the averaged parameters are tested" if c.ema else "none"),
    ]


def _decay(config: Config, params: Any) -> str:
    """Returns a table of the trained tensors and parameters by weight decay and kind."""
    groups: dict[tuple[float, str], list[int]] = {}
    decays = flatten_dict(optimizer.decay_mask(params), sep="/")
    shapes: dict[str, Any] = flatten_dict(params, sep="/")
    for path, shape in shapes.items():
        size = int(np.prod(shape.shape))
        if decays[path]:
            key = (config.optim.weight_decay, _kind(path))
        else:
            reason = "biases" if path.endswith("/bias") else "scales of norms: one-dimensional"
            key = (0.0, reason)
        groups.setdefault(key, []).append(size)
    rows = [
        (f"{decay:g}", kind, f"{len(sizes):,}", f"{sum(sizes):,}")
        for (decay, kind), sizes in sorted(groups.items(), key=lambda g: (-g[0][0], -sum(g[1])))
    ]
    return table(("decay", "kind", "tensors", "parameters"), rows)


def _kind(path: str) -> str:
    if "/relative/" in path:
        return "relative positional embeddings"
    if path == "positions/class_token":
        return "class token"
    if path.startswith("positions/"):
        return "positional embeddings"
    return "pooling kernels" if "/pool_" in path else "kernels"


def _layers(config: Config, params: Any) -> str:
    trees = (
        optimizer.layer_rates(params, config.optim.layer_decay), optimizer.layers(params), params
    )  # fmt: skip
    rates, layers, shapes = (
        flatten_dict(optimizer.partition(tree, config.optim.trained_blocks)[0], sep="/")
        for tree in trees
    )
    sizes: dict[Any, list[int]] = {}
    shape: Any
    for path, shape in shapes.items():
        sizes.setdefault(layers[path], []).append(int(np.prod(shape.shape)))
    factor = {layers[path]: rate for path, rate in rates.items()}
    last = max(sizes)  # the head is always trained
    names = {0: "patch and positional embeddings", last: "norm, head"}
    highest = config.optim.lr * build.rate_factor(config)
    rows = [
        (str(layer), names.get(layer, f"block {layer - 1}"), f"{factor[layer]:.4g}",
         f"{highest * factor[layer]:.4g}", f"{sum(sizes[layer]):,}")
        for layer in sorted(sizes)
    ]  # fmt: skip
    return table(("layer", "module", "factor", "peak rate", "parameters"), rows)


def _tests(config: Config, model: MViTConfig, videos: int) -> Lines:
    lines = _box_tests(config, model) if _detects(config) else _views(config, model)
    e = config.eval
    if e.every_epochs > 0 and config.data.val_list:
        every = build.count_steps(config, e.every_epochs, videos)
        views = "the same view" if _detects(config) else "one centre view"
        lines.append(("validation", f"every {every:,} steps, {views}"))
    return lines


def _box_tests(config: Config, model: MViTConfig) -> Lines:
    part = f"centre square of {model.size}"
    if config.eval.full_frame:
        part = "the whole frame, a compilation per shape"
        if model.relative_positions != "none":
            verb = {"stretch": "stretched", "clamp": "clamped"}[model.relative_resize]
            part += f"; relative positions are {verb}"
    return [
        ("views", f"1 clip around the key frame: short side to {config.data.short_side}, {part}"),
        ("scores", "sigmoids of each box"),
        ("metrics", "frame mAP at IoU 0.5, with boxes matched in the order of the file (papers) "
                    "and of the scores (ActivityNet)"),
    ]  # fmt: skip


def _views(config: Config, model: MViTConfig) -> Lines:
    e, scores = config.eval, "sigmoids" if config.data.multi_label else "softmax"
    views = f"{plural(e.clips, 'clip')} x {plural(e.crops, 'crop')}" if model.frames > 1 else "one"
    square = f"short side to {config.data.short_side}, centre square of {model.size}"
    if e.crops == 3:
        square = f"short side to {model.size}, three squares of {model.size}"
    if model.frames == 1 and e.whole_image:
        square = f"the whole image resized to {model.size} x {model.size}"
    ensemble = {"mean": "mean over the views", "max": "maximum over the views"}.get(e.ensemble)
    metrics = "top-1, top-5, mean class accuracy"
    if config.data.multi_label:
        metrics = "mean average precision"
    return [
        ("views", f"{views}: {square}"),
        ("scores", f"{scores}, {ensemble or e.ensemble}"),
        ("metrics", metrics),
    ]


def _rgb(values: Iterable[float]) -> str:
    values = tuple(values)
    return f"{values[0]:g}" if len(set(values)) == 1 else str(values)


def _numbered(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {i}. {line}" for i, line in enumerate(lines, 1))])
