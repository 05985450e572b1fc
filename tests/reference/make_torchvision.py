"""Makes `torchvision_mvit_v1.npz`: what torchvision's MViT class answers, at a tiny size.

`python -m tests.reference.make_torchvision`, from the repository's root; needs the extra `parity`
(torch and torchvision), which the tests themselves do not. Weights and clip are not stored: each is
drawn from a stream that its torchvision name seeds, here and in the test alike.
"""

import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("torchvision_mvit_v1.npz")

# mvit_v1_b's pattern of widths, heads and strides, in four blocks and on an odd grid: 2x7x7 tokens.
FRAMES, SIZE, CLASSES, BATCH = 4, 28, 5, 2
BLOCKS = {
    "num_heads": [1, 2, 4, 4],
    "input_channels": [8, 16, 32, 32],
    "output_channels": [16, 32, 32, 32],
    "kernel_q": [[], [3, 3, 3], [3, 3, 3], []],
    "kernel_kv": [[3, 3, 3]] * 4,
    "stride_q": [[], [1, 2, 2], [1, 2, 2], []],
    "stride_kv": [[1, 4, 4], [1, 2, 2], [1, 1, 1], [1, 1, 1]],
}
STAGE_ENDS = (0, 1, 3)
STORED_CHANNELS = 4


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers that depend on the name and the shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of torchvision's: no bias is zero, no scale of a norm is one."""
    values = draw(name, shape)
    if not name.endswith("weight"):  # biases, class token and positions
        return values * np.float32(0.3)
    if len(shape) == 1:  # scales of norms
        return 1 + values * np.float32(0.3)
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def clip() -> np.ndarray:
    """Channels first, as torchvision takes it: [batch, 3, T, H, W]."""
    return draw("clip", (BATCH, 3, FRAMES, SIZE, SIZE))


def main() -> None:
    import torch  # pyright: ignore[reportMissingImports]
    from torchvision.models.video.mvit import (  # pyright: ignore[reportMissingImports]
        MSBlockConfig,
        MViT,
    )

    settings = [
        MSBlockConfig(**{key: values[i] for key, values in BLOCKS.items()})
        for i in range(len(BLOCKS["num_heads"]))
    ]
    model = MViT(
        spatial_size=(SIZE, SIZE),
        temporal_size=FRAMES,
        block_setting=settings,
        residual_pool=False,
        residual_with_cls_embed=True,
        rel_pos_embed=False,
        proj_after_attn=False,
        num_classes=CLASSES,
    ).eval()
    weights = {k: draw_weight(k, tuple(v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})

    outputs = {}
    for i in STAGE_ENDS:  # [batch, 1 + THW, channels]
        model.blocks[i].register_forward_hook(
            lambda module, inputs, output, i=i: outputs.update({f"block{i}": output[0]})
        )
    model.norm.register_forward_hook(
        lambda module, inputs, output: outputs.update({"tokens": output})
    )
    logits = model(torch.from_numpy(clip()))
    (logits * torch.from_numpy(draw("loss", (BATCH, CLASSES)))).sum().backward()

    stored = {k: v.detach().numpy()[..., :STORED_CHANNELS] for k, v in outputs.items()}
    stored["logits"] = logits.detach().numpy()
    # Of each gradient its length, and how far it goes along a drawn direction.
    gradients = {k: p.grad.double().numpy() for k, p in model.named_parameters()}
    stored["names"] = np.array(list(gradients))
    stored["gradient_lengths"] = np.array([np.linalg.norm(g) for g in gradients.values()])
    stored["gradient_projections"] = np.array(
        [(g * draw("direction/" + k, g.shape)).sum() for k, g in gradients.items()]
    )
    np.savez_compressed(PATH, **stored)
    print(f"{PATH}: {PATH.stat().st_size} bytes, logits {stored['logits'].tolist()}")


if __name__ == "__main__":
    main()
