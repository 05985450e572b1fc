"""A trained model as one file that JAX runs without this package: StableHLO, by `jax.export`."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from mvit_jax.common.errors import UserError
from mvit_jax.common.files import write_whole
from mvit_jax.models.functional import Functional, Params
from mvit_jax.models.inference import Colour, forward_function, with_dtype
from mvit_jax.models.ops.dispatch import without_kernels
from mvit_jax.models.plan import MViTConfig

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LARGEST = 2**31 - 2**24  # bytes: the format counts in 32 bits with a sign


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
    """Writes a model, weights and all, as one file. To run it needs JAX and nothing else:

        from jax import export
        model = jax.jit(export.deserialize(open(path, "rb").read()).call)
        logits = model(clips)  # float32 [batch, num_classes]

    With `mean` and `std` it takes uint8 clips, RGB from 0 to 255, and normalises them; without, it
    takes float32 ones that are normalised already, (value / 255 - mean) / std. Clips are `[batch,
    T, H, W, 3]`, for models of images `[batch, H, W, 3]`, of the config's frames and size.

    Args:
      model: the handle; it computes in `model.dtype`, which most of its weights are kept in.
      params: of `model.init`, `params_of` or a checkpoint.
      path: the file.
      mean: of the colours, from 0 to 1.
      std: their standard deviation.
      batch: clips at a time; any number where not given.
      platforms: some of "cpu", "cuda", "rocm" and "tpu"; the one that JAX runs on where not given.
      **options: more arguments of `model.apply`.

    Returns:
      What was written; `in_avals`, `out_avals` and `platforms` describe it.

    Raises:
      UserError: the model is too large for the format, there is no such platform, or the file
        cannot be written.
    """
    platforms = tuple(platforms or [export.default_export_platform()])
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown:
        raise UserError(f"platforms are {', '.join(PLATFORMS)}, not {', '.join(unknown)}")
    weights = with_dtype(jax.device_get(params), model.dtype)  # wherever they were
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    if size > LARGEST:
        raise UserError(
            f"{path} would hold {size / 1e9:.1f} GB of weights, and the format ends at "
            f"{LARGEST / 1e9:.1f} GB: use bfloat16"
        )
    forward = forward_function(model, mean=mean, std=std, **options)
    clip = clip_shape(model.config, np.uint8 if mean is not None else np.float32, batch)
    program = exported(functools.partial(forward, weights), platforms, clip)
    write_whole(path, bytes(program.serialize()))
    return program


def exported(function: Callable[..., Any], platforms: tuple[str, ...], *shapes: Any) -> Any:
    """A function for some platforms, of arguments of these shapes; with kernels for TPUs alone."""
    with contextlib.nullcontext() if platforms == ("tpu",) else without_kernels():
        return export.export(jax.jit(function), platforms=platforms)(*shapes)


def clip_shape(config: MViTConfig, dtype: Any, batch: int | None = None) -> jax.ShapeDtypeStruct:
    """Of the clips or images that a model takes; `batch` None stands for any number."""
    rows = export.symbolic_shape("batch")[0] if batch is None else batch
    time = () if config.frames == 1 else (config.frames,)
    return jax.ShapeDtypeStruct((rows, *time, config.size, config.size, 3), dtype)
