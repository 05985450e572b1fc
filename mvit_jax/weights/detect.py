"""Detection of a checkpoint's format and architecture from its tensor names and shapes."""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import MViTConfig, Triple, plan
from mvit_jax.models.variants import VARIANTS
from mvit_jax.weights.key_tables import foreign_name

State = Mapping[str, np.ndarray]

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")

# Fields that are detected from the file and must equal those of the variant. The other detected
# fields, such as pooling kernels and `separate_qkv`, are taken from the file.
_IDENTITY = (
    "width", "depths", "expand", "mlp_ratio", "patch_kernel", "class_token", "positions",
    "relative_positions", "stem_norm", "qkv_bias",
)  # fmt: skip

# Fields in which an image model may differ from the corresponding video model.
_IMAGE_VIDEO_FIELDS = (
    "patch_kernel", "class_token", "positions", "relative_positions",
    "pool_mode", "full_q_pool", "q_kernels", "kv_kernels", "residual_pool", "num_classes",
)  # fmt: skip


# Patterns of tensor names by checkpoint format, the most specific first.
_SIGNS = {
    "torchvision": r"conv_proj\.|pos_encoding\.|blocks\.\d+\.attn\.project\.",
    "pytorchvideo": r"patch_embed\.patch_model\.|cls_positional_encoding\.|norm_embed\.",
    "timm": r"stages\.\d+\.blocks\.\d+\.attn\.",
    "slowfast": r"blocks\.\d+\.attn\.",
}


def strip_prefixes(state: State) -> tuple[dict[str, np.ndarray], str]:
    """Removes prefixes that wrappers add to most names, such as "module.".

    Returns:
      The tensors by their short names, and the removed prefix.
    """
    names, removed = {name: name for name in state}, ""
    while True:
        prefix = next((p for p in PREFIXES if _is_common_prefix(names.values(), p)), "")
        prefix = prefix or _unknown_prefix(names.values())
        present = set(names.values())
        shorter = {
            name: short.removeprefix(prefix)
            for name, short in names.items()
            # If the short name is taken, the long one stays, and the report lists the collision.
            if prefix and short.startswith(prefix) and short.removeprefix(prefix) not in present
        }
        if not shorter:
            return {short: state[name] for name, short in names.items()}, removed
        names, removed = names | shorter, removed + prefix


def _is_common_prefix(names: Iterable[str], prefix: str) -> bool:
    begins = [name.startswith(prefix) for name in names]
    return 2 * sum(begins) > len(begins)


def _unknown_prefix(names: Collection[str]) -> str:
    """Returns the prefix of most names before those of a supported format, or ""."""
    sign = "|".join(_SIGNS.values())
    if any(re.match(sign, name) for name in names):
        return ""
    before = (re.match(rf"((?:[A-Za-z_]\w*\.)+?)(?:{sign})", name) for name in names)
    counts = Counter(match[1] for match in before if match and "rev_" not in match[1])
    prefix = max(counts, key=counts.__getitem__, default="")
    return prefix if prefix and _is_common_prefix(names, prefix) else ""


def is_supported(names: Iterable[str]) -> bool:
    """Returns True if tensor names, after any prefix, are of a format that can be loaded."""
    pattern = rf"(?:[A-Za-z_]\w*\.)*?(?:{'|'.join(_SIGNS.values())})"
    return any(re.match(pattern, name) for name in names)


def detect_format(state: State) -> str:
    """Returns the checkpoint format, one of `key_tables.FORMATS`, by the tensor names.

    Raises:
      UserError: the names match no supported MViT.
    """
    if any(name.startswith("rev_backbone.") for name in state):
        raise UserError("a reversible MViT (rev_backbone) is not supported")
    for name, pattern in _SIGNS.items():
        if any(re.match(pattern, tensor) for tensor in state):
            return name
    some = ", ".join(list(state)[:5])
    raise UserError(
        f"not a checkpoint of an MViT of PySlowFast, torchvision, PyTorchVideo or timm: its "
        f"{len(state)} tensors are named {some}, ..."
    )


@dataclasses.dataclass(frozen=True)
class Structure:
    """The architecture of a checkpoint, and its mismatches with the requested variant."""

    format: str  # checkpoint format
    source: MViTConfig  # `config` with the file's class token and positions, to read the tensors
    config: MViTConfig  # architecture of the model to build
    fields: Mapping[str, Any]  # fields of `MViTConfig` detected from names and shapes
    crosses: bool  # the file is an image model and the variant a video model, or vice versa
    problems: tuple[str, ...]  # mismatches; empty if the file fits


def structure(
    state: State, variant: str, config: MViTConfig, overridden: set[str], inflate: bool
) -> Structure:
    """Detects the architecture of `state` and compares it with `config`.

    Args:
      state: tensors by name, without prefixes.
      variant: name of the variant, for messages.
      config: the variant with the user's overrides; strides come from it alone.
      overridden: fields that the user overrode; they take precedence over the file.
      inflate: True allows an image model to become a video model, or vice versa.
    """
    name = detect_format(state)
    fields = _detect_fields(state, name, config)
    kernel = fields.get("patch_kernel", config.patch_kernel)
    crosses = (kernel[0] == 1) != (config.patch_kernel[0] == 1)
    may_differ = overridden | set(_IMAGE_VIDEO_FIELDS if crosses and inflate else ())
    problems = [
        f"the file has {field}={fields[field]}, but {variant} has {getattr(config, field)}"
        for field in _IDENTITY
        if field in fields and field not in may_differ and fields[field] != getattr(config, field)
    ]
    frames = config.frames
    if crosses:
        frames = 1 if kernel[0] == 1 else max(config.frames, 2)
    from_file = {k: v for k, v in fields.items() if k not in may_differ}
    if problems:
        problems.append(_hint(state, name, variant, crosses))
    elif _needs_pools(config) and not any(re.search(r"\.pool_[qkv]\.", name) for name in state):
        problems.append(
            "the file has no pooling weights: for a model with max or average pooling, add "
            "pool_mode=max or pool_mode=avg"
        )
    if problems:
        return Structure(name, config, config, fields, crosses, tuple(problems))
    source = {k: v for k, v in fields.items() if k in ("class_token", "positions")}
    as_is = dataclasses.replace(config, frames=frames, **source)
    return Structure(name, as_is, dataclasses.replace(config, **from_file), fields, crosses, ())


def _hint(state: State, name: str, variant: str, crosses: bool) -> str:
    fitting = [other for other, c in VARIANTS.items() if _fits(_detect_fields(state, name, c), c)]
    advice = "; to convert between images and video, choose inflate=centre, mean or repeat"
    if not fitting:
        return f"the file does not fit {variant} or any other variant{advice if crosses else ''}"
    return f"the file fits {' or '.join(fitting)}, not {variant}{advice if crosses else ''}"


def _needs_pools(config: MViTConfig) -> bool:
    learned = config.pool_mode not in ("max", "avg")
    return learned and any(block.q_pool or block.kv_pool for block in plan(config))


def _fits(fields: dict[str, Any], config: MViTConfig) -> bool:
    return all(fields[f] == getattr(config, f) for f in _IDENTITY if f in fields)


def _detect_fields(state: State, format: str, config: MViTConfig) -> dict[str, Any]:
    """Detects fields of `MViTConfig` from the names and shapes of tensors."""
    look = _Lookup(state, format, config)
    blocks = look.blocks()
    fields: dict[str, Any] = {
        "class_token": look.has("positions/class_token"),
        "stem_norm": look.has("stem_norm/scale"),
        "depths": look.depths(blocks),
    }
    cubes = look.shape("patch_embed/proj/kernel", 4, 5)
    if cubes:
        fields |= {"width": cubes[0], "patch_kernel": _kernel(cubes)}
    if fields["depths"] != config.depths or fields.get("width", config.width) != config.width:
        return fields  # further mismatches would only repeat this one
    fields |= look.positions() | look.attention(blocks)
    classes = look.shape("head/classifier/kernel", 2)
    if classes:
        fields["num_classes"] = classes[0]
    if format == "pytorchvideo":
        # Version 0.1 left the eps of the pooling norms at PyTorch's default. Later versions store
        # the pooling weights under second names too.
        later = any("._attention_pool" in name for name in state)
        fields["pool_norm_eps"] = 1e-6 if later else 1e-5
    if format == "torchvision":
        fields["relative_distances"] = "torchvision"
    adds_all = format in ("timm", "pytorchvideo") and config.residual_pool != "none"
    if adds_all and fields["class_token"]:
        fields["residual_pool"] = "all"  # timm and PyTorchVideo add the class token's query too
    return fields


class _Lookup:
    """Access to a checkpoint's tensors by this project's paths."""

    def __init__(self, state: State, format: str, config: MViTConfig) -> None:
        self.state, self.format, self.config = state, format, config

    def shape(self, path: str, *ranks: int) -> tuple[int, ...] | None:
        """Returns a tensor's shape; None if it is missing, empty or of another rank."""
        name = foreign_name(path, self.format, self.config)
        if name is None or name not in self.state:
            return None
        shape = self.state[name].shape
        return shape if len(shape) in ranks and 0 not in shape else None

    def has(self, path: str) -> bool:
        return foreign_name(path, self.format, self.config) in self.state

    def blocks(self) -> int:
        pattern = r"stages\.\d+\.blocks\.\d+\." if self.format == "timm" else r"blocks\.\d+\."
        matches = (re.match(pattern, name) for name in self.state)
        return len({match[0] for match in matches if match})

    def depths(self, blocks: int) -> tuple[int, ...]:
        """Returns the number of blocks of each stage.

        Only timm's names contain the stage. In other formats, blocks of equal width form a stage.
        """
        if self.format == "timm":
            matches = (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name) for name in self.state)
            stages = [stage for stage, _ in {match.groups() for match in matches if match}]
            numbers = sorted(set(stages), key=lambda stage: (len(stage), stage))
            return tuple(stages.count(stage) for stage in numbers)
        if blocks == sum(self.config.depths) and self._grows_like(self.config):
            return self.config.depths
        names = [f"blocks.{i}.norm2.weight" for i in range(blocks)]
        widths = [self.state[name].shape for name in names if name in self.state]
        return tuple(widths.count(width) for width in dict.fromkeys(widths))

    def _grows_like(self, config: MViTConfig) -> bool:
        shapes = [self.shape(f"blocks/{i}/norm2/scale", 1) for i in range(sum(config.depths))]
        pairs = zip(shapes, plan(config), strict=True)
        widths = [(shape[0], block.attention_width) for shape, block in pairs if shape]
        # Widths relative to the first block's; a mismatch of that width is reported separately.
        return all(w * widths[0][1] == widths[0][0] * planned for w, planned in widths)

    def positions(self) -> dict[str, Any]:
        spatial = self.has("positions/space")
        if spatial:
            kind = "separate" if self.has("positions/time") else "space"
        else:
            kind = "joint" if self.has("positions/joint") else "none"
        if kind == "joint" and self.config.positions == "sincos":
            kind = "sincos"  # PySlowFast stores the fixed embeddings too
        time, space = (self.has(f"blocks/0/attn/relative/{axis}") for axis in ("time", "height"))
        relative = {(True, True): "both", (True, False): "time", (False, True): "space"}
        return {"positions": kind, "relative_positions": relative.get((time, space), "none")}

    def attention(self, blocks: int) -> dict[str, Any]:
        separate = not self.has("blocks/0/attn/qkv/kernel") and self.has("blocks/0/attn/q/kernel")
        projection = "q" if separate else "qkv"
        fields: dict[str, Any] = {
            "separate_qkv": separate,
            "qkv_bias": self.has(f"blocks/0/attn/{projection}/bias"),
        }
        starts = [sum(self.config.depths[:s]) for s in range(1, len(self.config.depths))]
        for i in starts:  # attention that expands the width has more outputs than inputs
            shape = self.shape(f"blocks/{i}/attn/{projection}/kernel", 2)
            if shape:
                grows = shape[0] // (1 if separate else 3) != shape[1]
                fields["expand"] = "attention" if grows else "mlp"
        hidden = self.shape("blocks/0/mlp/fc1/kernel", 2)
        if hidden and hidden[0] % hidden[1] == 0:
            fields["mlp_ratio"] = hidden[0] // hidden[1]
        return fields | self._pools(blocks)

    def _pools(self, blocks: int) -> dict[str, Any]:
        kernels: dict[str, list[Triple | None]] = {}
        for which in "qk":
            paths = [f"blocks/{i}/attn/pool_{which}/kernel" for i in range(blocks)]
            kernels[which] = [_kernel(self.shape(path, 4, 5)) for path in paths]
        if not any(kernels["q"] + kernels["k"]):
            return {}  # max, average or no pooling: the variant decides
        config, plans = self.config, plan(self.config)
        if config.pool_mode in ("max", "avg"):
            config = dataclasses.replace(config, pool_mode="conv")
        fields: dict[str, Any] = {"pool_mode": config.pool_mode}
        strided = [p.q_pool is not None and p.q_pool.stride != (1, 1, 1) for p in plans]
        fields["full_q_pool"] = any(k and not s for k, s in zip(kernels["q"], strided, strict=True))
        plain = dataclasses.replace(config, full_q_pool=fields["full_q_pool"], q_kernels=(),
                                    kv_kernels=())  # fmt: skip
        expected = {"q": [p.q_pool for p in plan(plain)], "k": [p.kv_pool for p in plan(plain)]}
        for field, which in (("q_kernels", "q"), ("kv_kernels", "k")):
            sizes = tuple(k or (1, 1, 1) for k in kernels[which])
            same = [(p.kernel if p else (1, 1, 1)) for p in expected[which]] == list(sizes)
            fields[field] = () if same else sizes
        return fields


def _kernel(shape: tuple[int, ...] | None) -> Triple | None:
    if shape is None:
        return None
    t, h, w = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
    return (t, h, w)
