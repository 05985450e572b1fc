"""The inference callable against `apply` on each clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import Functional, functional
from mvit_jax.models.inference import Inference
from mvit_jax.models.variants import variant

CONFIG = variant(
    "mvitv2_s_16x4", frames=4, size=32, width=16, depths=(1, 1), num_classes=5
)  # with relative positions
MEAN, STD = (0.45, 0.4, 0.5), (0.225, 0.2, 0.25)


@pytest.fixture(scope="module")
def params():
    return functional(CONFIG).init(jax.random.key(0))


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(0).normal(size=(7, 4, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(params, clips):
    """Returns the logits of one clip at a time."""
    apply = jax.jit(functional(CONFIG).apply)
    logits = np.concatenate([apply(params, clip[None])[0] for clip in clips])
    assert logits.std(0).min() > 1e-3  # or the order of clips would not matter
    return logits


@pytest.fixture
def traced(monkeypatch):
    """Records the shapes for which `apply` is traced, once for each compilation."""
    shapes = []

    def counted(model, params, clips, **options):
        shapes.append(clips.shape)
        return apply(model, params, clips, **options)

    apply = Functional.apply
    monkeypatch.setattr(Functional, "apply", counted)
    return shapes


def test_any_batch_has_the_logits_of_apply_with_few_compilations(params, clips, expected, traced):
    run = Inference(functional(CONFIG), params, buckets=(4, 1))
    for count in (1, 2, 3, 4, 5, 6, 7, 3, 0):
        for batch in (clips[:count], jnp.asarray(clips[:count])):
            logits = run(batch)
            assert logits.shape == (count, 5) and logits.dtype == jnp.float32
            np.testing.assert_allclose(logits, expected[:count], atol=1e-5)
    assert [shape[0] for shape in traced] == [1, 4]


def test_default_buckets_are_powers_of_two(params, clips, expected, traced):
    run = Inference(functional(CONFIG), params)
    np.testing.assert_allclose(run(clips[:5]), expected[:5], atol=1e-5)
    np.testing.assert_allclose(run(clips), expected, atol=1e-5)
    assert [shape[0] for shape in traced] == [8]
    assert run.buckets == (1, 2, 4, 8, 16)


def test_uint8_clips_are_normalised(params, traced):
    clips = np.random.default_rng(1).integers(0, 256, (2, 4, 32, 32, 3)).astype(np.uint8)
    run = Inference(functional(CONFIG), params, mean=MEAN, std=STD)
    normalised = ((clips / 255 - MEAN) / STD).astype(np.float32)
    np.testing.assert_allclose(run(clips), run(normalised), atol=1e-5)
    assert len(traced) == 2  # one for each kind of input


def test_bfloat16_equals_apply_with_float32_weights(params, clips, expected):
    run = Inference(functional(CONFIG, dtype=jnp.bfloat16), params)
    apply = jax.jit(functional(CONFIG, dtype=jnp.bfloat16).apply)
    logits = run(clips[:4])
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, apply(params, clips[:4])[0])
    rms = np.sqrt(np.mean((logits - expected[:4]) ** 2))
    assert 0 < rms < 2e-2 * expected.std()


def test_weights_are_converted_except_norms_and_positions(params):
    unconverted = {
        path
        for path, leaf in flatten_dict(
            Inference(functional(CONFIG, dtype=jnp.bfloat16), params).params, sep="/"
        ).items()
        if leaf.dtype != jnp.bfloat16
    }
    parts = ("norm", "relative", "positions")
    assert unconverted == {
        path for path in flatten_dict(params, sep="/") if any(part in path for part in parts)
    }
    assert all(
        converted is original
        for converted, original in zip(
            jax.tree.leaves(Inference(functional(CONFIG), params).params),
            jax.tree.leaves(params),
            strict=True,
        )
    )  # float32 requires no second copy


def test_batches_are_sharded_over_devices(params, clips, expected, traced):
    run = Inference(functional(CONFIG), params, buckets=(3, 9), devices=jax.devices())
    assert run.buckets == (8, 16)
    for count in (1, 7):
        np.testing.assert_allclose(run(clips[:count]), expected[:count], atol=1e-5)
    assert [shape[0] for shape in traced] == [8]


def test_an_image_model_accepts_images():
    config = variant("mvitv2_t", size=32, width=16, depths=(1, 1), num_classes=3)
    params = functional(config).init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    logits, _ = jax.jit(functional(config).apply)(params, images)
    np.testing.assert_allclose(Inference(functional(config), params)(images), logits, atol=1e-5)


def test_bad_arguments_end_with_a_one_sentence_error(params):
    with pytest.raises(UserError, match=r"batch sizes of at least 1, not \(\)"):
        Inference(functional(CONFIG), params, buckets=())
    with pytest.raises(UserError, match=r"not \(4, 0\)"):
        Inference(functional(CONFIG), params, buckets=(4, 0))
    with pytest.raises(UserError, match="only one of mean and std is set"):
        Inference(functional(CONFIG), params, mean=MEAN)
    with pytest.raises(UserError, match="pass mean and std to Inference"):
        Inference(functional(CONFIG), params)(np.zeros((1, 4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"requires \[batch, T, H, W, 3\] clips"):
        Inference(functional(CONFIG), params)(np.zeros((1, 32, 32, 3), np.float32))
