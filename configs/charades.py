"""Charades (MViT, Table 7): videos of several actions at a time, fine-tuned from Kinetics.

    python -m mvit_jax.train --config=configs/charades.py:mvit_b_16x4 --workdir=runs/charades \\
        --config.data.folder=DIR --config.data.prefix=frames --config.init.checkpoint=RUN
    python -m mvit_jax.evaluate --workdir=runs/charades

The word after the colon is VARIANT[_k600]: RUN is that of configs/kinetics.py, trained on
Kinetics-400 or Kinetics-600 (`_k600`), or a folder that `python -m mvit_jax.convert` made of
released weights. `--dry_run` prints the plan, figure included.

DIR holds PySlowFast's lists of frames, `train.csv` and `val.csv`, whose paths start at
DIR/frames. Figures are mean average precision on the validation list, over 157 classes, by the
highest score of 10 clips x 3 crops.

No config was ever released; the recipe is MViT's appendix D.3 (SGD, 200 epochs, batch of 256, rate
0.6, decay 1e-7, drop path 0.45, augmentation of Kinetics-400 without mixup, sigmoids). Assumed,
where it says nothing or the released code something else:

* 15 % of the epochs are warm-up; first and last rate are the shares of MViTv2's SGD recipe for
  Something-Something v2 (0.04 and 0.0004 of the highest). Gradients are not clipped.
* Augmentation of Kinetics includes RandAugment, random erasing, the Inception crop and flips; the
  released code has no RandAugment for this data set, and draws the short side from 256 to 340.
* Without mixup means also without cutmix. Labels are not smoothed: each class is a yes or no.
* A clip takes each stride-th frame, and is labelled by what happens in its span.
* MViT-B-24 from Kinetics-400 stands on a web page alone (46.3, which the paper gives to 64x3) and
  has no recipe here.
"""

from functools import partial
from typing import Any

from mvit_jax import config
from mvit_jax.models.variants import preprocessing


def recipe(variant: str, kinetics: str, published: str) -> Any:  # a ConfigDict
    """Returns a recipe that starts from the weights of another, `kinetics`."""
    c = config.base()
    c.published = published
    c.epochs = 200.0
    c.batch = 256
    c.init.needed = f"weights of configs/kinetics.py:{kinetics}"
    c.model.variant = variant
    c.model.drop_path = 0.45
    expected = preprocessing(variant)
    c.data.source = "charades"
    c.data.sampling = "stride"
    c.data.multi_label = True
    c.data.train_videos = 7985
    c.data.classes = 157
    c.data.test_list = "val.csv"
    c.data.stride = expected.stride
    c.data.short_side = expected.short_side
    c.data.mean = expected.mean
    c.data.std = expected.std
    c.augment.short_side = 256
    c.augment.randaugment = "rand-m7-n4-mstd0.5-inc1"
    c.augment.random_erase_prob = 0.25
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.label_smoothing = 0.0
    c.optim.name = "sgd"
    c.optim.lr_batch = 256
    c.optim.lr = 0.6
    c.optim.start_lr = 0.024
    c.optim.end_lr = 2.4e-4
    c.optim.warmup_epochs = 30.0
    c.optim.weight_decay = 1e-7
    c.optim.clip_norm = 0.0
    c.checkpoint.every = 1000
    c.eval.clips = 10
    c.eval.crops = 3
    c.eval.ensemble = "max"
    c.eval.every_epochs = 10.0
    return c


# What can be trained, the recipe of Kinetics that it starts from, and what was published (mAP).
RECIPES = {
    "mvit_b_16x4": partial(
        recipe, "mvit_b_16x4", "mvit_b_16x4", "40.0 mAP (MViT, Table 7)"),
    "mvit_b_32x3": partial(
        recipe, "mvit_b_32x3", "mvit_b_32x3", "44.3 mAP (MViT, Table 7)"),
    "mvit_b_64x3": partial(
        recipe, "mvit_b_64x3", "mvit_b_64x3", "46.3 mAP (MViT, Table 7)"),
    "mvit_b_16x4_k600": partial(
        recipe, "mvit_b_16x4", "k600_mvit_b_16x4", "43.9 mAP (MViT, Table 7)"),
    "mvit_b_32x3_k600": partial(
        recipe, "mvit_b_32x3", "k600_mvit_b_32x3", "47.1 mAP (MViT, Table 7)"),
    "mvit_b24_32x3_k600": partial(
        recipe, "mvit_b24_32x3", "k600_mvit_b24_32x3", "47.7 mAP (MViT, Table 7)"),
}  # fmt: skip


def get_config(arg: str = "mvit_b_16x4") -> Any:  # a ConfigDict
    if arg not in RECIPES:
        raise ValueError(f"configs/charades.py has {', '.join(RECIPES)}, not {arg!r}")
    return RECIPES[arg]()
