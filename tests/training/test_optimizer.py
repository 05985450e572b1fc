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


def tiny_model(name):
    return variant(
        name, frames=4, size=32, width=8, depths=(1, 1), kv_stride=(1, 2, 2), num_classes=3
    )


def test_learning_rates_are_those_of_the_reference_codes_formula():
    """The recipe of Kinetics-400 at fractions of epochs; the table is made by another program."""
    arguments = {"lr": 1.6e-3, "start_lr": 1.6e-5, "end_lr": 1.6e-5}
    schedule = optimizer.learning_rate(
        **arguments, warmup_epochs=30.0, epochs=200.0, steps_per_epoch=939.0
    )
    table = json.loads((REFERENCE / "learning_rates.json").read_text())
    assert len(table) > 25 and {step for step, _ in table} >= {0, 28169, 28170, 187799}
    for step, expected in table:
        assert schedule(step) == pytest.approx(expected, rel=1e-12), step


def test_learning_rates_of_epochs_that_are_no_whole_number_of_steps():
    """2.5 steps an epoch: a warm-up of one epoch ends between steps 2 and 3."""
    schedule = optimizer.learning_rate(
        lr=1.0, start_lr=0.1, end_lr=0.01, warmup_epochs=1.0, epochs=5.0, steps_per_epoch=2.5
    )
    assert [float(schedule(step)) for step in (0, 1, 2)] == pytest.approx([0.1, 0.46, 0.82])
    for step in (3, 8, 12):
        turned = math.pi * (step / 2.5 - 1) / 4
        assert float(schedule(step)) == pytest.approx(0.01 + 0.495 * (1 + math.cos(turned)))


def test_learning_rates_without_warm_up_and_with_nothing_else():
    rates = {"lr": 1.0, "start_lr": 0.5, "end_lr": 0.0, "epochs": 2.0, "steps_per_epoch": 3.0}
    without = optimizer.learning_rate(**rates, warmup_epochs=0.0)
    assert [float(without(step)) for step in (0, 3)] == pytest.approx([1.0, 0.5])
    nothing_else = optimizer.learning_rate(**rates, warmup_epochs=2.0)
    assert [float(nothing_else(step)) for step in (0, 3, 6)] == pytest.approx([0.5, 0.75, 1.0])


def test_rates_follow_the_batch(digits):
    """24 videos in batches of 8: 3 steps an epoch. The rates are meant for batches of 32."""
    keys = {"optim.lr_batch": 32, "optim.start_lr": 0.4, "optim.end_lr": 0.2, "optim.lr": 1.0}
    config = tiny.config(digits, **keys, **{"epochs": 4.0, "optim.warmup_epochs": 1.0})
    schedule = build.schedule(config, len(build.videos(config, "train")))
    assert [float(schedule(step)) for step in (0, 3, 12)] == pytest.approx([0.1, 0.25, 0.05])


def test_repeats_are_clips_of_the_batch(digits):
    """24 videos in batches of 8 clips, two of each video: 6 steps an epoch."""
    config = tiny.config(digits, **{"data.repeats": 2, "epochs": 4.0, "optim.warmup_epochs": 2.0})
    videos = build.videos(config, "train")
    assert build.count_steps(config, config.epochs, len(videos)) == 24
    schedule = build.schedule(config, len(videos))
    assert float(schedule(12)) == pytest.approx(config.optim.lr)
    assert float(schedule(11)) < config.optim.lr > float(schedule(13))


@pytest.mark.parametrize("name", ["mvit_b_16x4", "mvitv2_s_16x4", "mvit_b16", "mvitv2_s"])
def test_biases_norms_and_only_those_are_not_decayed(name):
    """By PySlowFast's rule and its names: what ends in .bias, and what has one dimension there."""
    changes = {"width": 8, "depths": (1, 2), "size": 32, "kv_stride": (1, 2, 2)}
    config = variant(name, **changes)
    params = jax.eval_shape(lambda key: functional(config).init(key), jax.random.key(0))
    mask = flatten_dict(optimizer.decayed(params), sep="/")
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


@pytest.mark.parametrize("name", ["mvit_b_16x4", "mvitv2_s_16x4"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_ten_steps_equal_the_formulas_written_out(name, kind):
    """With clipping and layer decay, in float64: PyTorch's formulas in numpy, each tensor's layer
    and decay by PySlowFast's name of it."""
    config = tiny_model(name)
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = functional(config).shapes()
        start = {path: 0.1 * random.normal(size=shape) for path, shape in shapes.items()}
        sizes = np.geomspace(0.003, 0.3, 10)  # norms on either side of the limit
        gradients = [
            {path: size * random.normal(size=shape) for path, shape in shapes.items()}
            for size in sizes
        ]
        rates = np.linspace(1e-2, 1e-3, 10)
        make = {"adamw": optimizer.adamw, "sgd": optimizer.sgd}[kind]
        transform = make(weight_decay=0.1, layer_decay=0.7, clip_norm=2.0)
        params = unflatten_dict(
            {path: jnp.asarray(value) for path, value in start.items()}, sep="/"
        )
        state = transform.init(params)
        update = jax.jit(transform.update)
        for rate, gradient in zip(rates, gradients, strict=True):
            tree = unflatten_dict(
                {path: jnp.asarray(value) for path, value in gradient.items()}, sep="/"
            )
            updates, state = update(tree, state, params, learning_rate=rate)
            params = jax.tree.map(jnp.add, params, updates)

        groups = {path: group(path, config, decay=0.1, rate=0.7) for path in shapes}
        limited, expected = written_out(start, gradients, rates, groups, kind, limit=2.0)
        assert 0 < limited < 10
        for path, value in flatten_dict(params, sep="/").items():
            moved = np.abs(expected[path] - start[path]).max()
            assert moved > 1e-4, path
            np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-9, err_msg=path)


def group(path, config, *, decay, rate):
    """Weight decay of a tensor, and the factor of its learning rate."""
    name = foreign_name(path, "slowfast", config)
    depth = sum(config.depths)
    if name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = 0 if name.startswith(("patch_embed", "cls_token", "pos_embed")) else depth + 1
    plain = name.endswith(".bias") or "norm" in name
    return 0 if plain else decay, rate ** (depth + 1 - layer)


def written_out(params, gradients, rates, groups, kind, limit):
    params = dict(params)
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    limited = 0
    for step, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1, limit / (norm + 1e-6))
        limited += scale < 1
        for k, (decay, factor) in groups.items():
            g, rate = gradient[k] * scale, rates[step - 1] * factor
            if kind == "adamw":
                first[k] = 0.9 * first[k] + 0.1 * g
                second[k] = 0.999 * second[k] + 0.001 * g * g
                denominator = np.sqrt(second[k]) / math.sqrt(1 - 0.999**step) + 1e-8
                params[k] = params[k] * (1 - rate * decay)
                params[k] = params[k] - rate / (1 - 0.9**step) * first[k] / denominator
            else:
                g = g + decay * params[k]
                first[k] = g if step == 1 else 0.9 * first[k] + g
                params[k] = params[k] - rate * (g + 0.9 * first[k])
    return limited, params


@pytest.mark.parametrize("name", reference.OPTIMIZERS)
def test_ten_steps_equal_torchs_own(name):
    kind, _, with_layers = name.partition("_")
    expected = np.load(REFERENCE / "optimizers.npz")
    with jax.enable_x64(True):
        transform = {"adamw": optimizer.adamw, "sgd": optimizer.sgd}[kind](
            weight_decay=reference.WEIGHT_DECAY,
            layer_decay=reference.LAYER_DECAY if with_layers else 1.0,
            clip_norm=reference.CLIP,
        )
        params = unflatten_dict(
            {k: jnp.asarray(v) for k, v in reference.weights().items()}, sep="/"
        )
        state = transform.init(params)
        update, norms = jax.jit(transform.update), []
        for step in range(reference.STEPS):
            gradient = reference.gradients(step)
            norms.append(math.sqrt(sum((g**2).sum() for g in gradient.values())))
            tree = unflatten_dict({k: jnp.asarray(v) for k, v in gradient.items()}, sep="/")
            updates, state = update(tree, state, params, learning_rate=reference.rate(step))
            params = jax.tree.map(jnp.add, params, updates)
    assert min(norms) < reference.CLIP < max(norms)
    for path, value in flatten_dict(params, sep="/").items():
        np.testing.assert_allclose(value, expected[f"{name}/{path}"], rtol=0, atol=1e-12)


def test_a_gradient_below_the_limit_is_left_as_it_is():
    transform = optimizer.sgd(weight_decay=0.0, momentum=0.0, clip_norm=5.0)
    params = {"kernel": jnp.zeros((1, 2))}
    for size, expected in ((1.0, 5.0), (0.1, 0.5)):  # norms 50 and 0.5
        gradient = {"kernel": size * jnp.array([[30.0, 40.0]]) / (1 if size == 1.0 else 10)}
        updates, _ = transform.update(gradient, transform.init(params), params, learning_rate=1.0)
        assert float(jnp.linalg.norm(updates["kernel"])) == pytest.approx(expected, rel=1e-6)
