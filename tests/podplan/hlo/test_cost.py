"""Costs counted from the text of compiled programs, against XLA's counts and formulas."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.podplan.hlo import cost, parser
from tests.reference import make_hlo

TPU = Path(__file__).parents[2] / "reference" / "tpu_program.txt"
WIDTH, LAYERS, ROWS = 64, 6, 256


def compile_(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def count(function, *arguments) -> cost.Counts:
    return cost.count(compile_(function, *arguments).as_text())


def ones(*shape: int):
    return jnp.ones(shape, jnp.float32)


def layer(x, weight):
    centred = x - x.mean(-1, keepdims=True)
    return x + jax.nn.gelu(centred @ weight)


def scanned(x, weights):
    return lax.scan(lambda x, weight: (layer(x, weight), None), x, weights)[0].sum()


def unrolled(x, weights):
    return functools.reduce(layer, weights, x).sum()


@pytest.mark.parametrize("gradient", [False, True])
def test_scanned_and_unrolled_programs_have_the_same_totals(gradient):
    functions = [
        jax.grad(function, (0, 1)) if gradient else function for function in (scanned, unrolled)
    ]
    loop, flat = (
        count(function, ones(ROWS, WIDTH), ones(LAYERS, WIDTH, WIDTH)) for function in functions
    )
    assert max(op.trips for op in loop.operations) == LAYERS
    assert max(op.trips for op in flat.operations) == 1
    assert loop.unknown_loops == ()
    assert loop.matrix_flops == flat.matrix_flops
    assert loop.matrix_flops == (3 if gradient else 1) * 2 * LAYERS * ROWS * WIDTH * WIDTH
    np.testing.assert_allclose(loop.flops, flat.flops, rtol=0.02)
    np.testing.assert_allclose(loop.transcendentals, flat.transcendentals, rtol=0.02)
    # A loop moves more bytes: it slices a layer's weights, and for gradients it writes six
    # activations of each layer to stacked arrays and reads them back.
    stacked = gradient * 2 * 2 * 6 * LAYERS * ROWS * WIDTH * 4
    np.testing.assert_allclose(loop.bytes, flat.bytes + stacked, rtol=0.25)


def test_the_bytes_of_a_loop_grow_with_its_trip_count():
    def total(layers: int) -> int:
        return count(jax.grad(scanned), ones(ROWS, WIDTH), ones(layers, WIDTH, WIDTH)).bytes

    assert total(9) - total(6) == total(6) - total(3) > 3 * ROWS * WIDTH * 4


def test_trip_counts_of_nested_loops_are_multiplied():
    def outer(x, weights):
        return lax.fori_loop(0, 4, lambda _, x: lax.scan(inner, x, weights)[0], x)

    def inner(x, weight):
        return jnp.tanh(x @ weight), None

    counts = count(outer, ones(ROWS, WIDTH), ones(LAYERS, WIDTH, WIDTH))
    assert counts.matrix_flops == 4 * 2 * LAYERS * ROWS * WIDTH * WIDTH
    assert counts.transcendentals == 4 * LAYERS * ROWS * WIDTH


def test_trip_counts_are_inferred_without_the_compilers_annotation():
    def steps(x):
        def by_three(carry):
            return carry[0] + 3, jnp.tanh(carry[1])

        x = lax.while_loop(lambda carry: carry[0] <= 20, by_three, (jnp.int32(2), x))[1]
        x = lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, jnp.sin(c[1])), (4, x))[1]
        return lax.scan(
            lambda x, _: (lax.fori_loop(0, 5, lambda _, x: x * 2, x), None), x, length=3
        )

    text = compile_(steps, ones(ROWS)).as_text()
    annotated, inferred = (
        cost.count(re.sub(removed, "", text)) for removed in ("$^", r'"known_trip_count":\S*?}')
    )
    assert "known_trip_count" in text
    assert inferred == annotated
    assert annotated.unknown_loops == ()
    assert annotated.transcendentals == (7 + 4) * ROWS  # at 2, 5, ... 20; at 4, 3, 2, 1
    assert max(op.trips for op in annotated.operations) == 3 * 5


def test_a_loop_of_unknown_length_is_reported():
    def halved(x):
        return lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    counts = count(halved, ones(ROWS))
    assert len(counts.unknown_loops) == 1
    assert all(op.trips == 1 for op in counts.operations)


def test_the_branch_with_more_traffic_is_counted():
    def either(which, x):
        return lax.cond(which, lambda x: x @ x, lambda x: x, x)

    assert count(either, True, ones(WIDTH, WIDTH)).matrix_flops == 2 * WIDTH**3


@pytest.mark.parametrize(
    "image, kernel, options",
    [
        ((2, 9, 7, 4), (3, 3, 4, 6), {}),
        ((2, 9, 7, 4), (3, 3, 4, 6), {"window_strides": (2, 3)}),
        ((2, 9, 7, 4), (3, 2, 4, 6), {"padding": ((2, 1), (0, 3))}),
        ((1, 5, 6, 4), (3, 3, 4, 2), {"padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 3)}),
        ((1, 9, 9, 4), (3, 3, 4, 2), {"rhs_dilation": (2, 3)}),
        ((2, 8, 8, 6), (3, 3, 2, 9), {"feature_group_count": 3}),
        ((2, 8, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6, "padding": ((1, 1), (1, 1))}),
        ((4, 8, 8, 6), (3, 3, 6, 4), {"batch_group_count": 2}),
    ],
)
def test_convolutions_count_products_outside_of_padding_and_dilation(image, kernel, options):
    """A convolution of ones with ones sums up to the number of its products."""
    options = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))} | options

    def convolve(x, w):
        return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    x, w = ones(*image), ones(*kernel)
    assert count(convolve, x, w).matrix_flops == 2 * float(convolve(x, w).sum())


def test_only_the_slices_of_a_sliced_array_are_counted():
    x = ones(4096, 512)
    counts = count(lambda x: jnp.tanh(x[10:20]), x)
    assert counts.bytes == 2 * 10 * 512 * 4


def test_in_place_updates_in_a_loop_count_rows_and_not_the_array():
    def fill(x):
        return lax.fori_loop(0, ROWS, lambda i, x: x.at[i].set(jnp.sin(x[i - 1]) + 1), x)

    x = ones(ROWS, 512)
    assert ROWS * 512 * 4 * 2 <= count(fill, x).bytes < ROWS * 512 * 4 * 10


def test_collectives_have_the_bytes_and_devices_worked_by_hand():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def communicate(x):  # [16, 32] on each device
        total = lax.psum(x, ("a", "b"))
        gathered = lax.all_gather(x + total, "b", tiled=True)
        scattered = lax.psum_scatter(gathered * 2, "a", tiled=True)
        return lax.ppermute(scattered, "a", [(0, 1), (1, 0)])

    spec = PartitionSpec(("a", "b"))
    communicate = jax.shard_map(
        communicate, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    collectives = {
        c.kind: (c.bytes, c.devices) for c in count(communicate, ones(8 * 16, 32)).collectives
    }
    share = 16 * 32 * 4
    assert collectives["all-reduce"] == (share, 8)
    assert collectives["all-gather"] == (4 * share, 4)
    assert collectives["reduce-scatter"] == (4 * share, 2)
    assert collectives["collective-permute"][0] == 2 * share


def test_collectives_in_a_loop_have_its_trip_count():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def communicate(x):
        return lax.fori_loop(0, 5, lambda _, x: lax.psum(x, "a") / 8, x)

    spec = PartitionSpec("a")
    communicate = jax.shard_map(
        communicate, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    (total,) = count(communicate, ones(8, 100)).collectives
    assert (total.kind, total.trips, total.bytes, total.devices) == ("all-reduce", 5, 400, 8)


def test_the_totals_of_a_model_equal_those_of_xla():
    """Compares a block without pooling, whose counts have one meaning.

    It has no loop, no kernel and no two slices of one array.
    """
    config = variant("vit_b16", size=64, width=16, heads=1, depths=(1,), num_classes=5)
    params = jax.eval_shape(functional(config).init, jax.random.key(0))
    clip = jax.ShapeDtypeStruct((2, 17, 16), jnp.float32)

    def loss(params, tokens):
        [block] = functional(config).module(params).blocks
        return block(tokens, (1, 4, 4))[0].sum()

    program = compile_(jax.grad(loss), params, clip)
    counts, xla = cost.count(program.as_text()), program.cost_analysis()
    np.testing.assert_allclose(counts.flops, xla["flops"], rtol=1e-3)
    np.testing.assert_allclose(counts.transcendentals, xla["transcendentals"], rtol=1e-3)
    np.testing.assert_allclose(counts.bytes, xla["bytes accessed"], rtol=1e-3)


def test_memory_equals_that_of_the_compiler():
    x = ones(1000, 1000)
    program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    memory = cost.memory(program)
    assert (memory.arguments, memory.results, memory.aliased) == (x.nbytes,) * 3
    assert x.nbytes <= memory.peak < 1.1 * x.nbytes


def test_a_tpu_program_has_the_costs_worked_by_hand():
    text = TPU.read_text()
    counts = cost.count(text)
    clips, side, channels = make_hlo.CLIPS // 4, make_hlo.SIDE, make_hlo.CHANNELS
    tokens = side * side
    per_layer = 2 * clips * tokens * channels * channels
    scores = 2 * clips * tokens * tokens * channels
    pooling = 2 * clips * channels * (3 * side - 2) ** 2  # kernel elements outside of the padding
    # The compiler turns the last product of two clips into a sum and a product.
    assert counts.matrix_flops == make_hlo.LAYERS * per_layer + scores + pooling
    (kernel,) = counts.kernels
    assert counts.kernel_flops == kernel.kernel_flops == clips * tokens * tokens
    assert kernel.bytes == 2 * clips * tokens * tokens * 2
    (mean,) = counts.collectives
    assert (mean.kind, mean.bytes, mean.devices) == ("all-reduce", tokens * channels * 2, 4)
    (depthwise,) = (op for op in counts.operations if op.category == "depthwise")
    assert cost.scopes(depthwise.op_name) == ("pool", "conv_general_dilated")
    # The clips are read from HBM, and the result stays on the chip.
    assert depthwise.hbm_bytes == clips * tokens * channels * 2
    assert counts.hbm_bytes < counts.bytes / 2


def test_the_totals_of_a_tpu_program_equal_those_of_xla_but_for_its_loop():
    xla = json.loads(TPU.with_suffix(".json").read_text())
    text = TPU.read_text()
    assert text.count("constant(5)") == 1  # the loop's bound
    once = cost.count(text.replace("constant(5)", "constant(1)"))
    np.testing.assert_allclose(once.flops + once.kernel_flops, xla["flops"], rtol=0.01)
    # XLA counts both halves of a prefetch, four times the array.
    prefetched = sum(op.bytes for op in once.operations if op.opcode == "copy-done")
    np.testing.assert_allclose(once.bytes + prefetched, xla["bytes accessed"], rtol=0.06)


@pytest.mark.parametrize(
    "text, size, space",
    [
        ("f32[4,8]{1,0}", 4 * 8 * 4, 0),
        ("bf16[4,393,96]{2,0,1:T(4,128)(2,1)S(1)}", 4 * 393 * 128 * 2, 1),
        ("bf16[4,393,96]{2,1,0:T(8,128)(2,1)}", 4 * 400 * 128 * 2, 0),
        ("f32[768]{0:T(1024)}", 1024 * 4, 0),
        ("pred[3]{0}", 3, 0),
        ("s4[5]{0}", 3, 0),
        ("c64[]", 8, 0),
        ("token[]", 0, 0),
    ],
)
def test_sizes_of_arrays_follow_their_layouts(text, size, space):
    (shape,) = parser.shapes(text)
    assert (shape.bytes, shape.space) == (size, space)


def test_scopes_are_stripped_of_jax_transformations():
    name = "jit(train_step)/transpose(jvp(stage1))/block0/attn/bqhd,bkhd->bhqk/dot_general"
    assert cost.scopes(name)[:3] == ("stage1", "block0", "attn")


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        cost.count("HloModule empty\n")
