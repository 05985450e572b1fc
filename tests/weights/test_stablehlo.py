"""StableHLO exports, run by JAX in a process that cannot import this package."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import mvit_jax
from mvit_jax.common.errors import UserError
from mvit_jax.models import inference
from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.weights import stablehlo
from mvit_jax.weights.stablehlo import save_stablehlo
from tests.support.environment import of_process

SMALL = {"size": 32, "width": 16, "depths": (1, 1), "num_classes": 5}
VIDEO = variant("mvitv2_s_16x4", frames=4, **SMALL)  # with relative positions
MEAN, STD = (0.45, 0.4, 0.5), (0.225, 0.2, 0.25)

ALONE = """
import sys
for name in ("mvit_jax", "flax", "optax", "einops", "jaxtyping"):
    sys.modules[name] = None  # importing it raises
import jax, numpy as np
from jax import export
model = jax.jit(export.deserialize(open("model", "rb").read()).call)
np.save("logits.npy", model(np.load("clips.npy")))
"""


@pytest.fixture(scope="module")
def params():
    return functional(VIDEO).init(jax.random.key(0))


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def expected(params, clips):
    """Returns the logits of the normalised clips."""
    return np.asarray(jax.jit(functional(VIDEO).apply)(params, normalised(clips))[0])


def normalised(clips):
    return ((clips / 255 - MEAN) / STD).astype(np.float32)


def test_a_file_runs_without_this_package_with_equal_logits(params, clips, expected, tmp_path):
    save_stablehlo(functional(VIDEO), params, tmp_path / "model", mean=MEAN, std=STD)
    np.save(tmp_path / "clips.npy", clips)
    env = {k: v for k, v in of_process(1).items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert expected.std() > 1e-2
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [None, 2])
def test_symbolic_and_fixed_batches_are_exported_for_all_platforms(
    batch, params, clips, expected, tmp_path
):
    """Runs one clip for a symbolic batch; the test above runs three."""
    platforms, count = ("cpu", "cuda", "tpu"), batch or 1
    saved = save_stablehlo(
        functional(VIDEO), params, tmp_path / "model", batch=batch, platforms=platforms
    )
    exported = export.deserialize(bytearray((tmp_path / "model").read_bytes()))
    assert exported.platforms == saved.platforms == platforms
    assert str(exported.in_avals[0]) == f"float32[{batch or 'batch'},4,32,32,3]"
    logits = jax.jit(exported.call)(normalised(clips)[:count])
    np.testing.assert_allclose(logits, expected[:count], atol=1e-5)


def test_a_file_for_tpus_alone_has_the_tpu_kernels(params, tmp_path):
    exported = save_stablehlo(
        functional(VIDEO), params, tmp_path / "model", batch=2, platforms=("tpu",)
    )
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.slow
def test_a_bfloat16_image_model_is_exported_with_a_fixed_batch(tmp_path):
    config = variant("mvitv2_t", **SMALL)
    params = functional(config).init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    half = functional(config, dtype=jnp.bfloat16)
    save_stablehlo(functional(config), params, tmp_path / "float32", batch=2)
    save_stablehlo(half, params, tmp_path / "bfloat16", batch=2)
    model = export.deserialize(bytearray((tmp_path / "bfloat16").read_bytes())).call
    expected, _ = jax.jit(half.apply)(params, images)
    np.testing.assert_allclose(jax.jit(model)(images), expected, atol=2e-2 * expected.std())
    with pytest.raises(ValueError, match="shape"):
        model(images[:1])
    saved = (tmp_path / "float32").stat().st_size - (tmp_path / "bfloat16").stat().st_size
    # Most of the weights.
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 2)
    assert saved > 2 * 0.9 * kernels


def test_exports_that_fail_end_with_a_one_sentence_error(params, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="platforms must be of cpu, cuda, rocm, tpu, not gpu"):
        save_stablehlo(functional(VIDEO), params, tmp_path / "model", platforms=["cpu", "gpu"])
    with pytest.raises(UserError, match="cannot be written"):
        save_stablehlo(functional(VIDEO), params, tmp_path / "missing" / "model")
    monkeypatch.setattr(stablehlo, "LARGEST", 1000)
    with pytest.raises(UserError, match="use bfloat16"):
        save_stablehlo(functional(VIDEO), params, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 1])
def test_relative_positions_add_no_large_constants(batch):
    """At full size the graph has half a percent of the bytes of the weights.

    No constant holds a value for each pair of positions (vision#7003 is such a graph).
    """
    config = mvit_jax.variant("mvitv2_s_16x4")
    shapes = jax.eval_shape(functional(config).init, jax.random.key(0))
    forward = inference.forward_function(functional(config), mean=MEAN, std=STD)
    clip = stablehlo.clip_shape(config, np.uint8, batch)
    exported = stablehlo.exported(forward, ("cpu", "cuda", "tpu"), shapes, clip)
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert weights > 130e6
    assert len(exported.serialize()) < 1e6
