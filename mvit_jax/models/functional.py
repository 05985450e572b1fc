"""The pure form of a model: `model = functional(config)`, `model.init(key)`, `model.apply(...)`.

Parameters are a nested dict with string keys, `params["blocks"]["3"]["attn"]`. The handle holds
the architecture, custom modules, dtype and form of the operations. It is hashable, so it may be a
static argument of `jax.jit`; equal handles share what is compiled.
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
      block: a class like `Block`, or None for it.
      attention: a class like `PooledAttention`, or None for it.
      pooling: a class like `ConvPool`, or None for those that the config names.
      dtype: of all that is computed; parameters are float32.
      ops: "auto", each platform's own forms of the operations, or "reference", their definitions.
    """

    config: MViTConfig
    block: Custom
    attention: Custom
    pooling: Custom
    dtype: Any
    ops: str

    @property
    def is_custom(self) -> bool:
        """True with a block, attention or pooling of one's own."""
        return (self.block, self.attention, self.pooling) != (None, None, None)

    def init(self, key: Array) -> Params:
        """Returns fresh float32 parameters, drawn from `key`."""
        # Without weak types (`jnp.full(shape, 0.1)` has one), which an update would take away: the
        # training step would be compiled twice.
        strong = lambda x: lax.convert_element_type(x, x.dtype)  # noqa: E731
        return jax.tree.map(strong, params_of(self._build(_Keys(key))))

    def apply(
        self,
        params: Params,
        clip: Shaped[Array, "..."],
        *,
        key: Array | None = None,
        capture: bool = False,
        scan: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "batch num_classes"], dict[str, Any]]:
        """Returns logits and features of normalised clips, see `MViT.forward`.

        With a `key` the model is in training: drop path and dropout draw from it, block i from
        `fold_in(key, i)`. Without one it is in inference.

        Raises:
          UserError: parameters of another architecture, or clips that the model does not take.
        """
        model = self.module(params)
        return model.forward(clip, key=key, capture=capture, scan=scan, remat=remat)

    def module(self, params: Params) -> MViT:
        """Returns the module with these parameters, which it shares.

        Raises:
          UserError: the parameters are of another architecture.
        """
        graph, abstract = _structure(self)
        difference = first_difference(nnx.to_pure_dict(abstract), params)
        if difference:
            raise UserError(f"these parameters are of another architecture: {difference}")
        state = jax.tree.map(lambda x: x, abstract)  # a copy: replacing is in place
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(params))
        return nnx.merge(graph, state)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter by its path, "blocks/3/attn/qkv/kernel"."""
        _, abstract = _structure(self)
        leaves = _by_path(nnx.to_pure_dict(abstract))
        return {path: tuple(leaves[path].shape) for path in sorted(leaves)}

    def cost(self) -> cost.Cost:
        """Returns parameters, and multiply-adds for one clip of the nominal size.

        By formula, or with custom modules counted: parameters of the real ones, multiply-adds of
        every product in the traced program (see `cost.products`).
        """
        if not self.is_custom:
            return cost.cost(self.config)
        c = self.config
        clip = jax.ShapeDtypeStruct((1, c.frames, c.size, c.size, 3), jnp.float32)
        model = dataclasses.replace(self, ops="reference")  # of platforms' forms, not all run
        params = jax.eval_shape(model.init, jax.random.key(0))
        program = jax.make_jaxpr(lambda params, clip: model.apply(params, clip)[0])(params, clip)
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
    """Returns the one handle of a model: architecture, custom modules, dtype and operations.

    `model = functional(config, attention=Mine)`, then `model.init(key)` makes parameters, a nested
    dict, and `model.apply(params, clips)` gives logits and features. See `Functional` for the
    arguments and `docs/variants.md` for classes of your own. With `ops="reference"` every operation
    is computed by its definition, and `jax.jvp` and `jax.hessian` work.
    """
    return Functional(config, block, attention, pooling, jnp.dtype(dtype), ops)


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
    """Returns a published variant as a module with fresh weights, in inference mode.

    `create_model("mvit_b_16x4", num_classes=10, rngs=nnx.Rngs(0))`; any field of `MViTConfig` can
    be overridden, and modules replaced (see `MViT`).
    """
    config = variant(name, **overrides)
    model = functional(
        config, block=block, attention=attention, pooling=pooling, dtype=dtype, ops=ops
    )
    return model._build(rngs)


def params_of(module: nnx.Module) -> Params:
    """Returns a module's parameters as a nested dict with string keys, sharing its arrays."""
    return _with_string_keys(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def first_difference(model: Any, other: Any) -> str | None:
    """Names the first tensor in which two trees of arrays or shapes differ; None if none does."""
    ours, theirs = (
        {path: list(leaf.shape) for path, leaf in _by_path(tree).items()} for tree in (model, other)
    )
    for name in sorted({*ours, *theirs}):
        mine, there = ours.get(name, "missing"), theirs.get(name, "missing")
        if mine != there:
            return f"{name} is {there} there and {mine} in this model"
    return None


def _by_path(tree: Any) -> dict[str, Any]:
    # Not flax's `flatten_dict`: a checkpoint's metadata is no dict, and its keys may be numbers.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


class _Keys(nnx.Rngs):
    """The keys of `nnx.Rngs(params=key)`, the same ones, counted in Python.

    The counter of `nnx.Rngs` is an array: under a trace each draw takes longer than the one before,
    two minutes in all for the shapes of MViTv2-H (flax 0.12.8).
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
