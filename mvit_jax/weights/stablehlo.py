"""Export of a trained model to a StableHLO file, which JAX runs without this package."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import write_atomically
from mvit_jax.models.functional import Functional, Params
from mvit_jax.models.inference import Colour, forward_function, with_dtype
from mvit_jax.models.ops.dispatch import without_kernels
from mvit_jax.models.plan import MViTConfig

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LARGEST = 2**31 - 2**24  # bytes: the format has signed 32-bit offsets


def save_stablehlo(
    model: Functional,
    params: Params,
    path: str | os.PathLike[str],
    *,
    mean: Colour | None = None,
    std: Colour | None = None,
    batch: int | None = None,
    platforms: Sequence[str] | None = None,
    **options: Any,
) -> export.Exported:
    """Writes a model with its weights to a StableHLO file, which needs only JAX to run.

        from jax import export
        model = jax.jit(export.deserialize(open(path, "rb").read()).call)
        logits = model(clips)  # float32 [batch, num_classes]

    The input is clips `[batch, T, H, W, 3]` or images `[batch, H, W, 3]`, with the config's frames
    and size. With `mean` and `std` the input is uint8, RGB from 0 to 255, and the program
    normalises it. Without them the input is float32, normalised beforehand: (value / 255 - mean) /
    std.

    Args:
      model: the model. `model.dtype` is the dtype of the computation and of most stored weights.
      params: parameters of `model.init`, `params_of` or a checkpoint.
      path: the file to write.
      mean: mean of the colours, in the range from 0 to 1.
      std: standard deviation of the colours, in the same range.
      batch: batch size; None allows any.
      platforms: some of "cpu", "cuda", "rocm" and "tpu"; by default the one that JAX uses now.
      **options: more arguments of `model.apply`.

    Returns:
      The exported program; `in_avals`, `out_avals` and `platforms` describe it.

    Raises:
      UserError: the model is too large for the format, a platform is unknown, only one of `mean`
        and `std` is set, or the file cannot be written.
    """
    platforms = tuple(platforms or [export.default_export_platform()])
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown:
        raise UserError(f"platforms must be of {', '.join(PLATFORMS)}, not {', '.join(unknown)}")
    weights = with_dtype(jax.device_get(params), model.dtype)  # parameters may be on any device
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    if size > LARGEST:
        raise UserError(
            f"{path} would hold {size / 1e9:.1f} GB of weights, but the format's limit is "
            f"{LARGEST / 1e9:.1f} GB: use bfloat16"
        )
    forward = forward_function(model, mean=mean, std=std, **options)
    clip = clip_shape(model.config, np.uint8 if mean is not None else np.float32, batch)
    program = exported(functools.partial(forward, weights), platforms, clip)
    write_atomically(path, bytes(program.serialize()))
    return program


def exported(function: Callable[..., Any], platforms: tuple[str, ...], *shapes: Any) -> Any:
    """Exports a function for platforms and argument shapes.

    Custom kernels are used only if TPU is the single platform.
    """
    with contextlib.nullcontext() if platforms == ("tpu",) else without_kernels():
        return export.export(jax.jit(function), platforms=platforms)(*shapes)


def clip_shape(config: MViTConfig, dtype: Any, batch: int | None = None) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of a model's input; if `batch` is None, any batch size is allowed."""
    rows = export.symbolic_shape("batch")[0] if batch is None else batch
    time = () if config.frames == 1 else (config.frames,)
    return jax.ShapeDtypeStruct((rows, *time, config.size, config.size, 3), dtype)
