"""Your own videos or images: fine-tuning any model on a folder per class.

    python -m mvit_jax.prepare lists --out=DIR
    python -m mvit_jax.train --config=configs/custom.py:mvitv2_s_16x4 --config.data.folder=DIR \\
        --config.init.checkpoint=WEIGHTS --workdir=runs/mine
    python -m mvit_jax.evaluate --workdir=runs/mine

DIR holds a folder of files for each class; the first line writes the lists and labels.txt into it.
WEIGHTS is the folder of a run, or what `python -m mvit_jax.convert` made of others' weights. The
variant after the colon is that of the weights; frames, scaling, mean and deviation follow from it.
Without WEIGHTS the model starts from nothing, which takes many more videos and epochs.

No paper has this recipe. It is that of fine-tuning a masked model on Kinetics (layer decay;
MaskFeat, Wei et al. 2022) with a small batch: what the weights know changes slowly near the input,
and mixing and RandAugment keep a small set from being learned by heart. A class that a mirror turns
into another one (left and right) needs --config.augment.flip=0 and no mixing (mixup=0, cutmix=0).
"""

from typing import Any

from mvit_jax.models.variants import preprocessing, variant
from mvit_jax.training.experiment import read_config


def get_config(name: str = "mvitv2_s_16x4") -> Any:  # a ConfigDict
    c = read_config("base")
    c.epochs = 30.0
    c.batch = 16
    c.model.variant = name
    c.model.drop_path = variant(name).drop_path / 2

    expected = preprocessing(name)
    c.data.update(stride=expected.stride, short_side=expected.short_side)
    c.data.update(mean=expected.mean, std=expected.std, interpolation=expected.interpolation)
    image = expected.frames == 1
    c.augment.randaugment = f"rand-m7-n{2 if image else 4}-mstd0.5-inc1"
    c.augment.erase = 0.25
    c.eval.clips = 1 if image else 5

    c.optim.update(lr_batch=16, lr=2e-4, start_lr=2e-6, end_lr=2e-6, warmup_epochs=3.0)
    c.optim.layer_decay = 0.75
    c.eval.every_epochs = 1.0
    return c
