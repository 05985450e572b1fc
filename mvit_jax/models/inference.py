"""A model in use: logits of any number of clips, compiled for few batch sizes."""

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

Colour = Sequence[float]  # one value for each of red, green and blue


class Inference:
    """Logits of clips, as fast as the device gives them.

        run = mvit_jax.Inference(functional(config, dtype=jnp.bfloat16), params)
        logits = run(clips)  # float32 [batch, num_classes]

    The logits are those of `apply`. It compiles once for each of a few batch sizes, the buckets: a
    batch is filled up with zeros to the next one, and one beyond the largest is cut. A compilation
    takes longer than many clips, so few buckets are good where batches vary little. The weights of
    linear layers and convolutions are converted to `model.dtype` once, not with every batch.
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
        **options: Any,
    ) -> None:
        """Places the weights; nothing is compiled before the first batch.

        Args:
          model: the handle; it computes in `model.dtype`, logits are float32 in any case.
          params: of `model.init`, `params_of` or a checkpoint.
          mean: of the colours, from 0 to 1, where uint8 clips are to be taken.
          std: their standard deviation.
          buckets: batch sizes to compile for.
          devices: to split batches over, `jax.devices()` say, each with all of the weights; buckets
            are rounded up to multiples of them. Where not given, everything is where `params` is.
          **options: more arguments of `model.apply`.

        Raises:
          UserError: no bucket, one below 1, or one of `mean` and `std` without the other.
        """
        if not buckets or min(buckets) < 1:
            raise UserError(f"buckets are batch sizes of at least 1, not {tuple(buckets)}")
        count = len(devices or (None,))
        self.model = model
        self.params = with_dtype(params, model.dtype)
        self.buckets = tuple(sorted({-(-size // count) * count for size in buckets}))
        self._takes_bytes = mean is not None
        forward = forward_function(model, mean=mean, std=std, **options)
        self._mesh = None
        if devices is None:
            self._apply = jax.jit(forward)
        else:
            self._mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            self.params = jax.device_put(self.params, everywhere)
            self._rows = NamedSharding(self._mesh, PartitionSpec("data"))
            self._apply = jax.jit(forward, out_shardings=everywhere)

    def __call__(
        self, clips: Shaped[Array, "batch *clip"] | Shaped[np.ndarray, "batch *clip"]
    ) -> Float[Array, "batch num_classes"]:
        """Logits of `[batch, T, H, W, 3]` clips or `[batch, H, W, 3]` images.

        Normalised ones, (value / 255 - mean) / std, or with `mean` and `std` also uint8 ones from 0
        to 255. Like every computation of JAX it does not wait for the result: where batches go one
        after the other, prepare the next one before reading the logits of the last.

        Raises:
          UserError: clips that the model does not take.
        """
        if clips.dtype == np.uint8 and not self._takes_bytes:
            raise UserError("these clips are uint8: give Inference the mean and std, or normalise")
        largest = self.buckets[-1]
        parts: list[Array] = []
        for start in range(0, len(clips), largest):
            if len(parts) > 1:
                parts[-2].block_until_ready()  # no more than two batches wait on the device
            parts.append(self._part(clips[start : start + largest]))
        if not parts:
            return jnp.zeros((0, self.model.config.num_classes))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _part(self, clips: Any) -> Array:
        """Logits of clips that fit into a bucket."""
        count = len(clips)
        missing = next(size for size in self.buckets if size >= count) - count
        if missing:
            # Of NumPy arrays on the host: on the device each number would be another program.
            pad = np.pad if isinstance(clips, np.ndarray) else jnp.pad
            clips = pad(clips, [(0, missing), *[(0, 0)] * (clips.ndim - 1)])
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if self._mesh is not None:
                clips = jax.device_put(clips, self._rows)
            logits = self._apply(self.params, clips)
            return logits[:count] if missing else logits


def forward_function(
    model: Functional, *, mean: Colour | None = None, std: Colour | None = None, **options: Any
) -> Callable[[Params, Array], Array]:
    """Returns `forward(params, clips) -> logits`; see `Inference` for the arguments.

    With `mean` and `std` it normalises uint8 clips.
    """
    if (mean is None) != (std is None):
        raise UserError("mean and std go together: give both, or neither")

    def forward(params: Params, clips: Array) -> Array:
        if mean is not None and std is not None and clips.dtype == jnp.uint8:
            clips = normalise(clips, tuple(mean), tuple(std), model.dtype)
        return model.apply(params, clips, **options)[0]

    return forward


def with_dtype(params: Params, dtype: Any) -> Params:
    """Parameters with the kernels and biases of linear layers and convolutions in `dtype`.

    Those are what the model converts before anything else, so results stay the same, bit for bit.
    Norms and tables of positions stay as they are: they work in float32, or are interpolated first.
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
    """Bytes to (value / 255 - mean) / std, per colour channel."""
    per_colour = (1,) * (clip.ndim - 1) + (3,)
    scale = jnp.asarray([1 / (255 * s) for s in std], dtype).reshape(per_colour)
    offset = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], dtype)
    return clip.astype(dtype) * scale - offset.reshape(per_colour)
