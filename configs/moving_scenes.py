"""Moving scenes: the relation of two digits in each video; trains on a CPU.

    python -m mvit_jax.prepare moving_scenes --out=data/moving_scenes
    python -m mvit_jax.train --config=configs/moving_scenes.py:clips --workdir=runs/clips

The videos show several digits, other things that move, and cuts; relations differ in motion alone.
"""

from typing import Any

from mvit_jax import config


def get_config(task: str = "clips") -> Any:  # a ConfigDict
    if task != "clips":
        raise ValueError(f"configs/moving_scenes.py has no task {task!r}: choose clips")
    c = config.base()
    c.epochs = 20.0
    c.batch = 32
    c.model.variant = "mvit_b_16x4"
    c.model.update(frames=8, size=64, drop_path=0.0, dropout=0.0)
    c.model.update(width=32, heads=1, depths=(1, 2, 3), kv_stride=(1, 4, 4))
    c.model.update(patch_kernel=(3, 9, 9), patch_stride=(2, 8, 8), patch_padding=(1, 4, 4))

    c.data.folder = "data/moving_scenes"
    c.data.short_side = 64
    c.data.threads = 2
    c.data.train_list, c.data.val_list = "clips_train.csv", "clips_val.csv"
    c.data.test_list = "clips_test.csv"
    # Flips preserve relations. A random crop could cut a partner off; the central square has both.
    c.augment.flip = 0.5
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.crop_area = None

    c.optim.update(lr=2e-3, start_lr=1e-4, end_lr=2e-5, warmup_epochs=0.5)
    c.checkpoint.every = 100
    c.eval.every_epochs = 1.0
    c.eval.batch = 32
    return c
