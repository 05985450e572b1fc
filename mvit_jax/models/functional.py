"""The functional API: `model = functional(config)`, `model.init(key)`, `model.apply(...)`.

Parameters are a nested dict with string keys, such as `params["blocks"]["3"]["attn"]`. A
`Functional` holds the architecture, the custom modules, the dtype and the choice of implementations
(`ops`). Instances are hashable and may be static arguments of `jax.jit`. Equal instances share
compiled programs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Shaped

from mvit_jax.common.errors import UserError
from mvit_jax.models import cost
from mvit_jax.models.mvit import MViT
from mvit_jax.models.plan import MViTConfig
from mvit_jax.models.variants import variant

Params = dict[str, Any]  # nested, string keys, arrays at the leaves
Custom = Callable[..., Any] | None


@dataclass(frozen=True)
class Functional:
    """A model without its parameters; made by `functional`.

    Attributes:
      config: the architecture.
      block: a class with the signatures of `Block`, or None for `Block`.
      attention: a class with the signatures of `PooledAttention`, or None for `PooledAttention`.
      pooling: a class with the signatures of `ConvPool`, or None for the config's `pool_mode`.
      dtype: the dtype of the computation; parameters are float32.
      ops: "auto" for each platform's fastest implementations of the operations, or "reference" for
        their reference implementations.
    """

    config: MViTConfig
    block: Custom
    attention: Custom
    pooling: Custom
    dtype: Any
    ops: str

    @property
    def is_custom(self) -> bool:
        """True if any module is custom."""
        return (self.block, self.attention, self.pooling) != (None, None, None)

    def init(self, key: Array) -> Params:
        """Returns float32 parameters, initialised from `key`."""
        # Arrays such as `jnp.full(shape, 0.1)` are weakly typed. The optimizer's first update would
        # make their types strong, so the training step would compile a second time.
        strong = lambda x: lax.convert_element_type(x, x.dtype)  # noqa: E731
        return jax.tree.map(strong, params_of(self._build(_Keys(key))))

    def apply(
        self,
        params: Params,
        clip: Shaped[Array, "..."],
        boxes: Shaped[Array, "..."] | None = None,
        *,
        key: Array | None = None,
        capture: bool = False,
        scan: bool = False,
        remat: str = "none",
        frozen_blocks: int = 0,
    ) -> tuple[Float[Array, "batch *boxes num_classes"], dict[str, Any]]:
        """Returns logits and features of normalised clips, or of their boxes; see `MViT.forward`.

        A `key` selects training mode, with drop path and dropout: block i draws from
        `fold_in(key, i)`. Without a key the model is in inference mode.

        Raises:
          UserError: the parameters belong to another architecture, or the clips have an unsupported
            shape or dtype.
        """
        model = self.module(params)
        return model.forward(
            clip, boxes, key=key, capture=capture, scan=scan, remat=remat,
            frozen_blocks=frozen_blocks,
        )  # fmt: skip

    def features(
        self, params: Params, clip: Shaped[Array, "..."], *, stage: int | None = None
    ) -> Float[Array, "batch channels"]:
        """Returns one float32 vector per normalised clip, for probes, retrieval and clustering.

        Args:
          params: the parameters.
          clip: as for `apply`.
          stage: as for `select_features`.

        Raises:
          UserError: as for `apply`, or the model has no such stage.
        """
        check_stage(self.config, stage)
        return select_features(self.apply(params, clip)[1], stage)

    def module(self, params: Params) -> MViT:
        """Returns a module that shares the arrays of `params`.

        Raises:
          UserError: the parameters belong to another architecture.
        """
        graph, abstract = _structure(self)
        difference = first_difference(nnx.to_pure_dict(abstract), params)
        if difference:
            raise UserError(f"the parameters do not match this architecture: {difference}")
        state = jax.tree.map(lambda x: x, abstract)  # a copy, since the next line mutates it
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
        return nnx.merge(graph, state)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter by its path, like "blocks/3/attn/qkv/kernel"."""
        _, abstract = _structure(self)
        leaves = _by_path(nnx.to_pure_dict(abstract))
        return {path: tuple(leaves[path].shape) for path in sorted(leaves)}

    def cost(self) -> cost.Cost:
        """Returns the numbers of parameters and of multiply-adds for a clip of the configured size.

        The cost of built-in modules follows from formulas. A model with custom modules is traced
        instead, and every product in the traced program counts (see `cost.products`).
        """
        if not self.is_custom:
            return cost.cost(self.config)
        c = self.config
        clip = jax.ShapeDtypeStruct((1, c.frames, c.size, c.size, 3), jnp.float32)
        # "auto" would trace every platform's implementation and count the most expensive one.
        model = dataclasses.replace(self, ops="reference")
        params = jax.eval_shape(model.init, jax.random.key(0))
        boxes = jax.ShapeDtypeStruct((1, 1, 4), jnp.float32) if c.task == "detection" else None
        run = lambda *inputs: model.apply(*inputs)[0]  # noqa: E731
        program = jax.make_jaxpr(run)(params, clip, boxes)
        return cost.Cost(sum(x.size for x in jax.tree.leaves(params)), cost.products(program))

    def _build(self, rngs: nnx.Rngs) -> MViT:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return MViT(**fields, rngs=rngs)


def functional(
    config: MViTConfig,
    *,
    block: Custom = None,
    attention: Custom = None,
    pooling: Custom = None,
    dtype: Any = jnp.float32,
    ops: str = "auto",
) -> Functional:
    """Returns a model without its parameters: architecture, custom modules, dtype and operations.

    After `model = functional(config, attention=Mine)`, `model.init(key)` returns the parameters as
    a nested dict, and `model.apply(params, clips)` returns logits and features. See `Functional`
    for the arguments and `docs/variants.md` for custom modules. `ops="reference"` selects the
    reference implementations, which `jax.jvp` and `jax.hessian` can differentiate.
    """
    return Functional(config, block, attention, pooling, jnp.dtype(dtype), ops)


def select_features(features: dict[str, Any], stage: int | None) -> Float[Array, "batch channels"]:
    """Returns one vector per clip, in float32 (float64 for float64 features).

    Args:
      features: the features that `Functional.apply` returns.
      stage: None for the vector that the head classifies: the class token after the final norm, or
        without one the mean of the tokens. K for the mean over the grid after stage K, counted
        from 0, without class token and final norm.
    """
    x = features["pooled"] if stage is None else features["stages"][stage]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x if stage is None else x.mean((1, 2, 3))


def check_stage(config: MViTConfig, stage: int | None) -> None:
    """Raises `UserError` if the model has no stage of this number."""
    stages = len(config.depths)
    if stage is not None and not 0 <= stage < stages:
        raise UserError(f"stage {stage} must be from 0 to {stages - 1}: the model has {stages}")


def create_model(
    name: str,
    *,
    rngs: nnx.Rngs,
    block: Custom = None,
    attention: Custom = None,
    pooling: Custom = None,
    dtype=jnp.float32,
    ops: str = "auto",
    **overrides: Any,
) -> MViT:
    """Returns a published variant as a module with random parameters, in inference mode.

    Example: `create_model("mvit_b_16x4", num_classes=10, rngs=nnx.Rngs(0))`. `overrides` are fields
    of `MViTConfig`; for custom modules see `MViT`.

    Raises:
      UserError: there is no such variant, no such field, or a value is out of range.
    """
    config = variant(name, **overrides)
    model = functional(
        config, block=block, attention=attention, pooling=pooling, dtype=dtype, ops=ops
    )
    return model._build(rngs)


def params_of(module: nnx.Module) -> Params:
    """Returns a module's parameters as a nested dict with string keys; arrays are shared."""
    return _with_string_keys(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def first_difference(model: Any, other: Any) -> str | None:
    """Returns a message on the first tensor whose shape differs between two trees, or None.

    Leaves are arrays or abstract arrays. The message describes the tensor of the tree `other`, and
    the shape that the tree `model` requires.
    """
    shapes, other_shapes = (
        {path: list(leaf.shape) for path, leaf in _by_path(tree).items()} for tree in (model, other)
    )
    for name in sorted({*shapes, *other_shapes}):
        shape, other_shape = shapes.get(name), other_shapes.get(name)
        if other_shape is None:
            return f"{name} is missing, and is required with shape {shape}"
        if shape is None:
            return f"{name} with shape {other_shape} is not expected"
        if shape != other_shape:
            return f"{name} has shape {other_shape}, but {shape} is required"
    return None


def _by_path(tree: Any) -> dict[str, Any]:
    # flax's `flatten_dict` accepts only dicts. A checkpoint's metadata is no dict and has integer
    # keys.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


class _Keys(nnx.Rngs):
    """A source of the same keys as `nnx.Rngs(params=key)`, with a Python counter.

    The counter of `nnx.Rngs` is an array, so during tracing each draw takes longer than the
    previous one. The draws for the shapes of MViTv2-H took two minutes in all (flax 0.12.8).
    """

    def __init__(self, key: Array) -> None:
        draws = (jax.random.fold_in(key, count) for count in itertools.count())
        self.params = nnx.static(functools.partial(next, draws))


@functools.lru_cache(maxsize=64)
def _structure(model: Functional):
    return nnx.split(nnx.eval_shape(lambda: model._build(_Keys(jax.random.key(0)))))


def _with_string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(k): _with_string_keys(v) for k, v in tree.items()}
