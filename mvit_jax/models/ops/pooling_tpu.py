"""Pooling of token sequences on TPUs, as Pallas kernels that read and write every token once.

XLA's convolutions pool grids, not sequences. XLA therefore slices the class token off, reshapes the
other tokens, and copies them into the convolution's layout and back. Compiled for a v5e, pooling
and these copies moved half the bytes of the first blocks. Here a kernel loads one frame at a time
into VMEM and copies the frame into a padded frame. For each tap, the kernel multiplies strided rows
of the padded frame by the tap's weight and adds up the products in float32. The class token passes
through unchanged.

Input blocks are H * W rows of the sequence `[batch, 1 + THW, channels]`. A class token shifts every
frame by one row, so the last row of a frame is in the next block. A short sequence (`WHOLE`) is one
block.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mvit_jax.models.ops.attention_tpu import vmem_budget
from mvit_jax.models.plan import Pool, Triple

Tokens = Float[Array, "batch _tokens channels"]
Taps = Float[Array, "taps channels"]
LANES = 128  # channels of a block, the most for which rows can be read at arbitrary offsets
TILE = 16  # rows of a tile of 16-bit values; blocks of rows begin at multiples of a tile
WHOLE = 2048  # maximum rows of a sequence that is loaded as one block, not frame by frame


@dataclass(frozen=True)
class _Layout:
    """The layout of a frame's rows in the input blocks, the padded frame and the output."""

    plan: Pool
    grid: Triple
    output: Triple
    first: int  # 1 with a class token
    whole: bool  # a block has all frames, not one frame

    @property
    def frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def rows(self) -> int:  # rows of a block
        return self.first + self.grid[0] * self.frame if self.whole else self.frame

    @property
    def shifted(self) -> bool:
        """True if a frame's last row is in the next block."""
        return self.first == 1 and not self.whole

    @property
    def blocks(self) -> int:
        return 1 if self.whole else self.grid[0] + self.first

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the padded frame; it contains windows that exceed the padding."""
        _, h, w = (
            max(n + 2 * p, (m - 1) * s + k)
            for n, p, m, s, k in zip(
                self.grid, self.plan.padding, self.output, self.plan.stride, self.plan.kernel,
                strict=True,
            )
        )  # fmt: skip
        return h, w

    def corner(self, row):
        """Returns the index in the padded frame at which the windows of an output row begin."""
        return row * (self.plan.stride[1] * self.padded[1])

    def window(self, corner, dy: int, dx: int):
        """Returns the slice of the padded frame that a tap reads for a row of the output."""
        start = corner + (dy * self.padded[1] + dx)
        stride = self.plan.stride[2]
        return pl.ds(start, self.output[2], stride) if stride > 1 else pl.ds(start, self.output[2])

    def inside(self, row):
        """Returns the slice of the padded frame that holds a row of the frame."""
        start = (row + self.plan.padding[1]) * self.padded[1] + self.plan.padding[2]
        return pl.ds(start, self.grid[2])

    def pooled(self, frame, row):
        """Returns the slice of the output's sequence that holds a row of an output frame."""
        _, h, w = self.output
        return pl.ds(self.first + (frame * h + row) * w, w)

    def output_frame(self, frame, dt: int):
        """Returns the output frame that reads `frame` by tap `dt`, and True if it exists."""
        position = jnp.int32(frame + self.plan.padding[0] - dt)
        stride = jnp.int32(self.plan.stride[0])
        # Not // and %: floor division uses `sign`, which Pallas cannot lower without a TPU.
        out = lax.div(position, stride)
        exists = (position >= 0) & (lax.rem(position, stride) == 0) & (out < self.output[0])
        return jnp.clip(out, 0, self.output[0] - 1), exists


def fits(x: Tokens, grid: Triple, plan: Pool) -> bool:
    """Returns True if the kernels support this pooling and its buffers fit into VMEM."""
    return x.dtype in (jnp.float32, jnp.bfloat16) and _layout(x, grid, plan) is not None


def _layout(x: Tokens, grid: Triple, plan: Pool) -> _Layout | None:
    if plan.mode not in ("conv", "conv_unshared") or min(plan.output(grid)) < 1:
        return None
    first = x.shape[1] - math.prod(grid)
    whole = x.shape[1] <= WHOLE
    if not whole and grid[1] * grid[2] % TILE:
        return None
    layout = _Layout(plan, grid, plan.output(grid), first, whole)
    pooled = first + math.prod(layout.output)
    # Bytes per lane in the backward pass, of double-buffered blocks and float32 scratch.
    size = (4 * 2 + 2 * 4) * layout.rows + 2 * 4 * math.prod(layout.padded) + (4 + 2 * 2) * pooled
    return layout if size * LANES < vmem_budget() else None


@functools.partial(jax.jit, static_argnames=("grid", "plan", "interpret"))
def forward(
    x: Tokens, weight: Taps, *, grid: Triple, plan: Pool, interpret: bool = False
) -> Tokens:
    """Returns the tokens pooled by the taps `weight`; a class token passes through unchanged."""
    layout = _layout(x, grid, plan)
    assert layout is not None
    rows = layout.first + math.prod(layout.output)
    pooled = jax.ShapeDtypeStruct((x.shape[0], rows, x.shape[2]), x.dtype)
    return _call(_forward, layout, [x, weight], {"y": pooled}, interpret)[0]


@functools.partial(jax.jit, static_argnames=("grid", "plan", "interpret"))
def backward(
    x: Tokens, weight: Taps, gradient: Tokens, *, grid: Triple, plan: Pool, interpret: bool = False
) -> tuple[Tokens, Taps]:
    """Returns the gradients of tokens and taps, from the output's gradient."""
    layout = _layout(x, grid, plan)
    assert layout is not None
    taps = jax.ShapeDtypeStruct((math.prod(plan.kernel), x.shape[2]), jnp.float32)
    dx, dw = _call(_backward, layout, [x, weight, gradient], {"dx": x, "dw": taps}, interpret)
    return dx, dw.astype(weight.dtype)


def _call(kernel, layout: _Layout, arrays: list, outputs: dict, interpret: bool):
    """Runs a kernel for each block of channels, clip and block of frames, with a dict of refs."""
    x, weight, *gradient = arrays
    batch, _, channels = x.shape
    width = min(channels, LANES)
    taps = math.prod(layout.plan.kernel)
    frames = pl.BlockSpec((1, layout.rows, width), lambda c, clip, i: (clip, i, c))
    weights = pl.BlockSpec((taps, width), lambda c, clip, i: (0, c))
    specs = {"x": frames, "dx": frames, "w": weights, "dw": weights}
    inputs = {"x": x, "w": weight.astype(jnp.float32)}
    if layout.shifted:
        last = -(-x.shape[1] // TILE) - 1
        step = layout.rows // TILE
        inputs["next"] = x
        specs["next"] = pl.BlockSpec(
            (1, TILE, width), lambda c, clip, i: (clip, jnp.minimum((i + 1) * step, last), c)
        )
    if gradient:
        inputs["dy"] = gradient[0]
    pooled = layout.first + math.prod(layout.output)
    specs["y"] = specs["dy"] = pl.BlockSpec((1, pooled, width), lambda c, clip, i: (clip, 0, c))
    padded = math.prod(layout.padded)
    scratch: dict[str, tuple[int, ...]] = {
        "frame": (padded, width),
        "rows": (layout.rows + TILE, width),
        "pooled": (pooled, width),
    }
    if gradient:
        scratch["dframe"] = (padded, width)
        scratch["drows"] = (layout.rows + TILE, width)
        scratch["dtaps"] = (taps, layout.output[2], width)

    def body(*refs):
        kernel(dict(zip([*inputs, *outputs, *scratch], refs, strict=True)), layout)

    products = 2 if gradient else 1
    return pl.pallas_call(
        body,
        grid=(-(-channels // width), batch, layout.blocks),
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(s.shape, s.dtype) for s in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_budget(),
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * taps * batch * pooled * channels,
            transcendentals=0,
            bytes_accessed=sum(s.size * s.dtype.itemsize for s in [*arrays, *outputs.values()]),
        ),
        interpret=interpret,
    )(*inputs.values())


def _forward(refs: dict, layout: _Layout) -> None:
    index = pl.program_id(2)
    pooled, y = refs["pooled"], refs["y"]

    @pl.when(index == 0)
    def _():
        refs["frame"][...] = jnp.zeros_like(refs["frame"])
        pooled[...] = jnp.zeros_like(pooled)

    _load_rows(refs, layout)
    if layout.first:

        @pl.when(index == 0)
        def _():
            pooled[0:1] = refs["rows"][0:1]

    def frame(time, start):
        _unfold(refs["rows"], refs["frame"], layout, start)
        for dt in range(layout.plan.kernel[0]):
            out, exists = layout.output_frame(time, dt)

            @pl.when(exists)
            def _(dt=dt, out=out):
                @pl.loop(0, layout.output[1])
                def _(row):
                    output_row = layout.pooled(out, row)
                    total = pooled[output_row]
                    corner = layout.corner(row)
                    for tap, dy, dx in _taps(layout.plan, dt):
                        total += (
                            refs["frame"][layout.window(corner, dy, dx)] * refs["w"][tap : tap + 1]
                        )
                    pooled[output_row] = total

    _each_frame(layout, frame)

    @pl.when(index == layout.blocks - 1)
    def _():
        y[0] = pooled[...].astype(y.dtype)


def _backward(refs: dict, layout: _Layout) -> None:
    index = pl.program_id(2)
    pooled, rows, dframe = refs["pooled"], refs["drows"], refs["dframe"]

    @pl.when(index == 0)
    def _():
        refs["frame"][...] = jnp.zeros_like(refs["frame"])
        pooled[...] = refs["dy"][0].astype(jnp.float32)

    @pl.when((index == 0) & (pl.program_id(1) == 0))
    def _():
        refs["dtaps"][...] = jnp.zeros_like(refs["dtaps"])

    _load_rows(refs, layout)
    if layout.shifted:  # row 0 is the last row of the previous frame
        rows[0:8] = rows[layout.rows : layout.rows + 8]
    if layout.first:

        @pl.when(index == 0)
        def _():
            rows[0:1] = pooled[0:1]

    def frame(time, start):
        _unfold(refs["rows"], refs["frame"], layout, start)
        dframe[...] = jnp.zeros_like(dframe)
        for dt in range(layout.plan.kernel[0]):
            out, exists = layout.output_frame(time, dt)

            @pl.when(exists)
            def _(dt=dt, out=out):
                @pl.loop(0, layout.output[1])
                def _(row):
                    gradient = pooled[layout.pooled(out, row)]
                    corner = layout.corner(row)
                    for tap, dy, dx in _taps(layout.plan, dt):
                        window = layout.window(corner, dy, dx)
                        dframe[window] = dframe[window] + gradient * refs["w"][tap : tap + 1]
                        refs["dtaps"][tap] += refs["frame"][window] * gradient

        @pl.loop(0, layout.grid[1])
        def _(row):
            rows[pl.ds(start + row * layout.grid[2], layout.grid[2])] = dframe[layout.inside(row)]

    _each_frame(layout, frame)
    refs["dx"][0] = rows[0 : layout.rows].astype(refs["dx"].dtype)
    refs["dw"][...] = jnp.sum(refs["dtaps"][...], axis=1)


def _load_rows(refs: dict, layout: _Layout) -> None:
    """Loads a block as float32, with the next block's first rows if frames are shifted."""
    refs["rows"][0 : layout.rows] = refs["x"][0].astype(jnp.float32)
    if layout.shifted:
        refs["rows"][layout.rows :] = refs["next"][0].astype(jnp.float32)


def _unfold(rows, frame, layout: _Layout, start) -> None:
    """Copies a frame's rows into the padded frame, whose padding stays zero."""

    @pl.loop(0, layout.grid[1])
    def _(row):
        frame[layout.inside(row)] = rows[pl.ds(start + row * layout.grid[2], layout.grid[2])]


def _each_frame(layout: _Layout, function) -> None:
    """Calls `function(time, start)` for each frame of a block; `start` is the frame's first row."""
    if layout.whole:

        @pl.loop(0, layout.grid[0], unroll=True)  # a Python loop would trace every frame
        def _(time):
            function(time, layout.first + time * layout.frame)

        return
    time = pl.program_id(2)

    @pl.when(time < layout.grid[0])
    def _():
        function(time, layout.first)


def _taps(plan: Pool, dt: int):
    """Yields the index and offsets (tap, dy, dx) of the taps at `dt`."""
    _, height, width = plan.kernel
    for dy, dx in itertools.product(range(height), range(width)):
        yield (dt * height + dy) * width + dx, dy, dx
