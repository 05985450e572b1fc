"""The convolution of the patch embedding (MViT, section 3.2.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from mvit_jax.models.ops.dispatch import saving_inputs, uses_reference
from mvit_jax.models.plan import Triple, conv_output

Clip = Float[Array, "batch T H W rgb"]
Kernel = Float[Array, "kt kh kw rgb channels"]
Grid = Float[Array, "batch time height width channels"]


def convolve(clip: Clip, kernel: Kernel, stride: Triple, padding: Triple) -> Grid:
    """Returns the strided convolution of a zero-padded clip; output sizes are rounded down."""
    return (_plain if uses_reference() else _convolve)(clip, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(clip: Clip, kernel: Kernel, stride: Triple, padding: Triple) -> Grid:
    return lax.platform_dependent(
        clip,
        kernel,
        cpu=functools.partial(_by_columns, stride=stride, padding=padding),
        tpu=functools.partial(_by_cubes, stride=stride, padding=padding),
        default=functools.partial(_plain, stride=stride, padding=padding),
    )


def _plain(clip, kernel, stride: Triple, padding: Triple):
    return lax.conv_general_dilated(
        clip,
        kernel,
        window_strides=stride,
        padding=[(p, p) for p in padding],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _backward(stride: Triple, padding: Triple, saved: tuple, gradient):
    def default(clip, kernel, gradient):
        plain = functools.partial(_plain, stride=stride, padding=padding)
        return jax.vjp(plain, clip, kernel)[1](gradient)

    def cpu(clip, kernel, gradient):
        columns = _columns(clip, kernel.shape, stride, padding)
        axes = ((0, 1, 2, 3), (0, 1, 2, 3))
        by_kernel = lax.dot_general(columns, gradient, (axes, ((), ())))
        return default(clip, kernel, gradient)[0], by_kernel.reshape(kernel.shape)

    def tpu(clip, kernel, gradient):
        function = functools.partial(_by_cubes, stride=stride, padding=padding)
        return jax.vjp(function, clip, kernel)[1](gradient)

    return lax.platform_dependent(*saved, gradient, cpu=cpu, tpu=tpu, default=default)


_convolve.defvjp(saving_inputs(_convolve), _backward)


def _by_columns(clip, kernel, stride: Triple, padding: Triple):
    """Convolves on CPUs by one matrix product over all windows (im2col).

    The forward pass takes 0.4 to 0.7 of the processor time of XLA's convolution. With the kernel's
    gradient it is 0.3 to 0.5 (one clip, and 8 images, of 224 x 224 pixels; 2026-11-23). The
    backward pass rematerialises the windows, which take about 5 times the clip's memory.
    """
    columns = _columns(clip, kernel.shape, stride, padding)
    return columns @ kernel.reshape(-1, kernel.shape[-1])


def _by_cubes(clip, kernel, stride: Triple, padding: Triple):
    """Convolves on TPUs with stride 1, after moving cubes of the stride's size into the channels.

    TPUs pad 3 channels to 128 lanes: an input of 19 MB became 822 MB. In MViT-B 16x4 a cube makes
    96 channels. The kernel is padded with zeros to a multiple of the stride. A NaN or an infinity
    in the clip spreads along its row of pixels.
    """
    size, taps = clip.shape[1:4], kernel.shape[:3]
    cubes = [-(-k // s) for k, s in zip(taps, stride, strict=True)]
    out = conv_output(size, taps, stride, padding)
    whole = [(n - 1 + c) * s for n, c, s in zip(out, cubes, stride, strict=True)]
    ends = [(p, m - n - p, 0) for p, m, n in zip(padding, whole, size, strict=True)]
    x = lax.pad(clip, jnp.zeros((), clip.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
    t, h, w = stride
    # A product with a matrix of zeros and ones assigns pixel columns to cubes. A transpose would be
    # slow, as a TPU moves data across lanes slowly.
    assign = jnp.asarray(np.eye(x.shape[3]).reshape(-1, x.shape[3] // w, w), x.dtype)
    x = rearrange(x, "b (T t) (H h) W rgb -> b T t H h W rgb", t=t, h=h)
    exact = None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    x = jnp.einsum("bTtHhvc,vWw->bTHWthwc", x, assign, precision=exact)
    x = rearrange(x, "b T H W t h w rgb -> b T H W (t h w rgb)")
    padded = [(0, c * s - k) for c, s, k in zip(cubes, stride, taps, strict=True)]
    kernel = jnp.pad(kernel, [*padded, (0, 0), (0, 0)])
    kernel = rearrange(kernel, "(T t) (H h) (W w) rgb c -> T H W (t h w rgb) c", t=t, h=h, w=w)
    return _plain(x, kernel, (1, 1, 1), (0, 0, 0))


def _columns(clip, kernel: tuple[int, ...], stride: Triple, padding: Triple):
    """Returns the windows `[batch, time, height, width, kt * kh * kw * rgb]`."""
    x = jnp.pad(clip, [(0, 0), *((p, p) for p in padding), (0, 0)])
    for axis in (3, 2, 1):
        size, step = kernel[axis - 1], stride[axis - 1]
        span = (x.shape[axis] - size) // step * step + 1
        taps = [lax.slice_in_dim(x, i, i + span, step, axis) for i in range(size)]
        x = jnp.concatenate(taps, axis=-1)
    return x
