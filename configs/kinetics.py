"""Kinetics-400, 600 and 700 (MViT, Tables 4 and 5; MViTv2, Tables 10 to 12 and 14; MaskFeat).

    python -m mvit_jax.train --config=configs/kinetics.py:mvit_b_16x4 --workdir=runs/mvit_b_16x4 \\
        --config.data.folder=DIR
    python -m mvit_jax.evaluate --workdir=runs/mvit_b_16x4

The word after the colon is [k600_|k700_]VARIANT[_max][_in1k|_in21k]; Kinetics-400 where none is
said. `--dry_run` prints the plan, figure included. DIR holds `train.csv`, `val.csv` and `test.csv`,
lines "path label", and `labels.txt`; public copies lack videos, and the lists used for the papers
are not known (K400's validation copies of 19,761 to 19,881 videos move top-1 by up to 0.7).

What starts from weights needs `--config.init.checkpoint=RUN`, a run's folder or one of
`python -m mvit_jax.convert`:

    long models (64x3, 40x3, 32x3_312)  the run of ..._32x3 (MViT) or ..._l_16x4[_in..] (MViTv2)
                                        on the same data
    _in1k, _in21k                       configs/imagenet.py:mvitv2_s or :mvitv2_s_in21k, and so on;
                                        for mvitv2_l_16x4_in1k train that with
                                        --config.model.expand=attention, as released ones grow in
                                        the MLP and fit no video model
    maskfeat_...                        weights pretrained by MaskFeat, which this project reads
                                        but does not train

Batches count clips, 256 videos x 2 repeats = 512, and the rates follow them (`optim.lr_batch`). The
reference code states rates for a node of 32 clips; the papers' 128 GPUs are 16 of these.

Assumed, where papers and released code say different things or nothing:

* Warm-up of fine-tuning: 15 % of the epochs, as from scratch; none where every weight has learned
  from this data already. Its first and last rate: a hundredth of the highest, as from scratch.
* 64x3: 5 epochs (MViT, 4.1); rate and batch, not stated, are those of MViTv2's long models.
* Long models of MViTv2 (B.4: 30 epochs, 1.6e-5 at 128 clips, decay 1e-8, no mixup): one repeat, as
  in the released test config; label smoothing stays. mvitv2_l_16x4..., their beginning, has no
  published figure. No training config of L was released.
* L from ImageNet-1k: as S and B (100 epochs, 4.8e-4), for which alone this is stated.
* Image weights are inflated into the centre frame (MViTv2, 4.3). The released code repeats the
  kernel for every frame and does not divide: `--config.init.inflate=repeat`.
* mvit_b_32x3 has 16 blocks, as in the paper; the released config of that name has 24 and names no
  kernels for its pools, so that these are of stride + 1 (keys by 1x9x9, 1x5x5, 1x3x3): that is
  mvit_b24_32x3 on Kinetics-400. On Kinetics-600, for which there is no config, they are of 3x3x3.
  Drop path is 0.2 with 16 blocks and 0.3 with 24.
* vit_b_8x8_in21k: MViTv2's recipe from ImageNet-21k; MViT does not give its own, only that from
  scratch it comes to 34.3.
* mvit_s: never released; see `python -m mvit_jax.describe mvit_s_16x4`.
* mvitv2_b_32x3 on Kinetics-600 and 700: published with 206 G multiply-adds, built it has 225.
* L has 213 M parameters as published configs build it; the papers' 217.6 M grow in the MLP. Its
  pixels are normalised by ImageNet's mean and deviation, all others' by 0.45 and 0.225.
* Frames come in with a short side of 256, or size / 0.875 above 224 pixels (where this is not
  stated); MaskFeat's with 320.
* One centre crop is cut from a short side of 256, as the papers say; for 3 crops the reference code
  scales the short side to the crop, though the papers say 256.
* MViT's released configs leave 10 x 1 views, the paper has 5 x 1. Views of MViTv2's Table 14 are
  not stated: 5 x 1, and 5 x 3 where Table 10 has the model (86.1; Table 14 has 85.7).
* MaskFeat: the config for S (100 epochs, 20 of warm-up; the paper has 200 and 5). Its classifier
  starts 1000 times smaller, which no key here says. L's config has one repeat.
* PyTorchVideo's trainer has this recipe, and came to 78.85 / 93.85 (16x4) and 80.30 / 94.69 (32x3).
* Reversible models (Rev-MViT) are not built here.
"""

import re
from typing import Any, NamedTuple

from mvit_jax.models.variants import preprocessing
from mvit_jax.training.experiment import read_config

_DATA = {  # videos to train on (about: they vanish from the web), classes
    "k400": (240_436, 400),
    "k600": (366_000, 600),
    "k700": (535_000, 700),
}
_BEGINNING = "nothing: the long models begin with it"


class _Schedule(NamedTuple):
    """A way to train: `lr` is meant for `batch` clips, which are 1 / `repeats` as many videos."""

    epochs: float
    warmup: float
    lr: float
    start_lr: float
    end_lr: float
    batch: int = 512
    decay: float = 0.05
    repeats: int = 2
    clip: float = 1.0
    layer_decay: float = 1.0
    mix: bool = True
    group: int = 4  # clips of one of the papers' GPUs, which share a mixing weight
    randaugment: str = "rand-m7-n4-mstd0.5-inc1"


_SCHEDULES = {
    "scratch": _Schedule(200.0, 30.0, 1.6e-3, 1.6e-5, 1.6e-5),
    "in1k": _Schedule(100.0, 15.0, 4.8e-4, 4.8e-6, 4.8e-6),
    "in21k": _Schedule(75.0, 11.25, 1.6e-4, 1.6e-6, 1.6e-6),
    "long": _Schedule(30.0, 0.0, 1.6e-5, 1.6e-7, 1.6e-7, 128, decay=1e-8, repeats=1, mix=False),
    "64x3": _Schedule(5.0, 0.0, 1.6e-5, 1.6e-7, 1.6e-7, 128),
    # Rates per node times 16, of 32 clips with S and 16 with L.
    "maskfeat_s": _Schedule(100.0, 20.0, 9.6e-3, 1.6e-5, 1.6e-5, clip=5.0, layer_decay=0.75,
                            randaugment="rand-m7-n2-mstd0.5-inc1"),
    "maskfeat_l": _Schedule(75.0, 5.0, 9.6e-3, 1.6e-7, 1.6e-4, 256, repeats=1, clip=5.0, group=2,
                            layer_decay=0.875, randaugment="rand-m7-n2-mstd0.5-inc1"),
}  # fmt: skip


# What can be trained: clips and crops of the test, and what was published (top-1 / top-5).
_ROWS = {
    "k400": {
        "vit_b_8x8": (5, 1, "68.5 / 86.9 (MViT, Table 4)"),
        "vit_b_8x8_in21k": (5, 1, "79.3 / 93.9 (MViT, Table 4)"),
        "mvit_s_16x4": (5, 1, "76.0 / 92.1 (MViT, Table 4)"),
        "mvit_s_16x4_max": (5, 1, "74.3 (MViT, Table 16)"),
        "mvit_b_16x4": (5, 1, "78.4 / 93.5 (MViT, Table 4)"),
        "mvit_b_16x4_max": (5, 1, "77.2 (MViT, Table 16)"),
        "mvit_b_32x3": (5, 1, "80.2 / 94.4 (MViT, Table 4)"),
        "mvit_b_64x3": (3, 3, "81.2 / 95.1 (MViT, Table 4)"),
        "mvit_b24_32x3": (5, 1, "80.4 / 94.8 (PySlowFast's zoo)"),
        "mvitv2_s_16x4": (5, 1, "81.0 / 94.6 (MViTv2, Table 10; 81.2 in Table 14)"),
        "mvitv2_s_16x4_in1k": (5, 1, "82.2 (MViTv2, Table 14)"),
        "mvitv2_s_16x4_in21k": (5, 1, "82.6 (MViTv2, Table 14)"),
        "mvitv2_b_32x3": (5, 1, "82.9 / 95.7 (MViTv2, Table 10)"),
        "mvitv2_b_32x3_in1k": (5, 1, "83.3 (MViTv2, Table 14)"),
        "mvitv2_b_32x3_in21k": (5, 1, "84.3 (MViTv2, Table 14)"),
        "mvitv2_l_16x4": (5, 1, _BEGINNING),
        "mvitv2_l_16x4_in1k": (5, 1, _BEGINNING),
        "mvitv2_l_16x4_in21k": (5, 1, _BEGINNING),
        "mvitv2_l_40x3": (5, 1, "81.4 (MViTv2, Table 14)"),
        "mvitv2_l_40x3_in1k": (5, 1, "83.4 (MViTv2, Table 14)"),
        "mvitv2_l_40x3_in21k": (5, 1, "84.5 (MViTv2, Table 14)"),
        "mvitv2_l_40x3_312": (5, 1, "81.8 (MViTv2, Table 14)"),
        "mvitv2_l_40x3_312_in1k": (5, 1, "84.4 (MViTv2, Table 14)"),
        "mvitv2_l_40x3_312_in21k": (5, 3, "86.1 / 97.0 (MViTv2, Table 10; 85.7 in Table 14)"),
        "maskfeat_s_16x4": (10, 1, "82.2 (MaskFeat, PySlowFast's zoo)"),
        "maskfeat_l_16x4": (10, 1, "84.3 (MaskFeat, PySlowFast's zoo)"),
    },
    "k600": {
        "mvit_b_16x4": (5, 1, "82.1 / 95.7 (MViT, Table 5)"),
        "mvit_b_32x3": (5, 1, "83.4 / 96.3 (MViT, Table 5)"),
        "mvit_b24_32x3": (5, 1, "83.8 / 96.3 (MViT, Table 5; 84.1 / 96.5 in MViTv2, Table 11)"),
        "mvitv2_b_32x3": (5, 1, "85.5 / 97.2 (MViTv2, Table 11)"),
        "mvitv2_l_16x4_in21k": (5, 1, _BEGINNING),
        "mvitv2_l_32x3_312_in21k": (4, 3, "87.2 / 97.6 (MViTv2, Table 11)"),
        "mvitv2_l_40x3_312_in21k": (4, 3, "87.5 / 97.8 (MViTv2, Table 11)"),
        "mvitv2_l_40x3_352_in21k": (4, 3, "87.9 / 97.9 (MViTv2, Table 11)"),
    },
    "k700": {
        "mvitv2_b_32x3": (3, 3, "76.6 / 93.2 (MViTv2, Table 12)"),
        "mvitv2_l_16x4_in21k": (3, 3, _BEGINNING),
        "mvitv2_l_40x3_312_in21k": (3, 3, "79.4 / 94.9 (MViTv2, Table 12)"),
    },
}


def get_config(arg: str = "mvit_b_16x4") -> Any:  # a ConfigDict
    data, _, name = arg.partition("_") if arg.startswith("k") else ("k400", "", arg)
    if name not in _ROWS.get(data, {}):
        known = [f"{d}_{n}".removeprefix("k400_") for d, names in _ROWS.items() for n in names]
        raise ValueError(f"configs/kinetics.py has {', '.join(known)}, not {arg!r}")
    clips, crops, published = _ROWS[data][name]
    variant = re.sub("_(max|in1k|in21k)$", "", name)
    ending = name.removeprefix(variant)
    kind, needed = _start(variant, ending, data)
    how, expected = _SCHEDULES[kind], preprocessing(variant)

    c = read_config("base")
    c.published = published
    c.epochs, c.batch = how.epochs, how.batch
    c.init.needed = needed
    c.init.inflate = "centre" if kind in ("in1k", "in21k") else None
    c.model.variant = variant
    c.model.pool_mode = "max" if ending == "_max" else None
    if (data, name) == ("k400", "mvit_b24_32x3"):
        c.model.pool_kernel = "stride + 1"
    c.data.train_videos, c.data.classes = _DATA[data]
    c.data.update(stride=expected.stride, repeats=how.repeats, short_side=expected.short_side)
    c.data.update(mean=expected.mean, std=expected.std, interpolation=expected.interpolation)
    c.augment.update(randaugment=how.randaugment, erase=0.25, group=how.group)
    c.augment.short_side = 320 if kind.startswith("maskfeat") else expected.short_side
    if not how.mix:
        c.augment.update(mixup=0.0, cutmix=0.0)
    c.optim.update(lr=how.lr, start_lr=how.start_lr, end_lr=how.end_lr, lr_batch=how.batch)
    c.optim.update(warmup_epochs=how.warmup, weight_decay=how.decay, clip_norm=how.clip)
    c.optim.layer_decay = how.layer_decay
    c.eval.update(clips=clips, crops=crops, every_epochs=min(10.0, how.epochs / 5))
    c.checkpoint.every = 1000
    return c


def _start(variant: str, ending: str, data: str) -> tuple[str, str | None]:
    """The schedule, and the weights that it starts from."""
    kinetics = f"Kinetics-{data[1:]}"
    if variant.startswith("maskfeat"):
        return variant[:10], f"weights of {variant} that MaskFeat pretrained on {kinetics}"
    if variant == "mvit_b_64x3":
        return "64x3", f"weights of mvit_b_32x3 trained on {kinetics}"
    if variant.startswith("mvitv2_l") and variant != "mvitv2_l_16x4":
        return "long", f"weights of mvitv2_l_16x4{ending} trained on {kinetics}"
    if ending in ("_in1k", "_in21k"):
        image = "vit_b16" if variant.startswith("vit") else variant[:8]
        if ending == "_in21k":
            return "in21k", f"weights of {image} trained on ImageNet-21k"
        grows = " with model.expand=attention" if image == "mvitv2_l" else ""
        return "in1k", f"weights of {image} trained on ImageNet-1k{grows}"
    return "scratch", None
