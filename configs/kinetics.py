r"""Kinetics-400, 600 and 700 (MViT, Tables 4 and 5; MViTv2, Tables 10 to 12 and 14; MaskFeat).

    python -m mvit_jax.train --config=configs/kinetics.py:mvit_b_16x4 --workdir=runs/mvit_b_16x4 \
        --config.data.folder=DIR
    python -m mvit_jax.evaluate --workdir=runs/mvit_b_16x4

The argument after the colon is [k600_|k700_]VARIANT[_max][_in1k|_in21k]. Without a prefix the data
set is Kinetics-400. `--dry_run` prints the plan with the published result. DIR holds `train.csv`,
`val.csv` and `test.csv` (lines "path label") and `labels.txt`. Public copies lack some videos, and
the papers' lists of videos are not published. Copies of the validation set of Kinetics-400 have
19,761 to 19,881 videos, which changes top-1 by up to 0.7.

Recipes with initial weights require `--config.init.checkpoint=RUN`. RUN is a workdir or a folder
written by `python -m mvit_jax.convert`, with these weights:

    long models (64x3, 40x3, 32x3_312)  mvit_b_32x3 or mvitv2_l_16x4[_in1k|_in21k], trained on the
                                        same data set
    _in1k, _in21k                       configs/imagenet.py:mvitv2_s or :mvitv2_s_in21k, and so on.
                                        For mvitv2_l_16x4_in1k train mvitv2_l with
                                        --config.model.expand=attention: the released weights
                                        increase the width in the MLP and fit no video model
    maskfeat_...                        weights pretrained by MaskFeat, which this project converts
                                        but does not train

Batch sizes count clips: 256 videos x 2 repeats = 512. Learning rates scale with the batch size
(`optim.lr_batch`). The reference code states learning rates for a node of 32 clips; the papers'
128 GPUs are 16 nodes.

Assumptions where papers and released code differ or are silent:

* Fine-tuning from image weights has a warm-up of 15 % of the epochs, as training from scratch has.
  Fine-tuning of long models has none. First and last learning rates are a hundredth of the highest,
  as from scratch.
* 64x3 is trained for 5 epochs (MViT, 4.1). Its learning rate and batch size are not stated; here
  they are those of MViTv2's long models.
* MViTv2's long models follow B.4: 30 epochs, a learning rate of 1.6e-5 for 128 clips, weight decay
  1e-8, no mixup. One repeat, as in the released test config, and label smoothing are assumed. Their
  initial weights (mvitv2_l_16x4...) have no published result. No training config of MViTv2-L was
  released.
* MViTv2-L from ImageNet-1k is trained for 100 epochs with a learning rate of 4.8e-4, as is stated
  for S and B.
* Image weights are inflated into the centre frame (MViTv2, 4.3). The released code copies the
  kernel to every frame without dividing, like `--config.init.inflate=repeat`.
* mvit_b_32x3 has 16 blocks, as in the paper, and a drop path rate of 0.2. The released config of
  that name has 24 blocks and sets no pooling kernels. Their default is stride + 1 (for keys: 1x9x9,
  1x5x5, 1x3x3). That model is mvit_b24_32x3 on Kinetics-400 here, with a drop path rate of 0.3. On
  Kinetics-600 there is no released config, and mvit_b24_32x3 has pooling kernels 3x3x3.
* vit_b_8x8_in21k has MViTv2's recipe from ImageNet-21k. MViT does not state the recipe of its ViT,
  only a top-1 of 34.3 for the same recipe from scratch.
* mvit_s was never released; see `python -m mvit_jax.describe mvit_s_16x4`.
* mvitv2_b_32x3 on Kinetics-600 and 700 is published with 206 G multiply-adds; it has 225 G here.
* MViTv2-L has 213 M parameters here, as in the published configs. The papers' 217.6 M are those of
  a model that increases the width in the MLP. MViTv2-L normalises pixels by ImageNet's mean and
  standard deviation, all other models by 0.45 and 0.225.
* The short side of training frames is not always stated. It is 256 pixels here, size / 0.875 for
  crops above 224 pixels, and 320 for MaskFeat.
* For a single centre crop of 224 pixels the short side is scaled to 256, as in the papers; for 312
  to 356. For 3 crops it is scaled to the crop size, as in the reference code; the papers state 256.
* MViT 16x4 and 32x3 are tested with 5 clips x 1 crop, as in the paper; the released configs have
  10 x 1. For MViTv2's Table 14, clips and crops are not stated. They are 5 x 1 here, but 5 x 3
  for the model that is also in Table 10 (86.1; Table 14 has 85.7).
* MaskFeat-S follows its released config: 100 epochs, 20 of them warm-up (in the paper 200 and 5).
  The config also divides the classifier's initial weights by 1000, for which there is no key here.
  The config of MaskFeat-L has one repeat.
* PyTorchVideo's trainer reaches 78.85 / 93.85 (16x4) and 80.30 / 94.69 (32x3) with this recipe.
* Reversible models (Rev-MViT) are not implemented.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from mvit_jax import config
from mvit_jax.models.variants import preprocessing

# Numbers of videos at the time of the papers. Since then, videos have disappeared from the web.
KINETICS_400 = {"train_videos": 240_436, "classes": 400}
KINETICS_600 = {"train_videos": 366_000, "classes": 600}
KINETICS_700 = {"train_videos": 535_000, "classes": 700}


def from_scratch(c: Any) -> None:
    c.epochs = 200.0
    c.batch = 512
    c.data.repeats = 2
    c.optim.lr_batch = 512
    c.optim.lr = 1.6e-3
    c.optim.start_lr = 1.6e-5
    c.optim.end_lr = 1.6e-5
    c.optim.warmup_epochs = 30.0
    c.optim.weight_decay = 0.05
    c.optim.clip_norm = 1.0
    c.augment.randaugment = "rand-m7-n4-mstd0.5-inc1"
    c.augment.mixup = 0.8
    c.augment.cutmix = 1.0
    c.augment.mixup_group_size = 4  # clips per GPU in the papers
    c.eval.every_epochs = 10.0


def from_imagenet_1k(c: Any) -> None:
    from_scratch(c)
    c.init.inflate = "centre"
    c.epochs = 100.0
    c.optim.lr = 4.8e-4
    c.optim.start_lr = 4.8e-6
    c.optim.end_lr = 4.8e-6
    c.optim.warmup_epochs = 15.0


def from_imagenet_21k(c: Any) -> None:
    from_scratch(c)
    c.init.inflate = "centre"
    c.epochs = 75.0
    c.optim.lr = 1.6e-4
    c.optim.start_lr = 1.6e-6
    c.optim.end_lr = 1.6e-6
    c.optim.warmup_epochs = 11.25


def from_shorter_clips(c: Any) -> None:
    """Sets the training recipe of MViT-B 64x3."""
    from_scratch(c)
    c.epochs = 5.0
    c.batch = 128
    c.optim.lr_batch = 128
    c.optim.lr = 1.6e-5
    c.optim.start_lr = 1.6e-7
    c.optim.end_lr = 1.6e-7
    c.optim.warmup_epochs = 0.0
    c.eval.every_epochs = 1.0


def from_shorter_clips_v2(c: Any) -> None:
    """Sets the training recipe of MViTv2-L with 32 or 40 frames."""
    from_shorter_clips(c)
    c.epochs = 30.0
    c.data.repeats = 1
    c.optim.weight_decay = 1e-8
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.eval.every_epochs = 6.0


def from_maskfeat_s(c: Any) -> None:
    from_scratch(c)
    c.epochs = 100.0
    c.optim.lr = 9.6e-3  # 6e-4 for a node of 32 clips
    c.optim.warmup_epochs = 20.0
    c.optim.layer_decay = 0.75
    c.optim.clip_norm = 5.0
    c.augment.short_side = 320
    c.augment.randaugment = "rand-m7-n2-mstd0.5-inc1"


def from_maskfeat_l(c: Any) -> None:
    from_maskfeat_s(c)
    c.epochs = 75.0
    c.batch = 256
    c.data.repeats = 1
    c.optim.lr_batch = 256
    c.optim.lr = 9.6e-3  # 6e-4 for a node of 16 clips
    c.optim.start_lr = 1.6e-7
    c.optim.end_lr = 1.6e-4
    c.optim.warmup_epochs = 5.0
    c.optim.layer_decay = 0.875
    c.augment.mixup_group_size = 2


def recipe(
    variant: str,
    train: Callable[[Any], None],
    published: str,
    *,
    needed: str | None = None,
    data: dict[str, int] = KINETICS_400,
    clips: int = 5,
    crops: int = 1,
    model: dict[str, Any] | None = None,
) -> Any:  # a ConfigDict
    """Returns the recipe of `variant`; `train` sets the schedule, `model` architecture fields."""
    c = config.base()
    c.published = published
    c.init.needed = needed
    c.model.variant = variant
    c.model.update(model or {})
    expected = preprocessing(variant)
    c.data.update(data)
    c.data.stride = expected.stride
    c.data.short_side = expected.short_side
    c.data.interpolation = expected.interpolation
    c.data.mean = expected.mean
    c.data.std = expected.std
    c.augment.short_side = expected.short_side
    c.augment.random_erase_prob = 0.25
    c.checkpoint.every = 1000
    c.eval.clips = clips
    c.eval.crops = crops
    train(c)
    return c


UNPUBLISHED = "no result (the run trains initial weights for the long models)"
# By name: the variant, the schedule, and the published top-1 / top-5.
RECIPES = {
    "vit_b_8x8": partial(recipe, "vit_b_8x8", from_scratch, "68.5 / 86.9 (MViT, Table 4)"),
    "vit_b_8x8_in21k": partial(recipe, "vit_b_8x8", from_imagenet_21k,
        "79.3 / 93.9 (MViT, Table 4)", needed="weights of vit_b16 trained on ImageNet-21k"),
    "mvit_s_16x4": partial(recipe, "mvit_s_16x4", from_scratch, "76.0 / 92.1 (MViT, Table 4)"),
    "mvit_s_16x4_max": partial(recipe, "mvit_s_16x4", from_scratch, "74.3 (MViT, Table 16)",
        model={"pool_mode": "max"}),
    "mvit_b_16x4": partial(recipe, "mvit_b_16x4", from_scratch, "78.4 / 93.5 (MViT, Table 4)"),
    "mvit_b_16x4_max": partial(recipe, "mvit_b_16x4", from_scratch, "77.2 (MViT, Table 16)",
        model={"pool_mode": "max"}),
    "mvit_b_32x3": partial(recipe, "mvit_b_32x3", from_scratch, "80.2 / 94.4 (MViT, Table 4)"),
    "mvit_b_64x3": partial(recipe, "mvit_b_64x3", from_shorter_clips, "81.2 / 95.1 (MViT, Table 4)",
        needed="weights of mvit_b_32x3 trained on Kinetics-400", clips=3, crops=3),
    "mvit_b24_32x3": partial(recipe, "mvit_b24_32x3", from_scratch,
        "80.4 / 94.8 (PySlowFast's zoo)", model={"pool_kernel": "stride + 1"}),
    "mvitv2_s_16x4": partial(recipe, "mvitv2_s_16x4", from_scratch,
        "81.0 / 94.6 (MViTv2, Table 10; 81.2 in Table 14)"),
    "mvitv2_s_16x4_in1k": partial(recipe, "mvitv2_s_16x4", from_imagenet_1k,
        "82.2 (MViTv2, Table 14)", needed="weights of mvitv2_s trained on ImageNet-1k"),
    "mvitv2_s_16x4_in21k": partial(recipe, "mvitv2_s_16x4", from_imagenet_21k,
        "82.6 (MViTv2, Table 14)", needed="weights of mvitv2_s trained on ImageNet-21k"),
    "mvitv2_b_32x3": partial(recipe, "mvitv2_b_32x3", from_scratch,
        "82.9 / 95.7 (MViTv2, Table 10)"),
    "mvitv2_b_32x3_in1k": partial(recipe, "mvitv2_b_32x3", from_imagenet_1k,
        "83.3 (MViTv2, Table 14)", needed="weights of mvitv2_b trained on ImageNet-1k"),
    "mvitv2_b_32x3_in21k": partial(recipe, "mvitv2_b_32x3", from_imagenet_21k,
        "84.3 (MViTv2, Table 14)", needed="weights of mvitv2_b trained on ImageNet-21k"),
    "mvitv2_l_16x4": partial(recipe, "mvitv2_l_16x4", from_scratch, UNPUBLISHED),
    "mvitv2_l_16x4_in1k": partial(recipe, "mvitv2_l_16x4", from_imagenet_1k, UNPUBLISHED,
        needed="weights of mvitv2_l trained on ImageNet-1k with model.expand=attention"),
    "mvitv2_l_16x4_in21k": partial(recipe, "mvitv2_l_16x4", from_imagenet_21k, UNPUBLISHED,
        needed="weights of mvitv2_l trained on ImageNet-21k"),
    "mvitv2_l_40x3": partial(recipe, "mvitv2_l_40x3", from_shorter_clips_v2,
        "81.4 (MViTv2, Table 14)", needed="weights of mvitv2_l_16x4 trained on Kinetics-400"),
    "mvitv2_l_40x3_in1k": partial(recipe, "mvitv2_l_40x3", from_shorter_clips_v2,
        "83.4 (MViTv2, Table 14)", needed="weights of mvitv2_l_16x4_in1k trained on Kinetics-400"),
    "mvitv2_l_40x3_in21k": partial(recipe, "mvitv2_l_40x3", from_shorter_clips_v2,
        "84.5 (MViTv2, Table 14)", needed="weights of mvitv2_l_16x4_in21k trained on Kinetics-400"),
    "mvitv2_l_40x3_312": partial(recipe, "mvitv2_l_40x3_312", from_shorter_clips_v2,
        "81.8 (MViTv2, Table 14)", needed="weights of mvitv2_l_16x4 trained on Kinetics-400"),
    "mvitv2_l_40x3_312_in1k": partial(recipe, "mvitv2_l_40x3_312", from_shorter_clips_v2,
        "84.4 (MViTv2, Table 14)", needed="weights of mvitv2_l_16x4_in1k trained on Kinetics-400"),
    "mvitv2_l_40x3_312_in21k": partial(recipe, "mvitv2_l_40x3_312", from_shorter_clips_v2,
        "86.1 / 97.0 (MViTv2, Table 10; 85.7 in Table 14)",
        needed="weights of mvitv2_l_16x4_in21k trained on Kinetics-400", crops=3),
    "maskfeat_s_16x4": partial(recipe, "maskfeat_s_16x4", from_maskfeat_s,
        "82.2 (MaskFeat, PySlowFast's zoo)",
        needed="weights of maskfeat_s_16x4 that MaskFeat pretrained on Kinetics-400", clips=10),
    "maskfeat_l_16x4": partial(recipe, "maskfeat_l_16x4", from_maskfeat_l,
        "84.3 (MaskFeat, PySlowFast's zoo)",
        needed="weights of maskfeat_l_16x4 that MaskFeat pretrained on Kinetics-400", clips=10),
    "k600_mvit_b_16x4": partial(recipe, "mvit_b_16x4", from_scratch, "82.1 / 95.7 (MViT, Table 5)",
        data=KINETICS_600),
    "k600_mvit_b_32x3": partial(recipe, "mvit_b_32x3", from_scratch, "83.4 / 96.3 (MViT, Table 5)",
        data=KINETICS_600),
    "k600_mvit_b24_32x3": partial(recipe, "mvit_b24_32x3", from_scratch,
        "83.8 / 96.3 (MViT, Table 5; 84.1 / 96.5 in MViTv2, Table 11)", data=KINETICS_600),
    "k600_mvitv2_b_32x3": partial(recipe, "mvitv2_b_32x3", from_scratch,
        "85.5 / 97.2 (MViTv2, Table 11)", data=KINETICS_600),
    "k600_mvitv2_l_16x4_in21k": partial(recipe, "mvitv2_l_16x4", from_imagenet_21k, UNPUBLISHED,
        data=KINETICS_600, needed="weights of mvitv2_l trained on ImageNet-21k"),
    "k600_mvitv2_l_32x3_312_in21k": partial(recipe, "mvitv2_l_32x3_312", from_shorter_clips_v2,
        "87.2 / 97.6 (MViTv2, Table 11)", data=KINETICS_600,
        needed="weights of mvitv2_l_16x4_in21k trained on Kinetics-600", clips=4, crops=3),
    "k600_mvitv2_l_40x3_312_in21k": partial(recipe, "mvitv2_l_40x3_312", from_shorter_clips_v2,
        "87.5 / 97.8 (MViTv2, Table 11)", data=KINETICS_600,
        needed="weights of mvitv2_l_16x4_in21k trained on Kinetics-600", clips=4, crops=3),
    "k600_mvitv2_l_40x3_352_in21k": partial(recipe, "mvitv2_l_40x3_352", from_shorter_clips_v2,
        "87.9 / 97.9 (MViTv2, Table 11)", data=KINETICS_600,
        needed="weights of mvitv2_l_16x4_in21k trained on Kinetics-600", clips=4, crops=3),
    "k700_mvitv2_b_32x3": partial(recipe, "mvitv2_b_32x3", from_scratch,
        "76.6 / 93.2 (MViTv2, Table 12)", data=KINETICS_700, clips=3, crops=3),
    "k700_mvitv2_l_16x4_in21k": partial(recipe, "mvitv2_l_16x4", from_imagenet_21k, UNPUBLISHED,
        data=KINETICS_700, needed="weights of mvitv2_l trained on ImageNet-21k", clips=3, crops=3),
    "k700_mvitv2_l_40x3_312_in21k": partial(recipe, "mvitv2_l_40x3_312", from_shorter_clips_v2,
        "79.4 / 94.9 (MViTv2, Table 12)", data=KINETICS_700,
        needed="weights of mvitv2_l_16x4_in21k trained on Kinetics-700", clips=3, crops=3),
}  # fmt: skip


def get_config(arg: str = "mvit_b_16x4") -> Any:  # a ConfigDict
    name = arg.removeprefix("k400_")
    if name not in RECIPES:
        raise ValueError(
            f"configs/kinetics.py has no experiment {arg!r}: choose one of {', '.join(RECIPES)}"
        )
    return RECIPES[name]()
