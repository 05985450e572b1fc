"""State dicts as PySlowFast writes them, at a tiny size: names and shapes written out by hand.

Four blocks in three stages, 8, 16 and 32 channels wide, in heads of 8; 64 tokens a frame. The
package's key tables are not used, so that the two can be compared.
"""

import zlib

import numpy as np

from tests.reference import make_outputs

CLASSES = 5
CHANNELS = {  # of each block: width, attention width, output width
    "v1": [(8, 8, 16), (16, 16, 16), (16, 16, 32), (32, 32, 32)],  # grow in a stage's last MLP
    "v2": [(8, 8, 8), (8, 16, 16), (16, 16, 16), (16, 32, 32)],  # in a stage's first attention
}
Q_STRIDES, KV_STRIDES = (1, 2, 1, 2), (4, 2, 2, 1)
# 2 max(q, k) - 1 rows, where 8x8, 4x4, 4x4, 2x2 queries meet 2x2, 4x4, 2x2, 4x4 keys.
RELATIVE_ROWS = (15, 7, 7, 7)
FRAMES = 2  # of tokens

VARIANTS = {"v1 video": "mvit_b_16x4", "v1 image": "mvit_b16",
            "v2 video": "mvitv2_s_16x4", "v2 image": "mvitv2_s"}  # fmt: skip
TINY = {"width": 8, "depths": (1, 2, 1), "size": 32}


def fields(kind: str, **overrides) -> dict:
    """Returns the fields to override in the variant of that kind."""
    video = {"frames": 4, "kv_stride": (1, 4, 4)} if kind.endswith("video") else {}
    return TINY | video | overrides


def shapes(
    kind: str, *, qkv: str = "fused", last_pools: bool = True, pool_axes: int = 5
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a state dict by name.

    Args:
        kind: A key of VARIANTS.
        qkv: "fused" or "separate".
        last_pools: False leaves out the pools of keys and values in the last block, whose stride
            is 1, as in the first release.
        pool_axes: Axes of the pooling kernels of image models.
    """
    version, medium = kind.split()
    video = medium == "video"
    time = (3,) if video else (1,) if pool_axes == 5 else ()
    kernel = (1, *time, 3, 3)
    result: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (8, 3, 3, 7, 7) if video else (8, 3, 7, 7),
        "patch_embed.proj.bias": (8,),
    }
    if video or version == "v1":
        result["cls_token"] = (1, 1, 8)
    if kind == "v1 video":
        result |= {"pos_embed_spatial": (1, 64, 8), "pos_embed_temporal": (1, FRAMES, 8),
                  "pos_embed_class": (1, 1, 8)}  # fmt: skip
    if kind == "v1 image":
        result["pos_embed"] = (1, 65, 8)
    for i, (width, attention, out) in enumerate(CHANNELS[version]):
        block: dict[str, tuple[int, ...]] = {"norm1.weight": (width,), "norm1.bias": (width,)}
        for name in ("qkv",) if qkv == "fused" else "qkv":
            rows = attention * len(name)
            block |= {f"attn.{name}.weight": (rows, width), f"attn.{name}.bias": (rows,)}
        pooled = "q" if version == "v2" or Q_STRIDES[i] > 1 else ""
        pooled += "kv" if KV_STRIDES[i] > 1 or last_pools else ""
        for x in pooled:
            block |= {f"attn.pool_{x}.weight": (8, *kernel), f"attn.norm_{x}.weight": (8,),
                      f"attn.norm_{x}.bias": (8,)}  # fmt: skip
        if version == "v2":
            block |= {f"attn.rel_pos_{axis}": (RELATIVE_ROWS[i], 8) for axis in "hw"}
        if kind == "v2 video":
            block["attn.rel_pos_t"] = (2 * FRAMES - 1, 8)
        block |= {
            "attn.proj.weight": (attention, attention), "attn.proj.bias": (attention,),
            "norm2.weight": (attention,), "norm2.bias": (attention,),
            "mlp.fc1.weight": (4 * attention, attention), "mlp.fc1.bias": (4 * attention,),
            "mlp.fc2.weight": (out, 4 * attention), "mlp.fc2.bias": (out,),
        }  # fmt: skip
        if width != out:
            block |= {"proj.weight": (out, width), "proj.bias": (out,)}
        result |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return result | {
        "norm.weight": (32,), "norm.bias": (32,),
        "head.projection.weight": (CLASSES, 32), "head.projection.bias": (CLASSES,),
    }  # fmt: skip


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns normal random tensors, seeded by their names."""
    return {
        name: np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def slowfast(kind: str, **options) -> dict[str, np.ndarray]:
    return filled(shapes(kind, **options))


def original(case: str) -> dict[str, np.ndarray]:
    """Returns another project's state dict, of a case of `make_outputs`."""
    shapes, _ = make_outputs.stored(case)
    return {name: make_outputs.draw_weight(name, shape) for name, shape in shapes.items()}


def same(tensors, expected) -> None:
    """Asserts that tensors by name are equal bit for bit, in float32."""
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        array = np.asarray(tensors[name])
        assert array.dtype == values.dtype == np.float32 and array.shape == values.shape, name
        assert array.tobytes() == values.tobytes(), name


# Each with its options of `shapes`.
FORMS = {
    "v1 video, fused": ("v1 video", {}),
    "v1 video, separate": ("v1 video", {"qkv": "separate"}),
    "v1 video, first release": ("v1 video", {"last_pools": False}),
    "v1 video, separate, first release": ("v1 video", {"qkv": "separate", "last_pools": False}),
    "v1 image": ("v1 image", {}),
    "v2 video": ("v2 video", {}),
    "v2 video, separate": ("v2 video", {"qkv": "separate"}),
    "v2 image, 4-D pools": ("v2 image", {"pool_axes": 4}),
    "v2 image, 5-D pools": ("v2 image", {}),
}
