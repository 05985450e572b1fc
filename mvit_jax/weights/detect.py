"""What a checkpoint is: whose, and of which architecture, by its names and shapes alone."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mvit_jax.common.errors import UserError
from mvit_jax.models.plan import MViTConfig, Triple, plan
from mvit_jax.models.variants import VARIANTS
from mvit_jax.weights.key_tables import foreign_name

State = Mapping[str, np.ndarray]

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")

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


_SIGNS = {
    "torchvision": r"conv_proj\.|pos_encoding\.|blocks\.\d+\.attn\.project\.",
    "pytorchvideo": r"patch_embed\.patch_model\.|cls_positional_encoding\.|norm_embed\.",
    "timm": r"stages\.\d+\.blocks\.\d+\.attn\.",
    "slowfast": r"blocks\.\d+\.attn\.",
}


def without_prefix(state: State) -> tuple[dict[str, np.ndarray], str]:
    """Names without what a wrapper puts before most of them, like "module."; and that prefix."""
    names, removed = {name: name for name in state}, ""
    while True:
        prefix = next((p for p in PREFIXES if _most(names.values(), p)), "")
        present = set(names.values())
        shorter = {
            name: short.removeprefix(prefix)
            for name, short in names.items()
            # Where both names are there they collide, and the report will say so.
            if prefix and short.startswith(prefix) and short.removeprefix(prefix) not in present
        }
        if not shorter:
            return {short: state[name] for name, short in names.items()}, removed
        names, removed = names | shorter, removed + prefix


def _most(names: Iterable[str], prefix: str) -> bool:
    begins = [name.startswith(prefix) for name in names]
    return 2 * sum(begins) > len(begins)


def family(state: State) -> str:
    """Whose names these are; a `UserError` where they are no MViT's."""
    if any(name.startswith("rev_backbone.") for name in state):
        raise UserError("this is a reversible MViT (rev_backbone): there is no model of it here")
    for name, pattern in _SIGNS.items():
        if any(re.match(pattern, tensor) for tensor in state):
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
    shown: Mapping[str, Any]  # the fields that names and shapes give away
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
    kernel = shows.get("patch_kernel", config.patch_kernel)
    crosses = (kernel[0] == 1) != (config.patch_kernel[0] == 1)
    excused = given | set(_OF_TIME if crosses and inflate else ())
    problems = [
        f"the file has {field}={shows[field]}, {variant} has {getattr(config, field)}"
        for field in _IDENTITY
        if field in shows and field not in excused and shows[field] != getattr(config, field)
    ]
    frames = config.frames
    if crosses:
        frames = 1 if kernel[0] == 1 else max(config.frames, 2)
    taken = {k: v for k, v in shows.items() if k not in excused}
    if problems:
        problems.append(_hint(state, name, variant, crosses))
    elif _needs_pools(config) and not any(re.search(r"\.pool_[qkv]\.", name) for name in state):
        problems.append(
            "the file has no weights of pools, as where these take the maximum or average: if it "
            "is such a model, give pool_mode=max or pool_mode=avg"
        )
    if problems:
        return Structure(name, config, config, shows, crosses, tuple(problems))
    source = {k: v for k, v in shows.items() if k in ("class_token", "positions")}
    as_is = dataclasses.replace(config, frames=frames, **source)
    return Structure(name, as_is, dataclasses.replace(config, **taken), shows, crosses, ())


def _hint(state: State, name: str, variant: str, crosses: bool) -> str:
    fitting = [other for other, c in VARIANTS.items() if _fits(_shown(state, name, c), c)]
    hint = f"what fits is {' or '.join(fitting)}" if fitting else "no variant fits it"
    way = "; to carry weights between images and video, say how: inflate=centre, mean or repeat"
    return f"the file is of another model than {variant}: {hint}{way if crosses else ''}"


def _needs_pools(config: MViTConfig) -> bool:
    learned = config.pool_mode not in ("max", "avg")
    return learned and any(block.q_pool or block.kv_pool for block in plan(config))


def _fits(shows: dict[str, Any], config: MViTConfig) -> bool:
    return all(shows[f] == getattr(config, f) for f in _IDENTITY if f in shows)


def _shown(state: State, family: str, config: MViTConfig) -> dict[str, Any]:
    """The fields of `MViTConfig` that names and shapes give away."""
    look = _Look(state, family, config)
    blocks = look.blocks()
    shows: dict[str, Any] = {
        "class_token": look.has("positions/class_token"),
        "stem_norm": look.has("stem_norm/scale"),
        "depths": look.depths(blocks),
    }
    cubes = look.shape("patch_embed/proj/kernel", 4, 5)
    if cubes:
        shows |= {"width": cubes[0], "patch_kernel": _kernel(cubes)}
    if shows["depths"] != config.depths or shows.get("width", config.width) != config.width:
        return shows  # what follows would only repeat it
    shows |= look.positions() | look.attention(blocks)
    classes = look.shape("head/classifier/kernel", 2)
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

    def shape(self, path: str, *ranks: int) -> tuple[int, ...] | None:
        """Of a tensor that has one of these numbers of axes, and something in it."""
        name = foreign_name(path, self.family, self.config)
        if name is None or name not in self.state:
            return None
        shape = self.state[name].shape
        return shape if len(shape) in ranks and 0 not in shape else None

    def has(self, path: str) -> bool:
        return foreign_name(path, self.family, self.config) in self.state

    def blocks(self) -> int:
        pattern = r"stages\.\d+\.blocks\.\d+\." if self.family == "timm" else r"blocks\.\d+\."
        found = (re.match(pattern, name) for name in self.state)
        return len({match[0] for match in found if match})

    def depths(self, blocks: int) -> tuple[int, ...]:
        """Blocks of each width, where widths change at a stage's start."""
        if self.family == "timm":
            found = (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name) for name in self.state)
            stages = [stage for stage, _ in {match.groups() for match in found if match}]
            numbers = sorted(set(stages), key=lambda stage: (len(stage), stage))
            return tuple(stages.count(stage) for stage in numbers)
        if blocks == sum(self.config.depths) and self._grows_like(self.config):
            return self.config.depths
        names = [f"blocks.{i}.norm2.weight" for i in range(blocks)]
        widths = [self.state[name].shape for name in names if name in self.state]
        return tuple(widths.count(width) for width in dict.fromkeys(widths))

    def _grows_like(self, config: MViTConfig) -> bool:
        found = [self.shape(f"blocks/{i}/norm2/scale", 1) for i in range(sum(config.depths))]
        pairs = zip(found, plan(config), strict=True)
        known = [(shape[0], block.attention_width) for shape, block in pairs if shape]
        # Relative to the first: another width is told of by itself.
        return all(f * known[0][1] == known[0][0] * width for f, width in known)

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
        return {"positions": kind, "relative_positions": relative.get((time, space), "none")}

    def attention(self, blocks: int) -> dict[str, Any]:
        separate = not self.has("blocks/0/attn/qkv/kernel") and self.has("blocks/0/attn/q/kernel")
        projection = "q" if separate else "qkv"
        shows: dict[str, Any] = {
            "separate_qkv": separate,
            "qkv_bias": self.has(f"blocks/0/attn/{projection}/bias"),
        }
        starts = [sum(self.config.depths[:s]) for s in range(1, len(self.config.depths))]
        for i in starts:  # where channels grow in the attention, it gives more than it takes
            shape = self.shape(f"blocks/{i}/attn/{projection}/kernel", 2)
            if shape:
                grows = shape[0] // (1 if separate else 3) != shape[1]
                shows["expand"] = "attention" if grows else "mlp"
        hidden = self.shape("blocks/0/mlp/fc1/kernel", 2)
        if hidden and hidden[0] % hidden[1] == 0:
            shows["mlp_ratio"] = hidden[0] // hidden[1]
        return shows | self._pools(blocks)

    def _pools(self, blocks: int) -> dict[str, Any]:
        kernels: dict[str, list[Triple | None]] = {}
        for which in "qk":
            paths = [f"blocks/{i}/attn/pool_{which}/kernel" for i in range(blocks)]
            kernels[which] = [_kernel(self.shape(path, 4, 5)) for path in paths]
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
        expected = {"q": [p.q_pool for p in plan(plain)], "k": [p.kv_pool for p in plan(plain)]}
        for field, which in (("q_kernels", "q"), ("kv_kernels", "k")):
            found = tuple(k or (1, 1, 1) for k in kernels[which])
            same = [(p.kernel if p else (1, 1, 1)) for p in expected[which]] == list(found)
            shows[field] = () if same else found
        return shows


def _kernel(shape: tuple[int, ...] | None) -> Triple | None:
    if shape is None:
        return None
    t, h, w = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
    return (t, h, w)
