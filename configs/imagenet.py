"""ImageNet-1k and ImageNet-21k (MViT, Table 17; MViTv2, Tables 2 and 3).

    python -m mvit_jax.train --config=configs/imagenet.py:mvitv2_s --workdir=runs/mvitv2_s \\
        --config.data.folder=DIR
    python -m mvit_jax.evaluate --workdir=runs/mvitv2_s

The word after the colon is VARIANT[_max][_384|_512][_in21k|_from_21k]: `_in21k` trains on
ImageNet-21k, `_from_21k` fine-tunes from that on ImageNet-1k. `--dry_run` prints the plan, figure
included.

DIR is the `data_dir` of TensorFlow Datasets, which prepares imagenet2012:5.1.0 from the official
tars. Images in folders (DIR/train/CLASS/FILE, DIR/val/CLASS/FILE) are read with `,folders` after
the word, as in `configs/imagenet.py:mvitv2_s,folders`; those of ImageNet-21k always are.

What starts from weights needs `--config.init.checkpoint=RUN`, a run's folder or one of
`python -m mvit_jax.convert`: `_384` that of the same word without it, `_512_from_21k` that of
`_384_from_21k`, every other `_from_21k` that of `_in21k`.

Figures are of a centre crop of 224 out of 256 (size / 0.875); with `--config.eval.whole_image=True`
the whole image is squashed to the crop: the papers' column "resize", given here as (... resized).

Batches are global, and rates follow them (`optim.lr_batch`). The reference code states rates for a
node of 256 images: 2.5e-4, from 1e-8, to 1e-6. MViT has batches of 4096 (16 nodes), MViTv2 of 2048.

Assumed, where papers and released code say different things or nothing:

* MViT trains 100 epochs with 3 repeats, its released config 300 epochs without: the latter, with
  its 70 epochs of warm-up and clipping to 1. Both have 9.8e-7 an image as rate.
* RandAugment: MViT has 4 operations with max pooling and 6 with convolutions; the released config
  for max pooling, which clips no gradients, has 5. Here 4 and 6, and all are clipped.
* MViT's larger models are trained like mvit_b16, but for a drop path of 0.3. mvit_b24 with
  convolutions stands in MViTv2's Table 2 only.
* The released config of mvitv2_b is broken where it sets a drop path of 0.3; here it is 0.3.
* mvitv2_l: released weights and the paper's 218 M parameters grow in the MLP, the paper's 42.1 G
  multiply-adds in the attention. Here in the MLP; from ImageNet-21k in the attention, like the
  released weights. Its decay is 0.1, and 0.05 with the smaller ones (B.2).
* MViTv2's image models have no class token in the paper. The released weights of ImageNet-21k have
  one, and so have the models for it here and those that start from it.
* 384 pixels from 224 (B.2: 30 epochs, 4e-5 at 256 images; for L 5e-4 at 64 and no mixup): the batch
  is the one that the rate is stated for; no warm-up; decay 1e-8, as where it is stated (H at 512).
* ImageNet-21k (B.2: 90 epochs, 60 for H; 6.75e-5, for L and H 1e-4, at 256; decay 0.01, for L and H
  0.1): batches of 2048, 15 % of the epochs as warm-up, rates from 1e-8 to 1e-6 a node as on
  ImageNet-1k. It is winter 2021's, joined with ImageNet-1k: 19,168 classes, about 13 million
  images; no accuracy on it was published.
* From ImageNet-21k (B.2: 30 epochs, 7e-5 at 64, decay 0.05, no mixup), at 384 pixels as at 224:
  15 % of the epochs as warm-up, first and last rate a hundredth of the highest. H at 512 (3 epochs,
  mixup, decay 1e-8) has the same rate, which is not stated, and no warm-up.
* Label smoothing and random erasing stay where there is no mixup.
* Reversible models (Rev-ViT, Rev-MViT) are not built here.
"""

import re
from typing import Any, NamedTuple

from mvit_jax.models.variants import preprocessing
from mvit_jax.training.experiment import read_config


class _Schedule(NamedTuple):
    """A way to train: `lr` is meant for `lr_batch` images."""

    epochs: float
    warmup: float
    batch: int
    lr_batch: int
    lr: float
    start_lr: float
    end_lr: float
    decay: float = 0.05
    mix: bool = True
    group: int = 32  # images of one of the papers' GPUs, which share a mixing weight


_V2 = _Schedule(300.0, 70.0, 2048, 2048, 2e-3, 8e-8, 8e-6)
_21K = _Schedule(90.0, 13.5, 2048, 256, 6.75e-5, 1e-8, 1e-6, 0.01)
_21K_LARGE = _21K._replace(lr=1e-4, decay=0.1)
_FROM_21K = _Schedule(30.0, 4.5, 64, 64, 7e-5, 7e-7, 7e-7, mix=False, group=8)
_384 = _Schedule(30.0, 0.0, 256, 256, 4e-5, 4e-7, 4e-7, 1e-8, group=8)
_SCHEDULES = {
    "v1": _Schedule(300.0, 70.0, 4096, 4096, 4e-3, 1.6e-7, 1.6e-5),
    "v2": _V2,
    "v2 large": _V2._replace(decay=0.1),
    "384": _384,
    "384 large": _384._replace(
        batch=64, lr_batch=64, lr=5e-4, start_lr=5e-6, end_lr=5e-6, mix=False
    ),
    "21k": _21K,
    "21k large": _21K_LARGE,
    "21k huge": _21K_LARGE._replace(epochs=60.0, warmup=9.0),
    "from 21k": _FROM_21K,
    "512": _FROM_21K._replace(epochs=3.0, warmup=0.0, decay=1e-8, mix=True),
}

_NO_FIGURE = "weights alone"
# What can be trained: how, and what was published (top-1 of a centre crop).
_ROWS = {
    "mvit_b16": ("v1", "83.0 (MViT, Table 17; 82.9 / 96.3 in PySlowFast's zoo)"),
    "mvit_b16_max": ("v1", "82.5 (MViT, Table 17)"),
    "mvit_b24": ("v1", "83.4 (MViTv2, Table 2)"),
    "mvit_b24_max": ("v1", "83.1 (MViT, Table 17)"),
    "mvit_b24_wide_320": ("v1", "84.8 (MViT, Table 17)"),
    "mvit_b24_wide_320_max": ("v1", "84.3 (MViT, Table 17)"),
    "mvitv2_t": ("v2", "82.3 (MViTv2, Table 2)"),
    "mvitv2_s": ("v2", "83.6 (MViTv2, Table 2)"),
    "mvitv2_b": ("v2", "84.4 (MViTv2, Table 2)"),
    "mvitv2_l": ("v2 large", "85.3 (MViTv2, Table 2)"),
    "mvitv2_b_384": ("384", "85.2 (85.6 resized; MViTv2, Table 2)"),
    "mvitv2_l_384": ("384 large", "86.0 (86.3 resized; MViTv2, Table 2)"),
    "mvitv2_s_in21k": ("21k", _NO_FIGURE),
    "mvitv2_b_in21k": ("21k", _NO_FIGURE),
    "mvitv2_l_in21k": ("21k large", _NO_FIGURE),
    "mvitv2_h_in21k": ("21k huge", _NO_FIGURE),
    "mvitv2_l_from_21k": ("from 21k", "87.5 (MViTv2, Table 3)"),
    "mvitv2_h_from_21k": ("from 21k", "88.0 (MViTv2, Table 3)"),
    "mvitv2_l_384_from_21k": ("from 21k", "88.2 (88.4 resized; MViTv2, Table 3)"),
    "mvitv2_h_384_from_21k": ("from 21k", "88.3 (88.6 resized; MViTv2, Table 3)"),
    "mvitv2_h_512_from_21k": ("512", "88.3 (88.8 resized; MViTv2, Table 3)"),
}


def get_config(arg: str = "mvitv2_s") -> Any:  # a ConfigDict
    name, comma, source = arg.partition(",")
    if name not in _ROWS or (comma and source != "folders"):
        raise ValueError(f"configs/imagenet.py has {', '.join(_ROWS)}, not {arg!r}")
    kind, published = _ROWS[name]
    how = _SCHEDULES[kind]
    variant, size = name.removesuffix("_max"), None
    if name.endswith("_from_21k"):  # the networks of ImageNet-21k, with its class token
        variant = re.sub("(_384|_512)?_from_21k", "_in21k", name)
        pixels = re.search("_(384|512)_", name)
        size = int(pixels[1]) if pixels else None
    expected = preprocessing(variant, **({} if size is None else {"size": size}))

    c = read_config("base")
    c.published = published
    c.epochs, c.batch = how.epochs, how.batch
    c.init.needed = _needed(name)
    c.model.update(variant=variant, size=size)
    c.model.pool_mode = "max" if name.endswith("_max") else None
    if kind.startswith("21k"):
        c.data.update(train_videos=13_150_000, classes=19_168)
    else:
        c.data.update(train_videos=1_281_167, classes=1000)
    if comma or kind.startswith("21k"):
        c.data.update(source="folders", train_list="train", val_list="val", test_list="val")
    else:
        c.data.update(tfds="imagenet2012:5.1.0")
        c.data.update(train_list="train", val_list="validation", test_list="validation")
    c.data.update(stride=1, short_side=expected.short_side, interpolation=expected.interpolation)
    c.data.update(mean=expected.mean, std=expected.std)
    operations = 4 if name.endswith("_max") else 6
    c.augment.update(randaugment=f"rand-m9-n{operations}-mstd0.5-inc1", erase=0.25)
    c.augment.group = how.group
    if not how.mix:
        c.augment.update(mixup=0.0, cutmix=0.0)
    c.optim.update(lr=how.lr, start_lr=how.start_lr, end_lr=how.end_lr, lr_batch=how.lr_batch)
    c.optim.update(warmup_epochs=how.warmup, weight_decay=how.decay)
    c.eval.update(clips=1, batch=256, every_epochs=min(10.0, how.epochs / 3))
    c.checkpoint.every = 1000
    return c


def _needed(name: str) -> str | None:
    """The weights that a recipe starts from."""
    if name == "mvitv2_h_512_from_21k":
        return "weights of mvitv2_h_384_from_21k trained on ImageNet-1k"
    if name.endswith("_from_21k"):
        return f"weights of {name[:8]}_in21k trained on ImageNet-21k"
    if name.endswith("_384"):
        return f"weights of {name.removesuffix('_384')} trained on ImageNet-1k"
    return None
