"""The training step compiled for TPUs that are not here: kernels on a mesh, nothing gathered."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from mvit_jax.models.functional import functional
from mvit_jax.models.plan import MViTConfig
from mvit_jax.podplan.hlo import cost
from mvit_jax.training.distributed import sharding

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

CLIPS = 8
SMALL = MViTConfig(
    frames=4, size=64, num_classes=8, width=32, depths=(1, 3), kv_stride=(1, 4, 4),
    relative_positions="both",
)  # fmt: skip


def step(params, clip):
    def loss(params):
        model = functional(SMALL, dtype="bfloat16")
        logits, _ = model.apply(params, clip, key=jax.random.key(0), scan=True)
        return (logits**2).sum()

    return jax.grad(loss)(params)


@pytest.mark.nightly
@pytest.mark.parametrize("shape", [(4, 1), (2, 2)], ids=["data 4", "data 2 x fsdp 2"])
def test_each_chip_runs_the_kernels_on_its_own_clips(shape):
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    devices = np.array(topology.devices).reshape(shape)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 2)
    params = jax.eval_shape(functional(SMALL).init, jax.random.key(0))
    shardings = sharding.state_shardings(mesh, params)
    clip = jax.ShapeDtypeStruct((CLIPS, 4, 64, 64, 3), "bfloat16")
    with jax.set_mesh(mesh):
        lowered = jax.jit(
            step,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=shardings,
        ).lower(params, clip)
        # The least of XLA's efforts: ten times as fast, and as good for this.
        program = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0})
    counts = cost.count(program.as_text())
    # Attention, and pooling of K and V (of Q too in a stage's first block), there and back.
    assert len(counts.kernels) >= 2 * (2 + 3 + 2)
    largest = max(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) * 4
    # What passes between chips are weights and their gradients, never a batch of activations.
    assert all(c.bytes <= 4 * largest for c in counts.collectives if c.kind != "all-reduce")
    assert counts.collectives
