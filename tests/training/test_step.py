import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.training import optimizer
from mvit_jax.training.state import init_state
from mvit_jax.training.step import StepConfig, train_step
from tests.support.tiny import MODEL

CONFIG = variant("mvit_b_16x4", num_classes=4, drop_path=0.0, dropout=0.0, **MODEL)
RECIPE = {
    "seed": 0,
    "num_classes": 4,
    "mean": (0.45, 0.45, 0.45),
    "std": (0.225, 0.225, 0.225),
    "multi_label": False,
    "flip": 0.0,
    "random_erase_prob": 0.0,
    "random_erase_mode": "pixel",
    "mixup": 0.0,
    "cutmix": 0.0,
    "mixup_switch_prob": 0.5,
    "mixup_group_size": 2,
    "label_smoothing": 0.1,
    "ema": 0.0,
    "accumulate": 1,
}


def batch(seed: int = 0, clips: int = 8):
    random = np.random.default_rng(seed)
    return {
        "clip": jnp.asarray(random.integers(0, 256, (clips, 4, 32, 32, 3), np.uint8)),
        "label": jnp.asarray(random.integers(0, 4, clips), jnp.int32),
        "broken": jnp.full(clips, -1, jnp.int32),
    }


ADAMW = optimizer.adamw(weight_decay=0.05, clip_norm=1.0)


def make(config=CONFIG, lr=1e-3, dtype=jnp.float32, transform=ADAMW, jit=jax.jit, **changes):
    recipe = StepConfig(**(RECIPE | changes), dtype=dtype)
    apply = functional(config, dtype=dtype).apply
    params = jax.tree.map(lambda x: x.astype(dtype), functional(config).init(jax.random.key(0)))
    state = init_state(params, transform, recipe.ema)
    run = functools.partial(
        train_step, learning_rate=lr, apply=apply, optimizer=transform, recipe=recipe
    )
    return jit(run), state


def distance(a, b) -> float:
    return float(optax.tree.norm(optax.tree.sub(a, b), ord=jnp.inf))


@pytest.mark.slow
def test_the_step_overfits_one_batch():
    run, state = make(lr=3e-3)
    losses = []
    for _ in range(30):
        state, metrics = run(state, batch())
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    # The minimum of the loss is the entropy of the smoothed targets.
    entropy = -(0.925 * np.log(0.925) + 3 * 0.025 * np.log(0.025))
    assert losses[0] == pytest.approx(np.log(4), abs=0.4)
    assert losses[-1] < entropy + 0.1
    assert int(state.step) == 30


@pytest.mark.slow
def test_accumulated_micro_batches_give_the_update_of_the_whole_batch():
    with jax.enable_x64(True):
        whole, state = make(dtype=jnp.float64)
        parts, _ = make(dtype=jnp.float64, accumulate=4)
        one, metrics_one = whole(state, batch())
        four, metrics_four = parts(state, batch())
        assert distance(state.params, one.params) > 1e-4
        # Gradients of key biases are zero up to rounding, which Adam amplifies: compare the
        # gradients in its first moment.
        assert distance(one.opt_state[1][0].mu, four.opt_state[1][0].mu) < 1e-12
        for name in metrics_one:
            assert float(metrics_one[name][0]) == pytest.approx(float(metrics_four[name][0]), 1e-9)


@pytest.mark.slow
def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        run, state = make(dtype=jnp.float64)
        moment = run(state, batch())[0].opt_state[1][0].mu  # 0.1 x clipped gradient
        norm = float(run(state, batch())[1]["grad_norm"][0])
        gradient = optax.tree.scale(10 * max(1.0, norm), moment)
        direction = optax.tree.random_like(jax.random.key(0), gradient)

        def loss(amount):
            moved = optax.tree.add_scale(state.params, amount, direction)
            metrics = run(dataclasses.replace(state, params=moved), batch())[1]
            return float(metrics["loss"][0] / metrics["loss"][1])

        expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
        assert float(optax.tree.vdot(gradient, direction)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_ema_is_the_exponential_moving_average_of_parameters():
    run, state = make(ema=0.75)
    first = state.params
    after_one, _ = run(state, batch())
    after_two, _ = run(after_one, batch(1))
    expected = jax.tree.map(
        lambda a, b, c: 0.25 * c + 0.75 * (0.25 * b + 0.75 * a),
        first, after_one.params, after_two.params,
    )  # fmt: skip
    assert distance(after_two.ema, expected) < 1e-6
    assert distance(after_two.ema, after_two.params) > 1e-4


def timm_decay(updates, decay):
    """Returns the decay of timm's `ModelEmaV3(use_warmup=True)` after a number of updates."""
    step = max(0, updates - 1)
    return 0.0 if step == 0 else min(decay, 1 - (1 + step / 1.0) ** -(2 / 3))


def test_the_ema_warm_up_is_timms():
    values = [1 - float(optimizer.ema_step_size(step, 0.9999, True)) for step in range(4)]
    # 1 - 1 / n^(2/3), computed by hand for n = 1, 2, 3, 4.
    assert values == pytest.approx([0, 0.370039, 0.519250, 0.603150], abs=1e-6)
    for step in (0, 1, 74, 31_622, 10**6, 10**7):
        size = float(optimizer.ema_step_size(jnp.int32(step), 0.9999, True))
        assert size == pytest.approx(1 - timm_decay(step + 1, 0.9999), rel=1e-5)
        assert optimizer.ema_step_size(step, 0.9999, False) == 1 - 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.45, 0.9999])
def test_averages_with_a_warm_up_equal_a_naive_loop(decay):
    run, state = make(ema=decay, ema_warmup=True, lr=1e-2)
    average = flat(state.params)
    for updates in range(1, 6):
        state, _ = run(state, batch(updates))
        share = timm_decay(updates, decay)
        average = share * average + (1 - share) * flat(state.params)
        np.testing.assert_allclose(flat(state.ema), average, atol=1e-6)
        if updates == 1:
            assert distance(state.ema, state.params) == 0
    assert distance(state.ema, state.params) > 1e-3


def flat(params):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(params)])


def test_the_share_of_the_initial_weights_equals_a_naive_loop():
    for steps, decay, warmup in ((60, 0.9999, False), (9, 0.5, False), (3, 0.9999, True)):
        share = 1.0
        for step in range(steps):
            share *= 1 - float(optimizer.ema_step_size(step, decay, warmup))
        assert optimizer.ema_initial_share(steps, decay, warmup) == pytest.approx(share, abs=1e-6)
    assert optimizer.ema_initial_share(60, 0.9999, False) == pytest.approx(0.994, abs=1e-3)


@pytest.mark.slow
def test_randomness_depends_on_seed_and_step_alone():
    config = variant("mvit_b_16x4", num_classes=4, drop_path=0.5, dropout=0.5, **MODEL)
    run, state = make(config, flip=0.5, mixup=0.8, cutmix=1.0)
    other_seed, _ = make(config, flip=0.5, mixup=0.8, cutmix=1.0, seed=1)

    def loss(function, state):
        return float(function(state, batch())[1]["loss"][0])

    later = dataclasses.replace(state, step=state.step + 1)
    assert loss(run, state) == loss(run, state)
    assert len({loss(run, state), loss(run, later), loss(other_seed, state)}) == 3


@pytest.mark.slow
def test_multi_label_targets_train_by_binary_cross_entropy():
    """Fan et al. 2021, D.3: sigmoid and binary cross-entropy for each class."""
    run, state = make(lr=3e-3, multi_label=True, label_smoothing=0.0)
    sets = np.random.default_rng(0).integers(0, 2, (8, 4), np.uint8)
    inputs = batch() | {"label": jnp.asarray(sets)}
    logits = functional(CONFIG).apply(
        state.params, (inputs["clip"].astype(jnp.float32) / 255 - 0.45) / 0.225
    )[0]
    probability = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    expected = -np.where(sets == 1, np.log(probability), np.log(1 - probability)).mean()
    state, metrics = run(state, inputs)
    assert float(metrics["loss"][0]) / 8 == pytest.approx(expected, rel=1e-5)
    hits = sets[np.arange(8), np.asarray(logits).argmax(1)].sum()
    assert float(metrics["accuracy"][0]) == 100 * hits
    for _ in range(40):
        state, metrics = run(state, inputs)
    assert float(metrics["loss"][0]) / 8 < 0.3


@pytest.mark.slow
def test_decode_failures_in_a_batch_are_counted():
    run, state = make()
    inputs = batch() | {"broken": jnp.asarray([-1, 3, -1, 0, -1, -1, 5, -1], jnp.int32)}
    assert [int(x) for x in run(state, inputs)[1]["broken"]] == [3, 8]


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_weights():
    run, state = make()
    half, _ = make(dtype=jnp.bfloat16)
    exact, rounded = run(state, batch()), half(state, batch())
    ours, theirs = (float(m["loss"][0] / m["loss"][1]) for m in (rounded[1], exact[1]))
    assert ours == pytest.approx(theirs, rel=2e-2) and ours != theirs
    assert {x.dtype for x in jax.tree.leaves(rounded[0].params)} == {jnp.dtype("float32")}
