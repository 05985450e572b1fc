"""Parity of full-size models with torchvision and timm: logits, and weights after a round trip.

    python -m benchmarks.parity                       needs the extra `parity`
    python -m benchmarks.parity --models=mvit_v1_b,mvitv2_tiny

Each original has its initial weights plus noise, so that no bias is 0 and no norm's scale is 1. The
weights are saved by torch and read by `load`. Our model then runs on the original's input, in
float32 at the highest precision. Finally, the weights are written back, loaded into the original
with strict matching, and compared bit for bit. "difference" is the largest difference of logits,
divided by the standard deviation of the original's logits.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from mvit_jax.models.functional import functional
from mvit_jax.weights.export import save_torch
from mvit_jax.weights.load import load

VARIANTS = {
    "mvit_v1_b": "mvit_b_16x4",
    "mvit_v2_s": "mvitv2_s_16x4",
    "mvitv2_tiny": "mvitv2_t",
    "mvitv2_small": "mvitv2_s",
    "mvitv2_base": "mvitv2_b",
    "mvitv2_large": "mvitv2_l",
    "mvitv2_base_cls": "mvitv2_b_in21k",
}

_MODELS = flags.DEFINE_list("models", list(VARIANTS), "Models of torchvision and timm.")


def main(argv: list[str]) -> None:
    print(f"{'original':16} {'variant':16} {'tensors':>8} {'difference':>11}  round trip exact")
    for name in _MODELS.value:
        tensors, difference, same = compare(name)
        print(f"{name:16} {VARIANTS[name]:16} {tensors:8} {difference:11.1e}  {same}", flush=True)


def compare(name: str) -> tuple[int, float, bool]:
    """Returns the number of tensors, the logits' difference, and True if the weights are equal."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    make, format = _original(name)
    original = make().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        video = format == "torchvision"
        clip = torch.randn(1, 3, 16, 224, 224) if video else torch.randn(1, 3, 224, 224)
        expected = original(clip).numpy()
    with tempfile.TemporaryDirectory() as folder:
        file, back = Path(folder) / "there.pth", Path(folder) / "back.pth"
        torch.save(original.state_dict(), file)
        loaded = load(file, VARIANTS[name])
        logits = _logits(loaded, np.moveaxis(clip.numpy(), 1, -1))
        save_torch(loaded.params, loaded.config, back, format, origin=loaded.origin)
        returned = torch.load(back, weights_only=True)
    make().load_state_dict(returned, strict=True)
    state = original.state_dict()
    same = all(torch.equal(state[key], returned[key]) for key in state)
    return len(state), float(np.abs(logits - expected).max() / expected.std()), same


def _original(name: str) -> tuple[Callable[[], Any], str]:
    if name.startswith("mvit_"):
        from torchvision.models import video  # pyright: ignore[reportMissingImports]

        return getattr(video, name), "torchvision"
    import timm  # pyright: ignore[reportMissingImports]

    return lambda: timm.create_model(name), "timm"


def _logits(loaded, clip: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params, x: functional(loaded.config).apply(params, x)[0])
        return np.asarray(run(loaded.params, clip))


if __name__ == "__main__":
    app.run(main)
