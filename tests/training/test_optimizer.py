import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.training import build, optimizer
from mvit_jax.weights.key_tables import foreign_name
from tests.reference import make_optimizers as reference
from tests.support import tiny

REFERENCE = tiny.ROOT / "tests" / "reference"


def test_learning_rates_equal_those_of_the_reference_code():
    """The recipe of Kinetics-400 at fractions of epochs; another program wrote the table."""
    arguments = {"lr": 1.6e-3, "start_lr": 1.6e-5, "end_lr": 1.6e-5}
    schedule = optimizer.learning_rate(
        **arguments, warmup_epochs=30.0, epochs=200.0, steps_per_epoch=939.0
    )
    table = json.loads((REFERENCE / "learning_rates.json").read_text())
    assert len(table) > 25 and {step for step, _ in table} >= {0, 28169, 28170, 187799}
    for step, expected in table:
        assert schedule(step) == pytest.approx(expected, rel=1e-12), step


def test_learning_rates_of_epochs_with_a_fractional_number_of_steps():
    """2.5 steps an epoch: a warm-up of one epoch ends between steps 2 and 3."""
    schedule = optimizer.learning_rate(
        lr=1.0, start_lr=0.1, end_lr=0.01, warmup_epochs=1.0, epochs=5.0, steps_per_epoch=2.5
    )
    assert [float(schedule(step)) for step in (0, 1, 2)] == pytest.approx([0.1, 0.46, 0.82])
    for step in (3, 8, 12):
        turned = math.pi * (step / 2.5 - 1) / 4
        assert float(schedule(step)) == pytest.approx(0.01 + 0.495 * (1 + math.cos(turned)))


def test_learning_rates_without_warm_up_and_with_warm_up_alone():
    rates = {"lr": 1.0, "start_lr": 0.5, "end_lr": 0.0, "epochs": 2.0, "steps_per_epoch": 3.0}
    without = optimizer.learning_rate(**rates, warmup_epochs=0.0)
    assert [float(without(step)) for step in (0, 3)] == pytest.approx([1.0, 0.5])
    nothing_else = optimizer.learning_rate(**rates, warmup_epochs=2.0)
    assert [float(nothing_else(step)) for step in (0, 3, 6)] == pytest.approx([0.5, 0.75, 1.0])


def test_learning_rates_scale_with_the_batch_size(digits):
    """24 videos in batches of 8: 3 steps an epoch. The learning rates are for batches of 32."""
    keys = {"optim.lr_batch": 32, "optim.start_lr": 0.4, "optim.end_lr": 0.2, "optim.lr": 1.0}
    config = tiny.config(digits, **keys, **{"epochs": 4.0, "optim.warmup_epochs": 1.0})
    schedule = build.schedule(config, len(build.videos(config, "train")))
    assert [float(schedule(step)) for step in (0, 3, 12)] == pytest.approx([0.1, 0.25, 0.05])


def test_repeated_clips_count_towards_the_batch_size(digits):
    """24 videos in batches of 8 clips, two of each video: 6 steps an epoch."""
    config = tiny.config(digits, **{"data.repeats": 2, "epochs": 4.0, "optim.warmup_epochs": 2.0})
    videos = build.videos(config, "train")
    assert build.count_steps(config, config.epochs, len(videos)) == 24
    schedule = build.schedule(config, len(videos))
    assert float(schedule(12)) == pytest.approx(config.optim.lr)
    assert float(schedule(11)) < config.optim.lr > float(schedule(13))


@pytest.mark.parametrize("name", ["mvit_b_16x4", "mvitv2_s_16x4", "mvit_b16", "mvitv2_s"])
def test_weight_decay_and_layers_agree_with_names_in_pyslowfast(name):
    """Names in PySlowFast decide on decay and layers.

    Biases and norms, which have one dimension there, are not decayed. Layer 0 is the patch
    embedding and the positional embeddings, each block is a layer, the last is norm and head.
    """
    changes = {"width": 8, "depths": (1, 2), "size": 32, "kv_stride": (1, 2, 2)}
    config = variant(name, **changes)
    params = jax.eval_shape(functional(config).init, jax.random.key(0))
    mask = flatten_dict(optimizer.decay_mask(params), sep="/")
    theirs = {path: foreign_name(path, "slowfast", config) for path in mask}
    assert all(theirs.values())
    one_dimensional = [p for p, n in theirs.items() if "norm" in str(n) or str(n).endswith(".bias")]
    assert sorted(one_dimensional) == sorted(path for path, decays in mask.items() if not decays)
    if config.class_token:
        assert mask["positions/class_token"]
    if config.positions == "separate":
        assert mask["positions/space"] and mask["positions/time"]
    if config.relative_positions != "none":
        assert mask["blocks/0/attn/relative/height"]
    assert mask["blocks/0/attn/pool_k/kernel"]
    begin = {"patch_embed": 0, "cls_token": 0, "pos_embed": 0, "norm": 4, "head": 4}
    begin |= {f"blocks.{i}.": i + 1 for i in range(3)}
    layers = flatten_dict(optimizer.layers(params), sep="/")
    for path, name in theirs.items():
        assert [layers[path]] == [layer for start, layer in begin.items() if name.startswith(start)]


@pytest.mark.parametrize("name", reference.OPTIMIZERS)
def test_ten_steps_equal_those_of_pytorch(name):
    kind, _, with_layers = name.partition("_")
    expected = np.load(REFERENCE / "optimizers.npz")
    with jax.enable_x64(True):
        transform = {"adamw": optimizer.adamw, "sgd": optimizer.sgd}[kind](
            weight_decay=reference.WEIGHT_DECAY,
            layer_decay=reference.LAYER_DECAY if with_layers else 1.0,
            clip_norm=reference.CLIP,
        )
        params = jax.tree.map(jnp.asarray, unflatten_dict(reference.weights(), sep="/"))
        state = transform.init(params)
        update, norms = jax.jit(transform.update), []
        for step in range(reference.STEPS):
            gradient = reference.gradients(step)
            norms.append(math.sqrt(sum((g**2).sum() for g in gradient.values())))
            updates, state = update(
                unflatten_dict(gradient, sep="/"), state, params, learning_rate=reference.rate(step)
            )
            params = jax.tree.map(jnp.add, params, updates)
    assert min(norms) < reference.CLIP < max(norms)
    for path, value in flatten_dict(params, sep="/").items():
        np.testing.assert_allclose(value, expected[f"{name}/{path}"], rtol=0, atol=1e-12)
