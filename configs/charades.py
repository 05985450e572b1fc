r"""Charades (MViT, Table 7): multi-label action recognition, fine-tuned from Kinetics.

    python -m mvit_jax.train --config=configs/charades.py:mvit_b_16x4 --workdir=runs/charades \
        --config.data.folder=DIR --config.data.prefix=frames --config.init.checkpoint=RUN
    python -m mvit_jax.evaluate --workdir=runs/charades

The argument after the colon is VARIANT[_k600]. RUN is the workdir of a training with
configs/kinetics.py on Kinetics-400 or Kinetics-600 (`_k600`), or a folder of released weights
converted by `python -m mvit_jax.convert`. `--dry_run` prints the plan with the published result.

DIR holds PySlowFast's lists of frames, `train.csv` and `val.csv`, with paths relative to
DIR/frames. Results are the mean average precision over 157 classes on the validation list. The
score of a class is the maximum over 10 clips x 3 crops.

No config was released. The recipe is MViT's appendix D.3: SGD, 200 epochs, batch 256, learning rate
0.6, weight decay 1e-7, drop path rate 0.45, augmentation of Kinetics-400 without mixup, sigmoids.
Assumptions where the appendix is silent or differs from the released code:

* Warm-up takes 15 % of the epochs. The first and last learning rates are 0.04 and 0.0004 times the
  highest, as in MViTv2's SGD recipe for Something-Something v2. Gradients are not clipped.
* The augmentation of Kinetics includes RandAugment, random erasing, the Inception crop and flips.
  The released code has no RandAugment for Charades and draws the short side from 256 to 340 pixels.
* "Without mixup" also excludes cutmix. There is no label smoothing, because each class is binary.
* A clip consists of every stride-th frame. Its labels are the actions that occur within the clip.
* MViT-B-24 from Kinetics-400 has no recipe here. Its only published result
  is on a web page: 46.3, which the paper reports for 64x3.
"""

from functools import partial
from typing import Any

from mvit_jax import config
from mvit_jax.models.variants import preprocessing


def recipe(variant: str, kinetics: str, published: str) -> Any:  # a ConfigDict
    """Returns the recipe of `variant`; initial weights come from the Kinetics recipe `kinetics`."""
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


# By name: the variant, the Kinetics recipe of the initial weights, and the published mAP.
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
        raise ValueError(
            f"configs/charades.py has no experiment {arg!r}: choose one of {', '.join(RECIPES)}"
        )
    return RECIPES[arg]()
