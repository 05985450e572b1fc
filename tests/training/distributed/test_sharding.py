"""Meshes of 8 simulated devices: equal results, collectives, shards and rows of hosts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mvit_jax.common.errors import UserError
from mvit_jax.models.variants import variant
from mvit_jax.training.distributed import sharding
from tests.support.marks import nightly, slow
from tests.support.tiny import MODEL
from tests.training.test_step import make

RATES = {"num_classes": 4, "drop_path": 0.5, "dropout": 0.5}
VIT = {"width": 16, "heads": 2, "depths": (2,), "frames": 4, "size": 32}
MODELS = {
    "mvit": variant("mvit_b_16x4", **RATES, **MODEL),
    "mvitv2": variant("mvitv2_s_16x4", **RATES, **MODEL),
    "vit": variant("vit_b_8x8", **RATES, **VIT),
}
CLIPS = 88  # 11 per device: no dimension of a parameter is a multiple of 11
# The last one is that of two slices of four chips.
MESHES = {"one": (1, 1), "data 8": (8, 1), "fsdp 8": (1, 8), "data 2 x fsdp 4": (2, 4)}


@pytest.fixture(autouse=True)
def shard_small_leaves(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)


def setup(shape, dtype=jnp.float32, config=MODELS["mvit"]):
    data, fsdp = shape
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    changes = {"flip": 0.5, "mixup": 0.8, "cutmix": 1.0, "mixup_group_size": 11, "ema": 0.9}
    # AdamW would amplify the rounding of gradients that are zero in theory, those of key biases.
    sgd = optax.sgd(0.1, momentum=0.9)
    run, state = make(config, dtype=dtype, transform=sgd, jit=lambda run: run, **changes)
    shardings = sharding.state_shardings(mesh, state)
    step = jax.jit(
        run,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    return mesh, jax.device_put(state, shardings), step


def batches():
    random = np.random.default_rng(0)
    for _ in range(3):
        yield {
            "clip": random.integers(0, 256, (CLIPS, 4, 32, 32, 3), np.uint8),
            "label": random.integers(0, 4, CLIPS).astype(np.int32),
            "broken": np.full(CLIPS, -1, np.int32),
        }


def run(shape, dtype, config):
    mesh, state, step = setup(shape, dtype, config)
    losses = []
    with jax.set_mesh(mesh):
        for batch in batches():
            state, metrics = step(state, sharding.to_devices(batch, mesh))
            losses.append(float(metrics["loss"][0]))
    return losses, jax.device_get((state.params, state.ema))


@pytest.mark.parametrize("model", [slow("mvitv2"), nightly("mvit"), nightly("vit")])
def test_training_on_every_mesh_equals_training_on_one_device(model):
    """Losses, parameters and averaged parameters; a clip has the same randomness on any device."""
    with jax.enable_x64(True):
        losses, trees = run(MESHES["one"], jnp.float64, MODELS[model])
        assert np.ptp(losses) > 1e-3
        assert ("'relative'" in str(jax.tree.structure(trees))) == (model == "mvitv2")
        for name in list(MESHES)[1:]:
            other_losses, other_trees = run(MESHES[name], jnp.float64, MODELS[model])
            np.testing.assert_allclose(losses, other_losses, rtol=1e-12)
            close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
            jax.tree.map(close, trees, other_trees)


COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\].*? (all-gather|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.mark.slow
def test_fsdp_gathers_parameters_and_never_activations():
    mesh, state, step = setup(MESHES["data 2 x fsdp 4"])
    with jax.set_mesh(mesh):
        batch = sharding.to_devices(next(batches()), mesh)
        text = step.lower(state, batch).compile().as_text()
    collectives = [
        (kind, [int(n) for n in shape.split(",") if n]) for shape, kind in COLLECTIVE.findall(text)
    ]
    largest = max(x.size for x in jax.tree.leaves(state.params))
    assert len(collectives) >= 10  # the pattern matches them
    assert any(kind == "all-gather" for kind, _ in collectives)
    for kind, shape in collectives:
        # Activations have an axis of clips, or of clips times tokens.
        assert all(n % 11 for n in shape), f"{kind} of activations {shape}"
        assert np.prod(shape) <= largest
    assert "all-reduce" in text or "reduce-scatter" in text  # of gradients


def test_fsdp_shards_the_state_over_the_devices():
    def bytes_per_device(shape):
        _, state, _ = setup(shape)
        device = jax.devices()[0]
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        )

    whole, replicated, eighth, quarter = (bytes_per_device(MESHES[name]) for name in MESHES)
    assert replicated == whole
    # All parameters but norms and biases are sharded in four or eight.
    assert quarter < 0.3 * whole and eighth < 0.18 * whole


def test_the_largest_divisible_dimension_is_sharded():
    mesh = sharding.make_mesh(2, 4, jax.devices())
    shapes = {"a": (3, 64, 96), "b": (3, 64, 97), "c": (5, 7, 101), "d": (4,)}
    tree = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    specs = {k: tuple(v.spec) for k, v in sharding.state_shardings(mesh, tree).items()}
    assert specs == {"a": (None, None, "fsdp"), "b": (None, "fsdp", None), "c": (), "d": ()}


def test_meshes_and_batches_that_do_not_divide_raise_an_error():
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 does not divide the 8 devices"):
        sharding.make_mesh(-1, 3, jax.devices())
    with pytest.raises(UserError, match="requires 12 devices, but there are 8"):
        sharding.make_mesh(4, 3, jax.devices())
    with pytest.raises(UserError, match="batch of 12 is not divisible by 8"):
        sharding.local_rows(12, sharding.make_mesh(devices=jax.devices()))


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device that determine its position in a mesh."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5e"


def two_slices():
    """Returns two slices of 16 chips, 4 per host, in random order.

    Chips are numbered row by row of the slice, as TPUs are: those of a host are no neighbours.
    """
    chips = [
        Chip(16 * part + 4 * y + x, 4 * part + 2 * (y // 2) + x // 2, part)
        for part in range(2) for y in range(4) for x in range(4)
    ]  # fmt: skip
    return [chips[i] for i in np.random.default_rng(0).permutation(32)]


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16])
def test_fsdp_groups_stay_in_a_slice_and_hosts_read_contiguous_rows(fsdp):
    mesh = sharding.make_mesh(-1, fsdp, two_slices())
    assert mesh.shape["data"] == 32 // fsdp
    for group in mesh.devices:
        assert len({chip.slice_index for chip in group}) == 1
    rows = [sharding.local_rows(64, mesh, host) for host in range(8)]
    assert [row for part in rows for row in part] == list(range(64))
    # JAX puts on the chips of a host the rows that the host has read.
    hosts_of_rows = np.repeat([chip.process_index for chip in mesh.devices.flat], 2)
    for host, part in enumerate(rows):
        np.testing.assert_array_equal(hosts_of_rows[part.start : part.stop], host)


def test_an_fsdp_group_across_two_slices_raises():
    with pytest.raises(UserError, match=r"mesh\.fsdp=32 does not divide the 16 chips of slice 0"):
        sharding.make_mesh(-1, 32, two_slices())
    machines = [dataclasses.replace(chip, platform="gpu") for chip in two_slices()]
    assert sharding.make_mesh(-1, 32, machines).shape["fsdp"] == 32


def test_hosts_read_rows_in_proportion_to_their_devices():
    chips = [Chip(0, 0, 0), Chip(1, 1, 0), Chip(2, 1, 0), Chip(3, 1, 0)]
    mesh = sharding.make_mesh(devices=chips)
    assert [sharding.local_rows(8, mesh, host) for host in (0, 1)] == [range(2), range(2, 8)]
    scattered = Mesh(np.asarray(chips)[[1, 0, 2, 3]].reshape(4, 1), sharding.AXES)
    with pytest.raises(ValueError, match="not contiguous"):
        sharding.local_rows(8, scattered, 1)
