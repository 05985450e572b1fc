"""Moving digits (default): videos of handwritten digits in eight motions; trains on a CPU.

    python -m mvit_jax.prepare moving_digits --out=data/moving_digits
    python -m mvit_jax.train --config=configs/moving_digits.py --workdir=runs/moving_digits
    python -m mvit_jax.train --config=configs/moving_digits.py:vit --workdir=runs/vit

`make train` runs the first two commands and evaluates the model. The README has the results.
"""

from typing import Any

from mvit_jax import config


def get_config(model: str = "mvit") -> Any:  # a ConfigDict
    c = config.base()
    c.epochs = 6.0
    c.batch = 32
    c.model.variant = "mvit_b_16x4"
    c.model.update(frames=8, size=64, drop_path=0.0, dropout=0.0)
    if model == "mvit":
        c.model.update(width=32, heads=1, depths=(1, 2, 3), kv_stride=(1, 4, 4))
        # Coarser than the paper's cubes (3x7x7, stride 2x4x4): 1/4 of the tokens, twice as fast.
        c.model.update(patch_kernel=(3, 9, 9), patch_stride=(2, 8, 8), patch_padding=(1, 4, 4))
    elif model == "vit":
        # The paper's baseline: one stage without pooling, with similar depth and width.
        c.model.variant = "vit_b_8x8"
        c.model.update(width=96, heads=3, depths=(6,))
        c.model.update(patch_kernel=(2, 8, 8), patch_stride=(2, 8, 8))
    else:
        raise ValueError(f"configs/moving_digits.py has no model {model!r}: choose mvit or vit")

    c.data.folder = "data/moving_digits"
    c.data.short_side = 64
    c.data.threads = 2
    # Classes are motions: a flip turns one into another, and two mixed motions are neither. No
    # augmentation plays clips backwards, which would also change the class.
    c.augment.flip = 0.0
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.crop_area = None

    c.optim.update(lr=2e-3, start_lr=1e-4, end_lr=2e-5, warmup_epochs=0.5)
    c.optim.ema_warmup = True  # if optim.ema is set
    c.checkpoint.every = 100
    c.eval.every_epochs = 1.0
    c.eval.batch = 32
    return c
