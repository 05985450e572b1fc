"""What a checkpoint is: whose, and of which architecture, by its names and shapes alone."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mvit_jax.errors import UserError
from mvit_jax.models.plan import MViTConfig, Triple, plan
from mvit_jax.models.variants import VARIANTS
from mvit_jax.weights.layouts import foreign_name

State = Mapping[str, np.ndarray]

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")

# Fields whose value a file shows, and which must be the variant's: another value is another model.
# Those of pools, and what makes no other model (`separate_qkv`), are simply taken from the file.
_IDENTITY = (
    "width", "depths", "expand", "mlp_ratio", "patch_kernel", "class_token", "positions",
    "relative_positions", "stem_norm", "qkv_bias",
)  # fmt: skip

# What an image model and the video model of its kind may differ in.
_OF_TIME = (
    "patch_kernel", "class_token", "positions", "relative_positions",
    "pool_mode", "full_q_pool", "q_kernels", "kv_kernels", "residual_pool", "num_classes",
)  # fmt: skip


def without_prefix(state: State) -> tuple[dict[str, np.ndarray], str]:
    """Names without what a wrapper puts before all of them, like "module."; and that prefix."""
    names, prefix = list(state), ""
    while True:
        found = next((p for p in _PREFIXES if names and all(n.startswith(p) for n in names)), None)
        if found is None:
            break
        prefix += found
        names = [name.removeprefix(found) for name in names]
    return dict(zip(names, state.values(), strict=True)), prefix


def family(state: State) -> str:
    """Whose names these are; a `UserError` where they are no MViT's."""
    if any(name.startswith("rev_backbone.") for name in state):
        raise UserError("this is a reversible MViT (rev_backbone): there is no model of it here")
    for name, known in (
        ("torchvision", "conv_proj.weight"),
        ("pytorchvideo", "patch_embed.patch_model.weight"),
        ("timm", "stages.0.blocks.0.norm1.weight"),
        ("slowfast", "blocks.0.norm1.weight"),
    ):
        if known in state:
            return name
    some = ", ".join(list(state)[:5])
    raise UserError(
        f"this is no MViT of PySlowFast, torchvision, PyTorchVideo or timm: its {len(state)} "
        f"tensors are called {some}, ..."
    )


@dataclasses.dataclass(frozen=True)
class Structure:
    """The architecture in a file, and why it is not the one that was asked for, if so."""

    family: str
    source: MViTConfig  # as the file is
    config: MViTConfig  # as the model shall be
    crosses: bool  # from image to video or back
    problems: tuple[str, ...]


def structure(
    state: State, variant: str, config: MViTConfig, given: set[str], inflate: bool
) -> Structure:
    """The architecture of `state`, which should be `config` of the variant `variant`.

    Only strides come from `config`. `given` are the fields that the user overrode: they hold
    whatever the file says. With `inflate`, an image model may become a video model, or back.
    """
    name = family(state)
    shows = _shown(state, name, config)
    crosses = (shows["patch_kernel"][0] == 1) != (config.patch_kernel[0] == 1)
    excused = given | set(_OF_TIME if crosses and inflate else ())
    problems = [
        f"the file has {field}={shows[field]}, {variant} has {getattr(config, field)}"
        for field in _IDENTITY
        if field in shows and field not in excused and shows[field] != getattr(config, field)
    ]
    frames = config.frames
    if crosses:
        frames = 1 if shows["patch_kernel"][0] == 1 else max(config.frames, 2)
    taken = {k: v for k, v in shows.items() if k not in excused}
    if problems:
        problems.append(_hint(state, name, variant, crosses))
    elif _needs_pools(config) and not _has_pools(state):
        problems.append(
            "the file has no weights of pools, as where these take the maximum or average: if it "
            "is such a model, give pool_mode=max or pool_mode=avg"
        )
    if problems:
        return Structure(name, config, config, crosses, tuple(problems))
    source = {k: v for k, v in shows.items() if k in ("class_token", "positions")}
    return Structure(
        name,
        dataclasses.replace(config, frames=frames, **source),
        dataclasses.replace(config, **taken),
        crosses,
        (),
    )


def _hint(state: State, name: str, variant: str, crosses: bool) -> str:
    fitting = [other for other, c in VARIANTS.items() if _fits(_shown(state, name, c), c)]
    hint = f"what fits is {' or '.join(fitting)}" if fitting else "no variant fits it"
    way = "; to carry weights between images and video, say how: inflate=centre, mean or repeat"
    return f"the file is of another model than {variant}: {hint}{way if crosses else ''}"


def _needs_pools(config: MViTConfig) -> bool:
    learned = config.pool_mode not in ("max", "avg")
    return learned and any(block.q_pool or block.kv_pool for block in plan(config))


def _has_pools(state: State) -> bool:
    return any(re.search(r"\.pool_[qkv]\.", name) for name in state)


def _fits(shows: dict[str, Any], config: MViTConfig) -> bool:
    return all(shows[f] == getattr(config, f) for f in _IDENTITY if f in shows)


def _shown(state: State, family: str, config: MViTConfig) -> dict[str, Any]:
    """The fields of `MViTConfig` that names and shapes give away."""
    look = _Look(state, family, config)
    first = look.shape("patch_embed/proj/kernel") or (0, 0, 0, 0)
    blocks = look.blocks()
    shows: dict[str, Any] = {
        "width": first[0],
        "patch_kernel": (1, *first[2:]) if len(first) == 4 else tuple(first[2:]),
        "class_token": look.has("positions/class_token"),
        "stem_norm": look.has("stem_norm/scale"),
    }
    shows["depths"] = look.depths(blocks)
    if shows["depths"] != config.depths or shows["width"] != config.width:
        return shows  # what follows would only repeat it
    shows |= look.positions() | look.attention(blocks)
    classes = look.shape("head/classifier/kernel")
    if classes:
        shows["num_classes"] = classes[0]
    if family == "pytorchvideo":
        # Version 0.1 left the norms of the pools at PyTorch's default; what came after it stores
        # its pools under second names.
        later = any("._attention_pool" in name for name in state)
        shows["pool_norm_eps"] = 1e-6 if later else 1e-5
    if family == "torchvision":
        shows["relative_distances"] = "torchvision"
    adds_all = family in ("timm", "pytorchvideo") and config.residual_pool != "none"
    if adds_all and shows["class_token"]:
        shows["residual_pool"] = "all"  # they add the class token's query too
    return shows


class _Look:
    """Looks our paths up in a file's names."""

    def __init__(self, state: State, family: str, config: MViTConfig) -> None:
        self.state, self.family, self.config = state, family, config

    def shape(self, path: str) -> tuple[int, ...] | None:
        name = foreign_name(path, self.family, self.config)
        return self.state[name].shape if name is not None and name in self.state else None

    def has(self, path: str) -> bool:
        return self.shape(path) is not None

    def blocks(self) -> int:
        if self.family == "timm":
            pattern = r"stages\.\d+\.blocks\.\d+\.norm1\.weight"
        else:
            pattern = r"blocks\.\d+\.norm1\.weight"
        return sum(re.fullmatch(pattern, name) is not None for name in self.state)

    def depths(self, blocks: int) -> tuple[int, ...]:
        """Blocks of each width, where widths change at a stage's start."""
        if self.family == "timm":
            stages = [re.match(r"stages\.(\d+)\.blocks\.\d+\.norm1\.weight", n) for n in self.state]
            numbers = [int(m[1]) for m in stages if m]
            return tuple(numbers.count(s) for s in range(max(numbers) + 1))
        if blocks == sum(self.config.depths) and self._grows_like(self.config):
            return self.config.depths
        widths = [self.state[f"blocks.{i}.norm2.weight"].shape[0] for i in range(blocks)
                  if f"blocks.{i}.norm2.weight" in self.state]  # fmt: skip
        return tuple(widths.count(width) for width in dict.fromkeys(widths))

    def _grows_like(self, config: MViTConfig) -> bool:
        found = [self.shape(f"blocks/{i}/norm2/scale") for i in range(sum(config.depths))]
        # Relative to the first: another width is told of by itself.
        mine = [block.attention_width / config.width for block in plan(config)]
        return [f and found[0] and f[0] / found[0][0] for f in found] == mine

    def positions(self) -> dict[str, Any]:
        spatial = self.has("positions/space")
        if spatial:
            kind = "separate" if self.has("positions/time") else "space"
        else:
            kind = "joint" if self.has("positions/joint") else "none"
        if kind == "joint" and self.config.positions == "sincos":
            kind = "sincos"  # PySlowFast stores them, though they are no parameters
        time, space = (self.has(f"blocks/0/attn/relative/{axis}") for axis in ("time", "height"))
        relative = {(True, True): "both", (True, False): "time", (False, True): "space"}
        return {
            "positions": kind,
            "relative_positions": relative.get((time, space), "none"),
        }

    def attention(self, blocks: int) -> dict[str, Any]:
        separate = self.has("blocks/0/attn/q/kernel")
        projection = "q" if separate else "qkv"
        shows: dict[str, Any] = {
            "separate_qkv": separate,
            "qkv_bias": self.has(f"blocks/0/attn/{projection}/bias"),
        }
        starts = [sum(self.config.depths[:s]) for s in range(1, len(self.config.depths))]
        for i in starts:  # where channels grow in the attention, it gives more than it takes
            shape = self.shape(f"blocks/{i}/attn/{projection}/kernel")
            if shape:
                grows = shape[0] // (1 if separate else 3) != shape[1]
                shows["expand"] = "attention" if grows else "mlp"
        hidden = self.shape("blocks/0/mlp/fc1/kernel")
        if hidden and hidden[0] % hidden[1] == 0:
            shows["mlp_ratio"] = hidden[0] // hidden[1]
        return shows | self._pools(blocks)

    def _pools(self, blocks: int) -> dict[str, Any]:
        kernels: dict[str, list[Triple | None]] = {}
        for which in "qk":
            paths = [f"blocks/{i}/attn/pool_{which}/kernel" for i in range(blocks)]
            kernels[which] = [_kernel(self.shape(path)) for path in paths]
        if not any(kernels["q"] + kernels["k"]):
            return {}  # maximum, average or nothing at all: the variant says it
        config, plans = self.config, plan(self.config)
        if config.pool_mode in ("max", "avg"):
            config = dataclasses.replace(config, pool_mode="conv")
        shows: dict[str, Any] = {"pool_mode": config.pool_mode}
        strided = [p.q_pool is not None and p.q_pool.stride != (1, 1, 1) for p in plans]
        shows["full_q_pool"] = any(k and not s for k, s in zip(kernels["q"], strided, strict=True))
        plain = dataclasses.replace(config, full_q_pool=shows["full_q_pool"], q_kernels=(),
                                    kv_kernels=())  # fmt: skip
        for field, which in (("q_kernels", "q"), ("kv_kernels", "k")):
            expected = [getattr(p, f"{field[:-8]}_pool") for p in plan(plain)]
            found = tuple(k or (1, 1, 1) for k in kernels[which])
            same = [(p.kernel if p else (1, 1, 1)) for p in expected] == list(found)
            shows[field] = () if same else found
        return shows


def _kernel(shape: tuple[int, ...] | None) -> Triple | None:
    if shape is None:
        return None
    t, h, w = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
    return (t, h, w)
