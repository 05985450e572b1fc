r"""Custom data: fine-tuning on videos or images, in one folder per class.

    python -m mvit_jax.prepare lists --out=DIR
    python -m mvit_jax.train --config=configs/custom.py:WEIGHTS --config.data.folder=DIR \
        --workdir=runs/mine
    python -m mvit_jax.evaluate --workdir=runs/mine

DIR holds one folder of files per class. The first command writes train, validation and test lists
and labels.txt into DIR. WEIGHTS is a workdir, or a folder of released weights converted by
`python -m mvit_jax.convert`. Architecture and preprocessing (frame sampling, scaling, mean and
standard deviation) are those of the weights. With the name of a variant, like mvitv2_s_16x4,
instead of WEIGHTS, the model trains from scratch, which takes many more videos and epochs.

The recipe is not from a paper. It follows MaskFeat's fine-tuning on Kinetics (Wei et al. 2022), but
with a small batch. Layer decay makes layers near the input change slowly. Mixup, cutmix and
RandAugment reduce overfitting to a small data set. If classes are directions (left and right), a
flip turns one into another, and a mixture of two is neither. Then set, as in
configs/moving_digits.py:
--config.augment.flip=0 --config.augment.mixup=0 --config.augment.cutmix=0.
"""

from typing import Any

from mvit_jax import config
from mvit_jax.common.files import expanded
from mvit_jax.models.variants import VARIANTS, nearest, preprocessing
from mvit_jax.training.run import workdir

_FROM_WEIGHTS = ("stride", "short_side", "sampling", "mean", "std", "interpolation")


def get_config(name: str = "mvitv2_s_16x4") -> Any:  # a ConfigDict
    c = config.base()
    c.epochs = 30.0
    c.batch = 16
    if name in VARIANTS:
        expected = preprocessing(name)
        c.model.variant = name
        c.data.update(stride=expected.stride, short_side=expected.short_side)
        c.data.update(mean=expected.mean, std=expected.std, interpolation=expected.interpolation)
    elif not (expanded(name) / "config.json").is_file():
        raise ValueError(
            "configs/custom.py needs a workdir, a folder written by `convert`, or the name of a "
            f"variant, not {name!r}{nearest(name, VARIANTS)}"
        )
    else:
        trained = workdir.recorded_config(name)
        c.init.checkpoint = name
        c.model.update(trained.model.to_dict())
        c.data.update({key: trained.data[key] for key in _FROM_WEIGHTS})
    image = (c.model.frames or VARIANTS[c.model.variant].frames) == 1

    if not image:  # RandAugment processes whole frames: scale large ones first
        c.augment.short_side = c.data.short_side
    c.augment.randaugment = f"rand-m7-n{2 if image else 4}-mstd0.5-inc1"
    c.augment.random_erase_prob = 0.25
    c.eval.clips = 1 if image else 5
    c.eval.every_epochs = 1.0

    c.optim.update(lr_batch=16, lr=2e-4, start_lr=2e-6, end_lr=2e-6, warmup_epochs=3.0)
    c.optim.layer_decay = 0.75
    c.optim.ema_warmup = True  # if optim.ema is set
    return c
