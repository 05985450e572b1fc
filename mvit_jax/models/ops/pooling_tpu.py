"""Pooling of token sequences on TPUs, as Pallas kernels that read and write every token once.

XLA pools grids, so it cuts the class token off first, unfolds the rest, and brings it into the
layout that its convolutions like and back: compiled for a v5e, pools and the copies around them
moved half the bytes of the first blocks. Here a frame at a time comes into fast memory, is spread
there over a frame with borders, and rows that lie a stride apart are multiplied by their tap and
added, in float32. The class token passes by.

Frames come as blocks of rows of the sequence `[batch, 1 + THW, channels]`, in which a class token
shifts every frame by one row: the row that a block lacks is in the block after it.
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

from mvit_jax.models.ops.attention_tpu import memory
from mvit_jax.models.plan import Pool, Triple

Tokens = Float[Array, "batch _tokens channels"]
Taps = Float[Array, "taps channels"]
LANES = 128  # channels that go at a time: rows at any place can be read of no more
TILE = 16  # rows of a tile of 16-bit numbers; blocks of rows begin at multiples of it
WHOLE = 2048  # rows of a sequence that come at once where frames are no multiples of a tile


@dataclass(frozen=True)
class _Layout:
    """Where the rows of frames lie: in blocks that come in, in the frame with borders, and out."""

    plan: Pool
    grid: Triple
    output: Triple
    first: int  # 1 with a class token
    whole: bool  # whether all frames come at once, else one by one

    @property
    def frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def rows(self) -> int:  # of a block
        return self.first + self.grid[0] * self.frame if self.whole else self.frame

    @property
    def shifted(self) -> bool:
        """Whether a frame's last row is in the block after its own."""
        return self.first == 1 and not self.whole

    @property
    def blocks(self) -> int:
        return 1 if self.whole else self.grid[0] + self.first

    @property
    def bordered(self) -> tuple[int, int]:
        """Height and width of a frame with borders; windows may end beyond the padding."""
        _, h, w = (
            max(n + 2 * p, (m - 1) * s + k)
            for n, p, m, s, k in zip(
                self.grid, self.plan.padding, self.output, self.plan.stride, self.plan.kernel,
                strict=True,
            )
        )  # fmt: skip
        return h, w

    def corner(self, row):
        """Where the windows of one row of the output begin in the bordered frame."""
        return row * (self.plan.stride[1] * self.bordered[1])

    def window(self, corner, dy: int, dx: int):
        """The places of the bordered frame that one tap reads for one row of the output."""
        start = corner + (dy * self.bordered[1] + dx)
        stride = self.plan.stride[2]
        return pl.ds(start, self.output[2], stride) if stride > 1 else pl.ds(start, self.output[2])

    def inside(self, row):
        """The places of one row of the frame in the bordered one."""
        start = (row + self.plan.padding[1]) * self.bordered[1] + self.plan.padding[2]
        return pl.ds(start, self.grid[2])

    def pooled(self, frame, row):
        """The places of one row of the output's frame in the output's sequence."""
        _, h, w = self.output
        return pl.ds(self.first + (frame * h + row) * w, w)

    def meets(self, frame, dt: int):
        """The output's frame that a frame adds to through a tap, and whether there is one."""
        place = jnp.int32(frame + self.plan.padding[0] - dt)
        stride = jnp.int32(self.plan.stride[0])
        # Not // and %: rounding down asks for the sign, which Pallas cannot take without a TPU.
        out = lax.div(place, stride)
        there = (place >= 0) & (lax.rem(place, stride) == 0) & (out < self.output[0])
        return jnp.clip(out, 0, self.output[0] - 1), there


def fits(x: Tokens, grid: Triple, plan: Pool) -> bool:
    """Whether the kernels take this pool."""
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
    # What the backward pass holds: blocks that come and go twice, the rest in float32.
    held = (4 * 2 + 2 * 4) * layout.rows + 2 * 4 * math.prod(layout.bordered) + (4 + 2 * 2) * pooled
    return layout if held * LANES < memory() else None


@functools.partial(jax.jit, static_argnames=("grid", "plan", "interpret"))
def forward(
    x: Tokens, weight: Taps, *, grid: Triple, plan: Pool, interpret: bool = False
) -> Tokens:
    """Tokens pooled by `weight`, class token (where there is one) first and as it was."""
    layout = _layout(x, grid, plan)
    assert layout is not None
    rows = layout.first + math.prod(layout.output)
    pooled = jax.ShapeDtypeStruct((x.shape[0], rows, x.shape[2]), x.dtype)
    return _call(_forward, layout, [x, weight], {"y": pooled}, interpret)[0]


@functools.partial(jax.jit, static_argnames=("grid", "plan", "interpret"))
def backward(
    x: Tokens, weight: Taps, gradient: Tokens, *, grid: Triple, plan: Pool, interpret: bool = False
) -> tuple[Tokens, Taps]:
    """Gradients of tokens and taps, from that of what `forward` gives."""
    layout = _layout(x, grid, plan)
    assert layout is not None
    taps = jax.ShapeDtypeStruct((math.prod(plan.kernel), x.shape[2]), jnp.float32)
    dx, dw = _call(_backward, layout, [x, weight, gradient], {"dx": x, "dw": taps}, interpret)
    return dx, dw.astype(weight.dtype)


def _call(kernel, layout: _Layout, arrays: list, outputs: dict, interpret: bool):
    """Runs a kernel over channels, clips and blocks of frames; it gets its blocks by name."""
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
        inputs["after"] = x
        specs["after"] = pl.BlockSpec(
            (1, TILE, width), lambda c, clip, i: (clip, jnp.minimum((i + 1) * step, last), c)
        )
    if gradient:
        inputs["dy"] = gradient[0]
    pooled = layout.first + math.prod(layout.output)
    specs["y"] = specs["dy"] = pl.BlockSpec((1, pooled, width), lambda c, clip, i: (clip, 0, c))
    bordered = math.prod(layout.bordered)
    scratch: dict[str, tuple[int, ...]] = {
        "frame": (bordered, width),
        "rows": (layout.rows + TILE, width),
        "pooled": (pooled, width),
    }
    if gradient:
        scratch["dframe"] = (bordered, width)
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
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=memory()
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
            out, there = layout.meets(time, dt)

            @pl.when(there)
            def _(dt=dt, out=out):
                @pl.loop(0, layout.output[1])
                def _(row):
                    place = layout.pooled(out, row)
                    total = pooled[place]
                    corner = layout.corner(row)
                    for tap, dy, dx in _taps(layout.plan, dt):
                        total += (
                            refs["frame"][layout.window(corner, dy, dx)] * refs["w"][tap : tap + 1]
                        )
                    pooled[place] = total

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
    if layout.shifted:  # the last row of the frame before
        rows[0:8] = rows[layout.rows : layout.rows + 8]
    if layout.first:

        @pl.when(index == 0)
        def _():
            rows[0:1] = pooled[0:1]

    def frame(time, start):
        _unfold(refs["rows"], refs["frame"], layout, start)
        dframe[...] = jnp.zeros_like(dframe)
        for dt in range(layout.plan.kernel[0]):
            out, there = layout.meets(time, dt)

            @pl.when(there)
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
    """A block of the sequence in float32, with the first rows of the block after it."""
    refs["rows"][0 : layout.rows] = refs["x"][0].astype(jnp.float32)
    if layout.shifted:
        refs["rows"][layout.rows :] = refs["after"][0].astype(jnp.float32)


def _unfold(rows, frame, layout: _Layout, start) -> None:
    """Spreads a frame's rows over the frame with borders, which stay zero."""

    @pl.loop(0, layout.grid[1])
    def _(row):
        frame[layout.inside(row)] = rows[pl.ds(start + row * layout.grid[2], layout.grid[2])]


def _each_frame(layout: _Layout, function) -> None:
    """Calls `function` with each frame of a block and the place of its first row."""
    if layout.whole:

        @pl.loop(0, layout.grid[0], unroll=True)  # traced once, which takes most of the time
        def _(time):
            function(time, layout.first + time * layout.frame)

        return
    time = pl.program_id(2)

    @pl.when(time < layout.grid[0])
    def _():
        function(time, layout.first)


def _taps(plan: Pool, dt: int):
    _, height, width = plan.kernel
    for dy, dx in itertools.product(range(height), range(width)):
        yield (dt * height + dy) * width + dx, dy, dx
