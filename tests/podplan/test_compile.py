"""Ahead-of-time compilation for TPUs: collectives, memory by kind, and steps that do not fit.

Collectives are compared with those of a matrix product of known sizes, and a step's with the number
of its parameters.
"""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import functional
from mvit_jax.podplan import accelerators, compile
from mvit_jax.podplan.compile import QUICK, Figures, TooLarge
from mvit_jax.podplan.hlo import cost
from mvit_jax.training import build
from tests.support import tiny

ROWS, WIDTH, OUT = 4096, 1024, 2048
MODEL = {  # of the tiny experiment's steps
    "model.width": 64,
    "model.depths": (1, 3),
    "model.relative_positions": "both",
}
WEIGHT = 4 * WIDTH * OUT  # bytes, in whole tiles of 8 x 128


@pytest.mark.parametrize(
    "message, size",
    [
        ("Ran out of memory in memory space hbm. Used 20.81G of 15.75G hbm.", 20.81 * 2**30),
        ("the total memory required for HLO temporaries (512.00M) exceeds", 512 * 2**20),
        ("INTERNAL: something else", None),
    ],
)
def test_required_memory_is_parsed_from_the_compilers_message(message, size):
    assert compile.required_bytes(message) == (None if size is None else int(size))


def test_without_libtpu_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tpu\]'"):
        compile.tpu_mesh(accelerators.parse("v5e:2x2"))


@pytest.mark.parametrize("effort", [QUICK, 0.0, 0.5])
def test_the_installed_compiler_takes_an_effort(effort):
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), np.float32))
    compiled = lowered.compile(compiler_options=compile.compiler_options(effort))
    np.testing.assert_array_equal(compiled(jnp.zeros(2)), [1, 1])


def collective_bytes(slices, fsdp, effort):
    """Returns bytes by (kind, devices, between slices) of a step that learns one weight."""
    mesh = compile.tpu_mesh(accelerators.parse("v5e:4x4", slices), -1, fsdp)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def step(weight, x):
        return weight - jax.grad(lambda weight: jnp.sum(jnp.tanh(x @ weight) ** 2))(weight)

    lowered = jax.jit(step, in_shardings=(split, rows), out_shardings=split).lower(
        jax.ShapeDtypeStruct((WIDTH, OUT), np.float32),
        jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32),
    )
    options = compile.compiler_options(effort)
    counts = cost.count(lowered.compile(compiler_options=options).as_text() or "")
    total = Counter()
    for c in counts.collectives:
        total[c.kind, c.devices, c.between_slices] += c.trips * c.bytes
    return total


GATHERED = {("all-gather", 16, False): WEIGHT, ("all-reduce", 16, False): WEIGHT}
IN_GROUPS = {
    ("all-gather", 4, False): WEIGHT,
    ("reduce-scatter", 4, False): WEIGHT,
    ("all-reduce", 4, False): WEIGHT // 4,
}


@pytest.mark.parametrize(
    ("slices", "fsdp", "effort", "expected"),
    [
        # Replicated weights require one sum of their gradients.
        (1, 1, QUICK, {("all-reduce", 16, False): WEIGHT}),
        # Sharded over all chips of a slice: whole gradients are summed, then sliced.
        (1, 16, QUICK, GATHERED),
        # Sharded over groups: gradients are scattered in a group, then summed over groups.
        (1, 4, QUICK, IN_GROUPS),
        # At full effort the all-gather is part of several fusions and must be counted once.
        pytest.param(1, 4, 0.0, IN_GROUPS, marks=pytest.mark.nightly),
        # Each of 16 chips sends its shard of the sum to the other slices.
        (2, 16, QUICK, GATHERED | {("all-reduce", 2, True): WEIGHT // 16}),
    ],
)
@pytest.mark.slow
def test_collectives_of_a_step_that_learns_one_weight(slices, fsdp, effort, expected):
    assert collective_bytes(slices, fsdp, effort) == expected


def measure(topology, *, fsdp=1, slices=1, clips=8, **changes):
    """Measures the tiny experiment, averages included, with `clips` on each chip."""
    pod = accelerators.parse(topology, slices)
    keys = {"batch": clips * pod.chips, "optim.ema": 0.9, **MODEL, **changes}
    config = tiny.config("nowhere", **keys)
    model = build.model_config(config, 8)
    return compile.measure(config, model, compile.tpu_mesh(pod, -1, fsdp), effort=QUICK), model


@pytest.fixture(scope="module")
def small():
    """Measures the step on one host of four chips."""
    return measure("v5e:2x2")


@pytest.fixture(scope="module")
def split():
    """Measures the step on 16 chips, the state sharded over groups of four."""
    return measure("v5e:4x4", fsdp=4)


def parameters(model):
    return sum(map(math.prod, functional(model).shapes().values()))


@pytest.mark.slow
def test_a_step_on_four_chips_sums_every_gradient_once(small):
    measured, model = small
    assert isinstance(measured, Figures)
    (devices,) = {c.devices for c in measured.counts.collectives}
    assert devices == 4
    size = sum(c.trips * c.bytes for c in measured.counts.collectives)
    assert {c.kind for c in measured.counts.collectives} == {"all-reduce"}
    # In float32; small tensors are padded to whole tiles.
    assert 4 * parameters(model) <= size < 2 * 4 * parameters(model)
    assert not measured.counts.unknown_loops
    # Attention, and pooling of K and V (of Q too in a stage's first block), forward and backward;
    # of four blocks two are one loop.
    assert len(measured.counts.kernels) >= 2 * (2 + 3 + 2)


@pytest.mark.nightly
def test_gradients_are_summed_over_chips_in_the_compute_dtype(small):
    measured, model = measure("v5e:2x2", dtype="bfloat16")
    assert isinstance(measured, Figures)
    whole, half = (
        sum(c.trips * c.bytes for c in step.counts.collectives) for step in (small[0], measured)
    )
    assert half == pytest.approx(whole / 2, rel=0.05)
    assert measured.kinds["parameters"] == small[0].kinds["parameters"]  # stay in float32
    assert 2 * parameters(model) <= half


@pytest.mark.slow
def test_memory_is_reported_by_kind(small):
    measured, model = small
    assert sum(measured.kinds.values()) == measured.used == measured.memory.peak
    held = 4 * parameters(model)
    assert held <= measured.kinds["parameters"] < 1.5 * held
    assert measured.kinds["average"] == measured.kinds["parameters"]
    # Two moments of each parameter, and a counter or two.
    assert measured.kinds["optimiser"] == pytest.approx(2 * measured.kinds["parameters"], rel=0.01)
    clips = 8 * 4 * 32 * 32 * 3
    assert clips <= measured.kinds["batch"] < 4.1 * clips  # its layout is padded to whole tiles
    assert measured.kinds["activations"] > 0 and measured.kinds["program"] > 0


@pytest.mark.nightly
def test_a_sharded_step_holds_a_shard_and_gathers_the_rest(small, split):
    (whole, model), (measured, _) = small, split
    for kind in compile.STATE:
        # Small tensors are replicated.
        assert 0.25 <= measured.kinds[kind] / whole.kinds[kind] < 0.6
    moved = Counter()
    for c in measured.counts.collectives:
        moved[c.kind] += c.trips * c.bytes
    size = 4 * parameters(model)
    assert 0.8 * size < moved["all-gather"] < 4 * size  # forward, and again backward
    assert moved["reduce-scatter"] > 0.3 * size
    # Collectives move weights and their gradients, never a batch of activations.
    largest = 4 * max(map(math.prod, functional(model).shapes().values()))
    assert all(
        c.bytes <= 4 * largest for c in measured.counts.collectives if c.kind != "all-reduce"
    )
    assert len(measured.counts.kernels) == len(whole.counts.kernels)
    # Each chip has as many clips as before, and as much to compute.
    assert measured.counts.kernel_flops == whole.counts.kernel_flops
    assert measured.counts.flops == pytest.approx(whole.counts.flops, rel=0.1)


@pytest.mark.slow
def test_gradients_of_several_slices_are_summed_over_the_network():
    measured, model = measure("v5e:2x2", slices=2, fsdp=4)
    assert isinstance(measured, Figures)
    outside = [c for c in measured.counts.collectives if c.between_slices]
    assert outside and {c.devices for c in outside} == {2}
    size = sum(c.bytes for c in outside)
    # Each chip sends its shard, in layouts that pad gradients more; without a reduce-scatter
    # first it would be thrice as much.
    assert measured.kinds["parameters"] <= size < 2 * measured.kinds["parameters"]
    assert measured.kinds["parameters"] < 3 * parameters(model)
    assert all(c.devices <= 4 for c in measured.counts.collectives if not c.between_slices)
    bounds = accelerators.roofline_bounds(measured.counts, accelerators.CHIPS["v5e"])
    assert bounds.dcn > bounds.ici > 0


@pytest.mark.slow
def test_a_step_that_does_not_fit_reports_its_required_memory():
    measured, _ = measure("v5e:2x2", clips=65536)
    assert isinstance(measured, TooLarge)
    assert measured.used > accelerators.CHIPS["v5e"].memory
    assert measured.kinds["batch"] == 65536 * (4 * 32 * 32 * 3 + 4 + 4)
    assert sum(measured.kinds.values()) == measured.used


@pytest.mark.slow
def test_the_forward_pass_is_measured_alone(small):
    config = tiny.config("nowhere", batch=32, **MODEL)
    model = build.model_config(config, 8)
    mesh = compile.tpu_mesh(accelerators.parse("v5e:2x2"))
    measured = compile.measure(config, model, mesh, which="forward", effort=QUICK)
    assert isinstance(measured, Figures)
    assert 0 < measured.counts.flops < 0.5 * small[0].counts.flops
    whole = small[0].kinds
    assert measured.kinds["parameters"] == pytest.approx(whole["parameters"], rel=0.01)
    assert measured.kinds["batch"] == pytest.approx(whole["batch"], rel=0.01)
    assert measured.kinds["optimiser"] == measured.kinds["average"] == 0
    assert 0 < measured.kinds["activations"] < whole["activations"]
    assert sum(measured.kinds.values()) == measured.used
