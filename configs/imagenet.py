r"""ImageNet-1k and ImageNet-21k (MViT, Table 17; MViTv2, Tables 2 and 3).

    python -m mvit_jax.train --config=configs/imagenet.py:mvitv2_s --workdir=runs/mvitv2_s \
        --config.data.folder=DIR
    python -m mvit_jax.evaluate --workdir=runs/mvitv2_s

The argument after the colon is VARIANT[_max][_384|_512][_in21k|_from_21k]. `_in21k` trains on
ImageNet-21k; `_from_21k` fine-tunes the resulting weights on ImageNet-1k. `--dry_run` prints the
plan with the published result.

DIR is the `data_dir` of TensorFlow Datasets, which prepares imagenet2012:5.1.0 from the official
tars. Append `,folders` to read images from DIR/train/CLASS/FILE and DIR/val/CLASS/FILE, as in
`configs/imagenet.py:mvitv2_s,folders`. ImageNet-21k is always read from folders.

Recipes with initial weights require `--config.init.checkpoint=RUN`. RUN is a workdir or a folder
written by `python -m mvit_jax.convert`, with the weights of another recipe:

    recipe           initial weights
    _384             of the same name without _384
    _512_from_21k    of _384_from_21k
    other _from_21k  of _in21k

Results are for a centre crop of 224 out of 256 pixels (size / 0.875). With
`--config.eval.whole_image=True` the whole image is resized to the crop size without keeping its
aspect ratio, as in the papers' column "resize". Results of that column are marked "resized".

Batch sizes are totals over all devices. Learning rates scale with the batch size
(`optim.lr_batch`). The reference code states learning rates for a node of 256 images: 1e-8 at the
start, 2.5e-4 after warm-up, 1e-6 at the end. MViT uses batches of 4096 (16 nodes), MViTv2 of 2048.

Assumptions where papers and released code differ or are silent:

* MViT's paper trains 100 epochs with 3 repeats. Its released config, used here, trains 300 epochs
  without repeats, with 70 epochs of warm-up and gradients clipped to a norm of 1. Both have a
  learning rate of 9.8e-7 per image of the batch.
* RandAugment applies 4 operations for models with max pooling and 6 for models with convolutions,
  as in the paper. The released config for max pooling has 5 and does not clip gradients. Here all
  recipes clip gradients.
* MViT's larger models are trained like mvit_b16, with a drop path rate of 0.3. mvit_b24 with
  convolutions is only in MViTv2's Table 2.
* The drop path rate of mvitv2_b is 0.3; the released config intends 0.3 but is broken there.
* mvitv2_l trained on ImageNet-1k increases the width in the MLP. This matches the released weights
  and the paper's 218 M parameters; the paper's 42.1 G multiply-adds are those of an increase in the
  attention. The weight decay is 0.1; smaller models have 0.05 (B.2).
* mvitv2_l on and from ImageNet-21k increases the width in the attention, like the released weights.
* MViTv2's image models have no class token in the paper. The released ImageNet-21k weights have
  one, and so do the models on and from ImageNet-21k here.
* Fine-tuning at 384 pixels after 224. B.2 states 30 epochs and a learning rate of 4e-5 for 256
  images; for L, 5e-4 for 64 images and no mixup. Assumed: batches of 256 (L: 64), no warm-up, a
  last learning rate of a hundredth of the first, and weight decay 1e-8, as stated for H at 512.
* Training on ImageNet-21k. B.2 states 90 epochs (H: 60), a learning rate of 6.75e-5 for 256 images
  (L and H: 1e-4), and weight decay 0.01 (L and H: 0.1). Assumed: batches of 2048, warm-up for 15 %
  of the epochs, and first and last learning rates of 1e-8 and 1e-6 per node, as on ImageNet-1k. The
  data set is the release of winter 2021 joined with ImageNet-1k: 19,168 classes, about 13 million
  images. No accuracy on this data set was published.
* Fine-tuning from ImageNet-21k at 224 and 384 pixels. B.2 states 30 epochs, a learning rate of 7e-5
  for 64 images, weight decay 0.05 and no mixup. Assumed: warm-up for 15 % of the epochs, and first
  and last learning rates of a hundredth of the highest.
* Fine-tuning of H at 512 pixels. B.2 states 3 epochs, mixup and weight decay 1e-8. Assumed: the
  learning rate of 384 pixels, and no warm-up.
* Recipes without mixup still have label smoothing and random erasing.
* Reversible models (Rev-ViT, Rev-MViT) are not implemented.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from mvit_jax import config
from mvit_jax.models.variants import preprocessing


def mvit(c: Any) -> None:
    c.epochs = 300.0
    c.batch = 4096
    c.optim.lr_batch = 4096
    c.optim.lr = 4e-3
    c.optim.start_lr = 1.6e-7
    c.optim.end_lr = 1.6e-5
    c.optim.warmup_epochs = 70.0
    c.optim.weight_decay = 0.05
    c.augment.mixup = 0.8
    c.augment.cutmix = 1.0
    c.augment.mixup_group_size = 32  # images per GPU in the papers
    c.eval.every_epochs = 10.0


def mvitv2(c: Any) -> None:
    mvit(c)
    c.batch = 2048
    c.optim.lr_batch = 2048
    c.optim.lr = 2e-3
    c.optim.start_lr = 8e-8
    c.optim.end_lr = 8e-6


def mvitv2_large(c: Any) -> None:
    mvitv2(c)
    c.optim.weight_decay = 0.1


def at_384(c: Any) -> None:
    c.epochs = 30.0
    c.batch = 256
    c.optim.lr_batch = 256
    c.optim.lr = 4e-5
    c.optim.start_lr = 4e-7
    c.optim.end_lr = 4e-7
    c.optim.warmup_epochs = 0.0
    c.optim.weight_decay = 1e-8
    c.augment.mixup_group_size = 8
    c.eval.every_epochs = 10.0


def at_384_large(c: Any) -> None:
    at_384(c)
    c.batch = 64
    c.optim.lr_batch = 64
    c.optim.lr = 5e-4
    c.optim.start_lr = 5e-6
    c.optim.end_lr = 5e-6
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0


def on_21k(c: Any) -> None:
    folders(c)
    c.data.train_videos = 13_150_000
    c.data.classes = 19_168
    c.epochs = 90.0
    c.batch = 2048
    c.optim.lr_batch = 256
    c.optim.lr = 6.75e-5
    c.optim.start_lr = 1e-8
    c.optim.end_lr = 1e-6
    c.optim.warmup_epochs = 13.5
    c.optim.weight_decay = 0.01
    c.augment.mixup_group_size = 32
    c.eval.every_epochs = 10.0


def on_21k_large(c: Any) -> None:
    on_21k(c)
    c.optim.lr = 1e-4
    c.optim.weight_decay = 0.1


def on_21k_huge(c: Any) -> None:
    on_21k_large(c)
    c.epochs = 60.0
    c.optim.warmup_epochs = 9.0


def from_21k(c: Any) -> None:
    c.epochs = 30.0
    c.batch = 64
    c.optim.lr_batch = 64
    c.optim.lr = 7e-5
    c.optim.start_lr = 7e-7
    c.optim.end_lr = 7e-7
    c.optim.warmup_epochs = 4.5
    c.optim.weight_decay = 0.05
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.mixup_group_size = 8
    c.eval.every_epochs = 10.0


def at_512(c: Any) -> None:
    from_21k(c)
    c.epochs = 3.0
    c.optim.warmup_epochs = 0.0
    c.optim.weight_decay = 1e-8
    c.augment.mixup = 0.8
    c.augment.cutmix = 1.0
    c.eval.every_epochs = 1.0


def folders(c: Any) -> None:
    """Reads images from one folder per class instead of TensorFlow Datasets."""
    c.data.tfds = None
    c.data.source = "folders"
    c.data.train_list = "train"
    c.data.val_list = "val"
    c.data.test_list = "val"


def recipe(
    variant: str,
    train: Callable[[Any], None],
    published: str,
    *,
    needed: str | None = None,
    size: int | None = None,
    max_pooling: bool = False,
) -> Any:  # a ConfigDict
    """Returns the recipe of `variant`; `train` sets the schedule, `size` replaces the crop size."""
    c = config.base()
    c.published = published
    c.init.needed = needed
    c.model.variant = variant
    c.model.size = size
    c.model.pool_mode = "max" if max_pooling else None
    expected = preprocessing(variant) if size is None else preprocessing(variant, size=size)
    c.data.tfds = "imagenet2012:5.1.0"
    c.data.train_list = "train"
    c.data.val_list = "validation"
    c.data.test_list = "validation"
    c.data.train_videos = 1_281_167
    c.data.classes = 1000
    c.data.stride = 1
    c.data.short_side = expected.short_side
    c.data.interpolation = expected.interpolation
    c.data.mean = expected.mean
    c.data.std = expected.std
    c.augment.randaugment = f"rand-m9-n{4 if max_pooling else 6}-mstd0.5-inc1"
    c.augment.random_erase_prob = 0.25
    c.checkpoint.every = 1000
    c.eval.clips = 1
    c.eval.batch = 256
    train(c)
    return c


# By name: the variant, the schedule, and the published top-1 of a centre crop.
RECIPES = {
    "mvit_b16": partial(recipe, "mvit_b16", mvit,
        "83.0 (MViT, Table 17; 82.9 / 96.3 in PySlowFast's zoo)"),
    "mvit_b16_max": partial(recipe, "mvit_b16", mvit, "82.5 (MViT, Table 17)", max_pooling=True),
    "mvit_b24": partial(recipe, "mvit_b24", mvit, "83.4 (MViTv2, Table 2)"),
    "mvit_b24_max": partial(recipe, "mvit_b24", mvit, "83.1 (MViT, Table 17)", max_pooling=True),
    "mvit_b24_wide_320": partial(recipe, "mvit_b24_wide_320", mvit, "84.8 (MViT, Table 17)"),
    "mvit_b24_wide_320_max": partial(recipe, "mvit_b24_wide_320", mvit, "84.3 (MViT, Table 17)",
        max_pooling=True),
    "mvitv2_t": partial(recipe, "mvitv2_t", mvitv2, "82.3 (MViTv2, Table 2)"),
    "mvitv2_s": partial(recipe, "mvitv2_s", mvitv2, "83.6 (MViTv2, Table 2)"),
    "mvitv2_b": partial(recipe, "mvitv2_b", mvitv2, "84.4 (MViTv2, Table 2)"),
    "mvitv2_l": partial(recipe, "mvitv2_l", mvitv2_large, "85.3 (MViTv2, Table 2)"),
    "mvitv2_b_384": partial(recipe, "mvitv2_b_384", at_384,
        "85.2 (85.6 resized; MViTv2, Table 2)",
        needed="weights of mvitv2_b trained on ImageNet-1k"),
    "mvitv2_l_384": partial(recipe, "mvitv2_l_384", at_384_large,
        "86.0 (86.3 resized; MViTv2, Table 2)",
        needed="weights of mvitv2_l trained on ImageNet-1k"),
    "mvitv2_s_in21k": partial(recipe, "mvitv2_s_in21k", on_21k, "weights only, no accuracy"),
    "mvitv2_b_in21k": partial(recipe, "mvitv2_b_in21k", on_21k, "weights only, no accuracy"),
    "mvitv2_l_in21k": partial(recipe, "mvitv2_l_in21k", on_21k_large, "weights only, no accuracy"),
    "mvitv2_h_in21k": partial(recipe, "mvitv2_h_in21k", on_21k_huge, "weights only, no accuracy"),
    # These have the architectures of the ImageNet-21k models, with a class token.
    "mvitv2_l_from_21k": partial(recipe, "mvitv2_l_in21k", from_21k, "87.5 (MViTv2, Table 3)",
        needed="weights of mvitv2_l_in21k trained on ImageNet-21k"),
    "mvitv2_h_from_21k": partial(recipe, "mvitv2_h_in21k", from_21k, "88.0 (MViTv2, Table 3)",
        needed="weights of mvitv2_h_in21k trained on ImageNet-21k"),
    "mvitv2_l_384_from_21k": partial(recipe, "mvitv2_l_in21k", from_21k,
        "88.2 (88.4 resized; MViTv2, Table 3)",
        needed="weights of mvitv2_l_in21k trained on ImageNet-21k", size=384),
    "mvitv2_h_384_from_21k": partial(recipe, "mvitv2_h_in21k", from_21k,
        "88.3 (88.6 resized; MViTv2, Table 3)",
        needed="weights of mvitv2_h_in21k trained on ImageNet-21k", size=384),
    "mvitv2_h_512_from_21k": partial(recipe, "mvitv2_h_in21k", at_512,
        "88.3 (88.8 resized; MViTv2, Table 3)",
        needed="weights of mvitv2_h_384_from_21k trained on ImageNet-1k", size=512),
}  # fmt: skip


def get_config(arg: str = "mvitv2_s") -> Any:  # a ConfigDict
    name, comma, source = arg.partition(",")
    if name not in RECIPES or (comma and source != "folders"):
        raise ValueError(
            f"configs/imagenet.py has no experiment {arg!r}: choose one of {', '.join(RECIPES)}"
        )
    c = RECIPES[name]()
    if comma:
        folders(c)
    return c
