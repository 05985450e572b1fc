"""Makes tpu_program.txt, a small program as XLA compiles it for 4 chips of TPU v5e.

`python -m tests.reference.make_hlo`, from the repository's root; needs the extra `tpu`, no TPU.

On clips sharded over the chips it has a loop of 5 matrix products, a depthwise convolution,
a product with a batch dimension, a custom kernel, and a mean over all chips.
"""

import json
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

FILE = Path(__file__).parent / "tpu_program.txt"
CLIPS, SIDE, CHANNELS, LAYERS = 8, 16, 256, 5  # of all 4 chips together


def double(x):
    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    cost = pl.CostEstimate(flops=x.size, transcendentals=0, bytes_accessed=4 * x.size)
    return pl.pallas_call(
        kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(x.shape[0],),
        in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))],
        out_specs=pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0)), cost_estimate=cost,
    )(x)  # fmt: skip


def program(clips, kernel, weights):
    """Computes the program's output [tokens, CHANNELS], summed over the chips.

    Args:
        clips: [CLIPS, SIDE, SIDE, CHANNELS], like all others in bfloat16.
        kernel: [3, 3, 1, CHANNELS].
        weights: [LAYERS, CHANNELS, CHANNELS].
    """
    with jax.named_scope("pool"):
        x = lax.conv_general_dilated(
            clips, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=CHANNELS,
        )  # fmt: skip
    x = x.reshape(CLIPS, SIDE * SIDE, CHANNELS)
    with jax.named_scope("layers"):
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    with jax.named_scope("scores"):
        scores = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", x, x))
    spec = PartitionSpec("data")
    scores = jax.shard_map(double, in_specs=spec, out_specs=spec, check_vma=False)(scores)
    return jnp.einsum("bqk,bkc->kc", scores, x)


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(topology.devices, ("data",), axis_types=(AxisType.Auto,))

    def struct(*shape: int, axes=()):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(program, out_shardings=NamedSharding(mesh, PartitionSpec()))
            .lower(
                struct(CLIPS, SIDE, SIDE, CHANNELS, axes=("data",)),
                struct(3, 3, 1, CHANNELS),
                struct(LAYERS, CHANNELS, CHANNELS),
            )
            .compile()
        )
    text = re.sub(r'"body":"[^"]*"', '"body":""', compiled.as_text())  # the kernel's machine code
    FILE.write_text(
        re.sub(r"\n(FileNames|FunctionNames|FileLocations)\n.*?\n(?=\n%)", "\n", text, flags=re.S)
    )
    cost = compiled.cost_analysis()
    totals = {name: cost[name] for name in ("flops", "bytes accessed")}
    FILE.with_suffix(".json").write_text(json.dumps(totals) + "\n")
    print(FILE, FILE.stat().st_size, "bytes", totals)


if __name__ == "__main__":
    main()
