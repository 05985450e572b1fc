"""Moving scenes: motions and relations of digits, by boxes (default) or clip; trains on a CPU.

    python -m mvit_jax.prepare moving_scenes --out=data/moving_scenes
    python -m mvit_jax.train --config=configs/moving_scenes.py --workdir=runs/moving_scenes
    python -m mvit_jax.train --config=configs/moving_scenes.py:clips --workdir=runs/clips

The default is action detection: labels of boxes at key frames, in AVA's formats. `clips` classifies
the same videos by the one relation that each shows.
"""

from typing import Any

from mvit_jax import config


def get_config(task: str = "boxes") -> Any:  # a ConfigDict
    c = config.base()
    c.epochs = 7.0
    c.batch = 32
    c.model.variant = "mvit_b_16x4"
    c.model.update(frames=8, size=96, drop_path=0.0, dropout=0.0)
    c.model.update(width=48, heads=1, depths=(2, 4), kv_stride=(1, 2, 2))
    c.model.update(patch_kernel=(3, 9, 9), patch_stride=(2, 8, 8), patch_padding=(1, 4, 4))

    c.data.folder = "data/moving_scenes"
    c.data.short_side = 96
    c.data.threads = 2
    # Flips preserve the labels.
    c.augment.flip = 0.5
    c.augment.mixup = 0.0
    c.augment.cutmix = 0.0
    c.augment.crop_area = None
    c.augment.label_smoothing = 0.0

    c.optim.update(lr=2e-3, start_lr=1e-4, end_lr=2e-5, warmup_epochs=0.5)
    c.checkpoint.every = 100
    c.eval.every_epochs = 1.0
    c.eval.batch = 32
    if task == "boxes":
        c.data.source = "ava"
        c.data.sampling = "key_frame"
        c.data.multi_label = True
        c.data.class_list = "classes.pbtxt"
        c.data.excluded = "excluded.csv"
        for split in ("train", "val", "test"):
            c.data[f"{split}_boxes"] = f"{split}_boxes.csv"
        c.eval.clips = 1
        c.augment.jitter = (96, 108)
        c.eval.full_frame = True
    elif task == "clips":
        c.epochs = 18.0
        for split in ("train", "val", "test"):
            c.data[f"{split}_list"] = f"clips_{split}.csv"
        # A random crop could cut a partner off; the central square has both.
    else:
        raise ValueError(f"configs/moving_scenes.py has no task {task!r}: choose boxes or clips")
    return c
