"""Steps compiled for TPUs that are not here: what passes between chips, what is held, what fits.

Collectives are compared with what a product of known sizes must send, and a step's with the number
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
def test_the_compilers_message_says_how_much_is_wanted(message, size):
    assert compile.required_bytes(message) == (None if size is None else int(size))


def test_libtpu_that_is_not_installed_gets_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tpu\]'"):
        compile.tpu_mesh(accelerators.parse("v5e:2x2"))


def passed(slices, fsdp, effort):
    """Collectives of a step that learns one weight by gradient descent: {(kind, among, between
    slices): bytes of a chip}."""
    mesh = compile.tpu_mesh(accelerators.parse("v5e:4x4", slices), -1, fsdp)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def step(weight, x):
        return weight - jax.grad(lambda weight: jnp.sum(jnp.tanh(x @ weight) ** 2))(weight)

    lowered = jax.jit(step, in_shardings=(split, rows), out_shardings=split).lower(
        jax.ShapeDtypeStruct((WIDTH, OUT), np.float32),
        jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32),
    )
    options = {"exec_time_optimization_effort": effort}
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
        # Copied weights need one sum of their gradients.
        (1, 1, QUICK, {("all-reduce", 16, False): WEIGHT}),
        # Where all chips of a slice share one copy, the compiler sums whole and then cuts.
        (1, 16, QUICK, GATHERED),
        # Groups scatter gradients and sum what they hold.
        (1, 4, QUICK, IN_GROUPS),
        # Full effort makes the gathering part of several fusions, which must not count it again.
        pytest.param(1, 4, 0.0, IN_GROUPS, marks=pytest.mark.nightly),
        # Each of 16 chips has a part of the sum, and gives that alone to other slices.
        (2, 16, QUICK, GATHERED | {("all-reduce", 2, True): WEIGHT // 16}),
    ],
)
@pytest.mark.slow
def test_what_chips_send_each_other_to_learn_one_weight(slices, fsdp, effort, expected):
    assert passed(slices, fsdp, effort) == expected


def measure(topology, *, fsdp=1, slices=1, clips=8, **changes):
    """The tiny experiment, averages included, with so many clips on each chip."""
    place = accelerators.parse(topology, slices)
    keys = {"batch": clips * place.chips, "optim.ema": 0.9, **MODEL, **changes}
    config = tiny.config("nowhere", **keys)
    model = build.model_config(config, 8)
    return compile.measure(config, model, compile.tpu_mesh(place, -1, fsdp), effort=QUICK), model


@pytest.fixture(scope="module")
def small():
    """On one host of four chips."""
    return measure("v5e:2x2")


@pytest.fixture(scope="module")
def split():
    """On 16 chips, four of which share a copy of the state."""
    return measure("v5e:4x4", fsdp=4)


def parameters(model):
    return sum(map(math.prod, functional(model).shapes().values()))


@pytest.mark.slow
def test_a_step_on_four_chips_sums_every_gradient_once(small):
    found, model = small
    assert isinstance(found, Figures)
    (among,) = {c.devices for c in found.counts.collectives}
    assert among == 4
    size = sum(c.trips * c.bytes for c in found.counts.collectives)
    assert {c.kind for c in found.counts.collectives} == {"all-reduce"}
    # In float32; small tensors are padded to whole tiles.
    assert 4 * parameters(model) <= size < 2 * 4 * parameters(model)
    assert not found.counts.unknown_loops
    # Attention, and pooling of K and V (of Q too in a stage's first block), there and back; of
    # four blocks two are one loop.
    assert len(found.counts.kernels) >= 2 * (2 + 3 + 2)


@pytest.mark.nightly
def test_gradients_cross_chips_in_the_type_that_the_step_computes_in(small):
    found, model = measure("v5e:2x2", dtype="bfloat16")
    assert isinstance(found, Figures)
    whole, half = (
        sum(c.trips * c.bytes for c in step.counts.collectives) for step in (small[0], found)
    )
    assert half == pytest.approx(whole / 2, rel=0.05)
    assert found.kinds["parameters"] == small[0].kinds["parameters"]  # which stay in float32
    assert 2 * parameters(model) <= half


@pytest.mark.slow
def test_memory_is_told_by_kind(small):
    found, model = small
    assert sum(found.kinds.values()) == found.used == found.memory.peak
    held = 4 * parameters(model)
    assert held <= found.kinds["parameters"] < 1.5 * held
    assert found.kinds["average"] == found.kinds["parameters"]
    # Two moments of each, and a counter or two.
    assert found.kinds["optimiser"] == pytest.approx(2 * found.kinds["parameters"], rel=0.01)
    clips = 8 * 4 * 32 * 32 * 3
    assert clips <= found.kinds["batch"] < 4.1 * clips  # its layout is padded to whole tiles
    assert found.kinds["activations"] > 0 and found.kinds["program"] > 0


@pytest.mark.nightly
def test_a_split_step_holds_a_share_and_gathers_the_rest(small, split):
    (whole, model), (found, _) = small, split
    for kind in compile.STATE:
        assert 0.25 <= found.kinds[kind] / whole.kinds[kind] < 0.6  # small tensors are copied
    moved = Counter()
    for c in found.counts.collectives:
        moved[c.kind] += c.trips * c.bytes
    size = 4 * parameters(model)
    assert 0.8 * size < moved["all-gather"] < 4 * size  # forward, and again backward
    assert moved["reduce-scatter"] > 0.3 * size
    # What passes between chips are weights and their gradients, never a batch of activations.
    largest = 4 * max(map(math.prod, functional(model).shapes().values()))
    assert all(c.bytes <= 4 * largest for c in found.counts.collectives if c.kind != "all-reduce")
    assert len(found.counts.kernels) == len(whole.counts.kernels)
    # Each chip has as many clips as before, and as much to compute.
    assert found.counts.kernel_flops == whole.counts.kernel_flops
    assert found.counts.flops == pytest.approx(whole.counts.flops, rel=0.1)


@pytest.mark.slow
def test_a_step_of_several_slices_sums_over_the_network():
    found, model = measure("v5e:2x2", slices=2, fsdp=4)
    assert isinstance(found, Figures)
    outside = [c for c in found.counts.collectives if c.between_slices]
    assert outside and {c.devices for c in outside} == {2}
    size = sum(c.bytes for c in outside)
    # What each chip holds of them, in layouts that pad gradients more; without scattering them
    # first it would be thrice as much.
    assert found.kinds["parameters"] <= size < 2 * found.kinds["parameters"]
    assert found.kinds["parameters"] < 3 * parameters(model)
    assert all(c.devices <= 4 for c in found.counts.collectives if not c.between_slices)
    roofs = accelerators.roofs(found.counts, accelerators.CHIPS["v5e"])
    assert roofs.outside > roofs.links > 0


@pytest.mark.slow
def test_a_step_that_does_not_fit_says_what_it_would_take():
    found, _ = measure("v5e:2x2", clips=65536)
    assert isinstance(found, TooLarge)
    assert found.used > accelerators.CHIPS["v5e"].memory
    assert found.kinds["batch"] == 65536 * (4 * 32 * 32 * 3 + 4 + 4)
    assert sum(found.kinds.values()) == found.used


@pytest.mark.slow
def test_the_forward_pass_of_a_test_is_compiled_too(small):
    config = tiny.config("nowhere", batch=32, **MODEL)
    model = build.model_config(config, 8)
    mesh = compile.tpu_mesh(accelerators.parse("v5e:2x2"))
    found = compile.measure(config, model, mesh, which="forward", effort=QUICK)
    assert isinstance(found, Figures)
    assert 0 < found.counts.flops < 0.5 * small[0].counts.flops
    whole = small[0].kinds
    assert found.kinds["parameters"] == pytest.approx(whole["parameters"], rel=0.01)
    assert found.kinds["batch"] == pytest.approx(whole["batch"], rel=0.01)
    assert found.kinds["optimiser"] == found.kinds["average"] == 0
    assert 0 < found.kinds["activations"] < whole["activations"]
    assert sum(found.kinds.values()) == found.used
