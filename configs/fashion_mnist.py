"""Fashion-MNIST: small images of clothing, on which a model trains on a CPU.

    python -m mvit_jax.prepare fashion_mnist --out=data/tfds
    python -m mvit_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python -m mvit_jax.evaluate --workdir=runs/fashion_mnist

Test accuracy is 90.1 % after 12.5 minutes on two busy cores (2026-11-23).

Without a network, install Debian's package dataset-fashion-mnist and pass
--files=/usr/share/datasets/fashion-mnist to the first command.
"""

from typing import Any

from mvit_jax import config


def get_config() -> Any:  # a ConfigDict
    c = config.base()
    c.epochs = 9.0
    c.batch = 128
    c.model.variant = "mvit_b16"
    c.model.update(size=28, drop_path=0.0, dropout=0.0)
    # The grids of the stages are 7x7, 4x4 and 2x2 tokens.
    c.model.update(width=32, heads=1, depths=(1, 2, 3), kv_stride=(1, 2, 2))
    c.model.update(patch_kernel=(1, 7, 7), patch_stride=(1, 4, 4), patch_padding=(0, 3, 3))

    c.data.tfds = "fashion_mnist:3.0.1"
    c.data.folder = "data/tfds"
    c.data.update(train_list="train[:55000]", val_list="train[55000:]", test_list="test")
    c.data.short_side = 28
    # Passing such a small image between threads takes longer than loading it.
    c.data.threads = 0
    c.data.update(mean=(0.286, 0.286, 0.286), std=(0.353, 0.353, 0.353))  # of the training images
    c.augment.update(crop_area=None, flip=0.5, mixup=0.0, cutmix=0.0, label_smoothing=0.0)

    c.optim.update(lr=2e-3, start_lr=1e-4, end_lr=2e-5, warmup_epochs=0.5)
    c.optim.ema_warmup = True  # if optim.ema is set
    c.eval.every_epochs = 2.0
    c.eval.batch = 500
    c.eval.clips = 1
    return c
