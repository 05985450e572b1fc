"""Makes `optimizers.npz` and `learning_rates.json`.

These are steps of torch's optimisers, and learning rates by the reference code's formula.

`python -m tests.reference.make_optimizers`, from the repository's root; needs the extra `parity`,
which the tests themselves do not. Weights and gradients are formulas, here and in the test alike.
"""

import json
import math
from pathlib import Path

import numpy as np

STEPS = 10
LAYER_DECAY, WEIGHT_DECAY, CLIP = 0.75, 0.05, 2.0
# Our paths, their layers with two blocks, and whether PySlowFast decays them.
TENSORS = {
    "patch_embed/proj/kernel": ((1, 2, 2, 3, 4), 0, True),
    "patch_embed/proj/bias": ((4,), 0, False),
    "positions/class_token": ((1, 4), 0, True),
    "blocks/0/norm1/scale": ((4,), 1, False),
    "blocks/0/attn/relative/height": ((5, 2), 1, True),
    "blocks/1/attn/pool_k/kernel": ((1, 3, 3, 2), 2, True),
    "blocks/1/mlp/fc1/bias": ((8,), 2, False),
    "norm/bias": ((4,), 3, False),
    "head/classifier/kernel": ((4, 3), 3, True),
}
OPTIMIZERS = ("adamw", "adamw_layers", "sgd", "sgd_layers")


def weights() -> dict[str, np.ndarray]:
    return {name: _waves(i, shape) for i, (name, (shape, *_)) in enumerate(TENSORS.items())}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Returns gradients whose norm is above CLIP at some steps and below at others."""
    size = 0.1 + 0.4 * (step % 3)
    return {
        name: size * _waves(17 * step + i + 100, shape)
        for i, (name, (shape, *_)) in enumerate(TENSORS.items())
    }


def rate(step: int) -> float:
    return 0.02 / (1 + step)


def _waves(start: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.sin(1 + start + 0.7 * np.arange(math.prod(shape), dtype=np.float64)).reshape(shape)


def torch_steps(name: str) -> dict[str, np.ndarray]:
    """Returns the weights after STEPS steps."""
    import torch

    tensors = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in weights().items()}
    groups = []
    for key, (_, layer, decayed) in TENSORS.items():
        factor = LAYER_DECAY ** (3 - layer) if name.endswith("_layers") else 1.0
        decay = WEIGHT_DECAY if decayed else 0.0
        groups.append({"params": [tensors[key]], "weight_decay": decay, "factor": factor})
    if name.startswith("adamw"):
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, dampening=0, nesterov=True)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["factor"]
        for key, gradient in gradients(step).items():
            tensors[key].grad = torch.from_numpy(gradient)
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), CLIP)
        optimizer.step()
    return {k: v.detach().numpy() for k, v in tensors.items()}


def learning_rates() -> list[tuple[int, float]]:
    """Returns (step, learning rate) for Kinetics-400: 200 epochs of 939 steps, 30 of warm-up."""
    base, start, end, warmup, epochs, steps = 1.6e-3, 1.6e-5, 1.6e-5, 30, 200, 939
    table = []
    for step in [0, 1, 500, 939, 14085, 28169, 28170, 28171, *range(30000, 187800, 7919), 187799]:
        epoch = step / steps
        cosine = math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
        value = end + (base - end) * (cosine + 1) / 2
        if epoch < warmup:
            value = epoch * (base - start) / warmup + start
        table.append((step, value))
    return table


def main() -> None:
    arrays = {
        f"{name}/{key}": value for name in OPTIMIZERS for key, value in torch_steps(name).items()
    }
    np.savez_compressed(Path(__file__).with_name("optimizers.npz"), allow_pickle=False, **arrays)
    rows = ",\n".join(f"  [{step}, {value!r}]" for step, value in learning_rates())
    Path(__file__).with_name("learning_rates.json").write_text(f"[\n{rows}\n]\n")
    assert json.loads(f"[{rows}]")


if __name__ == "__main__":
    main()
