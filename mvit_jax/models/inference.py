"""Batched inference: logits of any number of clips, compiled for a few batch sizes."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped, UInt8

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import Functional, Params

BUCKETS = (1, 2, 4, 8, 16)

Colour = Sequence[float]  # one value each for red, green and blue
Output = Callable[[Array, dict[str, Any]], Array]


class Inference:
    """A compiled model that computes the logits of batches of any size.

        run = mvit_jax.Inference(functional(config, dtype=jnp.bfloat16), params)
        logits = run(clips)  # float32 [batch, num_classes]

    The logits equal those of `apply`. The model is compiled once per batch size in `buckets`. A
    batch is padded with zeros to the next bucket; a batch larger than all buckets is split. Use few
    buckets, as compiling takes longer than computing many clips. The weights of linear layers and
    convolutions are converted to `model.dtype` once, not for every batch.
    """

    def __init__(
        self,
        model: Functional,
        params: Params,
        *,
        mean: Colour | None = None,
        std: Colour | None = None,
        buckets: Sequence[int] = BUCKETS,
        devices: Sequence[Any] | None = None,
        output: Output | None = None,
        **options: Any,
    ) -> None:
        """Converts the parameters and places them on the devices, if `devices` is set.

        The first batch of each bucket's size compiles the model.

        Args:
          model: the model; logits are float32, or float64 if `model.dtype` is float64.
          params: from `model.init`, `params_of` or a checkpoint.
          mean: the mean of each colour, in [0, 1]; required for uint8 clips.
          std: the standard deviation of each colour; required with `mean`.
          buckets: the batch sizes to compile for.
          devices: the devices to shard batches over, such as `jax.devices()`. Parameters are
            replicated, and buckets are rounded up to multiples of the number of devices. None
            computes on the device of `params`.
          output: a function of the logits and features of `model.apply`, which returns an array
            with a row per clip in place of the logits.
          **options: passed to `model.apply`.

        Raises:
          UserError: `buckets` is empty or has a value below 1; only one of `mean` and `std` is set.
        """
        if not buckets or min(buckets) < 1:
            raise UserError(f"buckets must be batch sizes of at least 1, not {tuple(buckets)}")
        count = len(devices or (None,))
        self.model = model
        self.params = with_dtype(params, model.dtype)
        self.buckets = tuple(sorted({-(-size // count) * count for size in buckets}))
        self._accepts_uint8 = mean is not None
        forward = forward_function(model, mean=mean, std=std, output=output, **options)
        self._mesh = None
        if devices is None:
            self._apply = jax.jit(forward)
        else:
            self._mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
            replicated = NamedSharding(self._mesh, PartitionSpec())
            self.params = jax.device_put(self.params, replicated)
            self._sharded = NamedSharding(self._mesh, PartitionSpec("data"))
            self._apply = jax.jit(forward, out_shardings=replicated)

    def __call__(
        self, clips: Shaped[Array, "batch *clip"] | Shaped[np.ndarray, "batch *clip"]
    ) -> Float[Array, "batch num_classes"]:
        """Returns the logits of `[batch, T, H, W, 3]` clips or `[batch, H, W, 3]` images.

        Clips are floats, normalised to (value / 255 - mean) / std, or uint8 if `mean` and `std` are
        set. Computation is asynchronous, as always in JAX: prepare the next batch before
        reading the logits of the current batch.

        Raises:
          UserError: the clips have an unsupported shape or dtype.
        """
        if clips.dtype == np.uint8 and not self._accepts_uint8:
            raise UserError(
                "the clips are uint8: normalise them, or pass mean and std to Inference"
            )
        largest = self.buckets[-1]
        parts: list[Array] = []
        for start in range(0, len(clips), largest):
            if len(parts) > 1:
                parts[-2].block_until_ready()  # limits the device's queue to two batches
            parts.append(self._part(clips[start : start + largest]))
        if not parts:
            return jnp.zeros((0, self.model.config.num_classes))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _part(self, clips: Any) -> Array:
        """Returns the logits of clips that fit into a bucket."""
        count = len(clips)
        missing = next(size for size in self.buckets if size >= count) - count
        if missing:
            # NumPy arrays are padded on the host. Padding on a device would compile one program
            # per batch size.
            pad = np.pad if isinstance(clips, np.ndarray) else jnp.pad
            clips = pad(clips, [(0, missing), *[(0, 0)] * (clips.ndim - 1)])
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if self._mesh is not None:
                clips = jax.device_put(clips, self._sharded)
            logits = self._apply(self.params, clips)
            return logits[:count] if missing else logits


def forward_function(
    model: Functional,
    *,
    mean: Colour | None = None,
    std: Colour | None = None,
    output: Output | None = None,
    **options: Any,
) -> Callable[[Params, Array], Array]:
    """Returns the function `forward(params, clips) -> logits`; see `Inference` for the arguments.

    With `mean` and `std` the function normalises uint8 clips.

    Raises:
      UserError: only one of `mean` and `std` is set.
    """
    if (mean is None) != (std is None):
        raise UserError("only one of mean and std is set: pass both, or neither")

    def forward(params: Params, clips: Array) -> Array:
        if mean is not None and std is not None and clips.dtype == jnp.uint8:
            clips = normalise(clips, tuple(mean), tuple(std), model.dtype)
        logits, features = model.apply(params, clips, **options)
        return logits if output is None else output(logits, features)

    return forward


def with_dtype(params: Params, dtype: Any) -> Params:
    """Returns parameters with the kernels and biases of linear layers and convolutions in `dtype`.

    Results stay the same, bit for bit, as the model converts these parameters before using them.
    All other parameters are returned as is: norms compute in float32, and positional embeddings are
    interpolated before the model converts them.
    """
    convert = functools.partial(jnp.asarray, dtype=dtype)
    return {
        name: with_dtype(leaf, dtype)
        if isinstance(leaf, dict)
        else convert(leaf)
        if name in ("kernel", "bias") and "kernel" in params
        else jnp.asarray(leaf)
        for name, leaf in params.items()
    }


def normalise(
    clip: UInt8[Array, "*batch 3"], mean: tuple[float, ...], std: tuple[float, ...], dtype: Any
) -> Float[Array, "*batch 3"]:
    """Returns uint8 values normalised to (value / 255 - mean) / std, per colour channel."""
    shape = (1,) * (clip.ndim - 1) + (3,)
    scale = jnp.asarray([1 / (255 * s) for s in std], dtype).reshape(shape)
    offset = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], dtype)
    return clip.astype(dtype) * scale - offset.reshape(shape)
