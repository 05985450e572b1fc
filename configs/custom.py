"""Your own videos or images: fine-tuning a model on a folder per class.

    python -m mvit_jax.prepare lists --out=DIR
    python -m mvit_jax.train --config=configs/custom.py:WEIGHTS --config.data.folder=DIR \\
        --workdir=runs/mine
    python -m mvit_jax.evaluate --workdir=runs/mine

DIR holds a folder of files for each class; the first line writes the lists and labels.txt into it.
WEIGHTS is the folder of a run, or what `python -m mvit_jax.convert` made of others' weights:
architecture, frames, scaling, mean and deviation are those of the weights. The name of a variant in
its place, like mvitv2_s_16x4, starts from nothing, which takes many more videos and epochs.

No paper has this recipe. It is that of fine-tuning a masked model on Kinetics (layer decay;
MaskFeat, Wei et al. 2022) with a small batch: what the weights know changes slowly near the input,
and mixing and RandAugment keep a small set from being learned by heart. A class that a mirror turns
into another one (left and right) needs --config.augment.flip=0 and no mixing (mixup=0, cutmix=0).
"""

from pathlib import Path
from typing import Any

from mvit_jax import config
from mvit_jax.models.variants import VARIANTS, nearest, preprocessing
from mvit_jax.training.run import workdir

_OF_WEIGHTS = ("stride", "short_side", "sampling", "mean", "std", "interpolation")


def get_config(name: str = "mvitv2_s_16x4") -> Any:  # a ConfigDict
    c = config.base()
    c.epochs = 30.0
    c.batch = 16
    if name in VARIANTS:
        expected = preprocessing(name)
        c.model.variant = name
        c.data.update(stride=expected.stride, short_side=expected.short_side)
        c.data.update(mean=expected.mean, std=expected.std, interpolation=expected.interpolation)
    elif not (Path(name) / "config.json").is_file():
        raise ValueError(
            "configs/custom.py takes a folder that training or `convert` made, or the name of a "
            f"variant, and {name!r} is none of them{nearest(name, VARIANTS)}"
        )
    else:
        trained = workdir.frozen(name)
        c.init.checkpoint = name
        c.model.update(trained.model.to_dict())
        c.data.update({key: trained.data[key] for key in _OF_WEIGHTS})
    image = (c.model.frames or VARIANTS[c.model.variant].frames) == 1

    if not image:  # RandAugment works on whole frames, which may be large
        c.augment.short_side = c.data.short_side
    c.augment.randaugment = f"rand-m7-n{2 if image else 4}-mstd0.5-inc1"
    c.augment.random_erase_prob = 0.25
    c.eval.clips = 1 if image else 5
    c.eval.every_epochs = 1.0

    c.optim.update(lr_batch=16, lr=2e-4, start_lr=2e-6, end_lr=2e-6, warmup_epochs=3.0)
    c.optim.layer_decay = 0.75
    return c
