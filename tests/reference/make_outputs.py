"""Makes `outputs/`: outputs of torchvision's, timm's and PyTorchVideo's MViTs at tiny sizes.

`python -m tests.reference.make_outputs`, from the repository's root; needs the extra `parity`
(torch, torchvision, timm, pytorchvideo), which the tests themselves do not. Weights and clips are
not stored: each is drawn from a stream that its name seeds, here and in the tests alike.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).with_name("outputs")
CLASSES, BATCH = 5, 2
STAGE_ENDS = (0, 2, 3)  # blocks; all models have 1, 2 and 1 of them, 8, 16 and 32 channels wide

CLIPS = {  # frames (none for images), pixels a side
    "torchvision_v1": (4, 28),  # an odd grid: 7x7
    "torchvision_v2": (4, 32),
    "torchvision_v2_44": (6, 44),  # grids that are no multiples of each other
    "torchvision_v2_60": (4, 60),
    "torchvision_v2_156": (2, 156),  # 39 queries, 10 keys: distances depend on rounding
    "timm": (32,),
    "timm_class_token": (32,),
    "timm_mlp": (32,),
    "timm_absolute": (32,),
    "pytorchvideo": (4, 32),
    "pytorchvideo_stride": (4, 32),
    "pytorchvideo_pool_first": (4, 32),
    "pytorchvideo_max": (4, 32),
    "pytorchvideo_avg": (4, 32),
    "pytorchvideo_image": (32,),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal float32 numbers, seeded by the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor of an original: biases are not 0, scales not 1, embeddings not small."""
    values = draw(name, shape)
    if not name.endswith("weight"):  # biases, class token, positions
        return values * np.float32(0.3)
    if len(shape) == 1:  # scales of norms
        return 1 + values * np.float32(0.3)
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def clip(case: str) -> np.ndarray:
    """Returns a clip with channels first, [batch, 3, (T,) H, W]."""
    *frames, side = CLIPS[case]
    return draw("clip", (BATCH, 3, *frames, side, side))


def probe(tokens: np.ndarray) -> np.ndarray:
    """Returns the projection of each token on a random direction."""
    channels = tokens.shape[-1]
    return tokens @ (draw("probe", (channels,)) / np.float32(channels**0.5))


def _torchvision(case: str) -> Any:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    first, frames, side = case == "torchvision_v1", *CLIPS[case]
    none, three = [], [3, 3, 3]
    settings = {
        "num_heads": [1, 2, 2, 4],
        "input_channels": [8, 16, 16, 32] if first else [8, 8, 16, 16],
        "output_channels": [16, 16, 32, 32] if first else [8, 16, 16, 32],
        "kernel_q": [none, three, none, three] if first else [three] * 4,
        "kernel_kv": [three] * 4,
        "stride_q": [none if first else [1] * 3, [1, 2, 2], none if first else [1] * 3, [1, 2, 2]],
        "stride_kv": [[1, 4, 4], [1, 2, 2], [1, 2, 2], [1, 1, 1]],
    }
    blocks = [MSBlockConfig(**{k: v[i] for k, v in settings.items()}) for i in range(4)]
    return MViT(
        spatial_size=(side, side),
        temporal_size=frames,
        block_setting=blocks,
        residual_pool=not first,
        residual_with_cls_embed=first,
        rel_pos_embed=not first,
        proj_after_attn=not first,
        num_classes=CLASSES,
    )


def _timm(case: str) -> Any:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    changes: dict[str, Any] = {
        "timm": {},
        "timm_class_token": {"use_cls_token": True},
        "timm_mlp": {"expand_attn": False},  # as in mvitv2_large
        "timm_absolute": {"use_abs_pos": True, "use_cls_token": True},
    }[case]
    config = MultiScaleVitCfg(
        depths=(1, 2, 1), embed_dim=8, stride_q=((1, 1), (2, 2), (2, 2)), **changes
    )
    return MultiScaleVit(config, img_size=CLIPS[case] * 2, num_classes=CLASSES)


def _pytorchvideo(case: str) -> Any:
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    three = {"pool_kvq_kernel": [3, 3, 3]}
    changes: dict[str, Any] = {
        "pytorchvideo": three,
        "pytorchvideo_stride": {},  # kernels of stride + 1, and no pools where the stride is 1
        "pytorchvideo_pool_first": {
            **three, "pool_first": True, "sep_pos_embed": False, "enable_patch_embed_norm": True,
        },
        "pytorchvideo_max": {"pooling_mode": "max", "cls_embed_on": False},
        "pytorchvideo_avg": {"pooling_mode": "avg", "qkv_bias": False},
        "pytorchvideo_image": {
            "pool_kvq_kernel": [1, 3, 3], "sep_pos_embed": False, "use_2d_patch": True,
            "conv_patch_embed_kernel": [7, 7], "conv_patch_embed_stride": [4, 4],
            "conv_patch_embed_padding": [3, 3],
        },
    }[case]  # fmt: skip
    *frames, side = CLIPS[case]
    return create_multiscale_vision_transformers(
        spatial_size=side,
        temporal_size=frames[0] if frames else 1,
        depth=4,
        patch_embed_dim=8,
        num_heads=1,
        head_num_classes=CLASSES,
        embed_dim_mul=[[1, 2.0], [3, 2.0]],
        atten_head_mul=[[1, 2.0], [3, 2.0]],
        pool_q_stride_size=[[1, 1, 2, 2], [3, 1, 2, 2]],
        pool_kv_stride_adaptive=[1, 4, 4],
        **changes,
    )


_BUILD = {"torchvision": _torchvision, "timm": _timm, "pytorchvideo": _pytorchvideo}


def outputs(case: str) -> dict[str, np.ndarray]:
    """Returns everything that is stored of a case."""
    import torch

    format = case.split("_")[0]
    model = _BUILD[format](case).eval()
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    weights = {name: torch.from_numpy(draw_weight(name, s)) for name, s in shapes.items()}
    model.load_state_dict(weights)

    captured = {}
    blocks = [*model.blocks] if format != "timm" else [b for s in model.stages for b in s.blocks]
    modules = {f"block{i}": blocks[i] for i in STAGE_ENDS}
    modules["tokens"] = model.norm_embed if format == "pytorchvideo" else model.norm
    for name, module in modules.items():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: captured.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
    logits = model(torch.from_numpy(clip(case)))
    (logits * torch.from_numpy(draw("loss", (BATCH, CLASSES)))).sum().backward()

    # The norm of each gradient, and its projection on a random direction.
    gradients = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
    lengths = [np.linalg.norm(gradients[name]) for name in shapes]
    projections = [
        (gradients[name] * draw("direction/" + name, s)).sum() for name, s in shapes.items()
    ]
    return {
        "names": packed(shapes),
        "logits": logits.detach().numpy(),
        **{name: probe(tokens.detach().numpy()) for name, tokens in captured.items()},
        "gradient_lengths": np.array(lengths, np.float32),
        "gradient_projections": np.array(projections, np.float32),
    }


def stored(case: str) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """Returns the shapes of a case's tensors by name, and its model's outputs."""
    values = dict(np.load(FOLDER / f"{case}.npz"))
    return unpacked(values.pop("names")), values


def packed(shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    rows = [f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    return np.frombuffer("\n".join(rows).encode(), np.uint8)


def unpacked(values: np.ndarray) -> dict[str, tuple[int, ...]]:
    rows = [row.split(" ") for row in values.tobytes().decode().splitlines()]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in rows}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for case in CLIPS:
        path, values = FOLDER / f"{case}.npz", outputs(case)
        np.savez_compressed(path, **values)
        print(f"{path.name}: {path.stat().st_size} bytes, std of logits {values['logits'].std()}")


if __name__ == "__main__":
    main()
