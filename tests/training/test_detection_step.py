"""The loss over boxes, against loops, in micro-batches, by device and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.training import device_augment, optimizer
from mvit_jax.training.distributed import sharding
from mvit_jax.training.state import init_state
from mvit_jax.training.step import StepConfig, keys, train_step
from tests.training import test_step

CLASSES, BOXES, WIDTH = 3, 4, 16
RECIPE = test_step.RECIPE | {
    "num_classes": CLASSES, "multi_label": True, "mixup": 0.0, "cutmix": 0.0, "flip": 0.5,
    "random_erase_prob": 0.0, "label_smoothing": 0.0, "ema": 0.0,
}  # fmt: skip


def batch(clips=8):
    """Returns clips with 1 to 4 boxes each."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 8, (clips, BOXES, 2))
    mask = np.arange(BOXES) <= np.arange(clips)[:, None] % BOXES
    boxes = np.concatenate([corner, corner + rng.uniform(1, 7, corner.shape)], -1)
    return {
        "clip": jnp.asarray(rng.integers(0, 256, (clips, 2, WIDTH, WIDTH, 3), dtype=np.uint8)),
        "boxes": jnp.asarray(np.where(mask[..., None], boxes, 0), jnp.float32),
        "box_mask": jnp.asarray(mask),
        "label": jnp.asarray(rng.integers(0, 2, (clips, BOXES, CLASSES), dtype=np.uint8)),
        "broken": jnp.full(clips, -1, jnp.int32),
    }


def apply(params, clip, boxes, key=None):
    """A model of one layer, whose logits depend on the box and on the clip's brightness."""
    features = jnp.concatenate([boxes / WIDTH, boxes[..., :1] * 0 + 1], -1)
    return features @ params["head"]["kernel"] + clip.mean((1, 2, 3, 4))[:, None, None], {}


PARAMS = {"head": {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(5, CLASSES)),
                                         jnp.float32)}}  # fmt: skip
SGD = optimizer.of_trained(
    optimizer.sgd(momentum=0.0, weight_decay=0.0, layer_decay=1.0, clip_norm=0.0), None
)


def step(values, mesh=None, **changes):
    """Returns the loss, the updated kernel and the metrics of a step from `PARAMS`."""
    recipe = StepConfig(**RECIPE | changes)
    function = functools.partial(train_step, apply=apply, optimizer=SGD, recipe=recipe)
    state = init_state(PARAMS, SGD, 0.0)
    if mesh is not None:
        state = jax.device_put(state, sharding.replicated(mesh))
        values = jax.device_put(values, sharding.batch_sharding(mesh))
    state, metrics = jax.jit(function)(state, values, 0.5)
    total, count = metrics["loss"]
    return float(total / count), np.asarray(state.params["head"]["kernel"]), metrics


def losses(values):
    """Returns the loss of each box in a loop, NaN for missing boxes."""
    recipe = StepConfig(**RECIPE)
    key = jax.random.split(keys(recipe.seed, 0)[0], 3)[0]
    boxes = np.asarray(device_augment.flip_boxes(values["boxes"], key, 0.5, WIDTH), np.float64)
    kernel = np.asarray(PARAMS["head"]["kernel"], np.float64)
    result = np.full(boxes.shape[:2], np.nan)
    for clip, box in np.ndindex(*result.shape):
        if not values["box_mask"][clip, box]:
            continue
        pixels = np.asarray(values["clip"][clip], np.float64) / 255
        shift = ((pixels - recipe.mean) / recipe.std).mean()
        logits = np.append(boxes[clip, box] / WIDTH, 1) @ kernel + shift
        p = 1 / (1 + np.exp(-logits))
        truth = np.asarray(values["label"][clip, box], np.float64)
        result[clip, box] = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()
    return result


def test_the_loss_is_the_mean_over_all_real_boxes():
    values = batch()
    value, _, metrics = step(values)
    expected = losses(values)
    assert value == pytest.approx(np.nanmean(expected), rel=1e-5)
    assert int(metrics["loss"][1]) == int(metrics["accuracy"][1]) == (~np.isnan(expected)).sum()


def test_missing_boxes_have_no_effect():
    values = batch()
    changed = values | {
        "boxes": jnp.where(values["box_mask"][..., None], values["boxes"], 9.0),
        "label": jnp.where(values["box_mask"][..., None], values["label"], 1).astype(jnp.uint8),
    }
    (value, kernel, metrics), (same, other, more) = step(values), step(changed)
    assert value == same and metrics["accuracy"] == more["accuracy"]
    np.testing.assert_array_equal(kernel, other)


def test_micro_batches_and_meshes_give_the_update_of_the_whole_batch():
    values = batch()
    value, kernel, metrics = step(values)
    mesh = sharding.make_mesh(4, 2, jax.devices())
    with jax.set_mesh(mesh):
        sharded = step(values, mesh)
    for other in (step(values, accumulate=4), sharded):
        assert other[0] == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(other[1], kernel, rtol=1e-5)
        assert int(other[2]["accuracy"][0]) == int(metrics["accuracy"][0])


def test_the_reduction_by_device_is_the_mean_of_means():
    values = batch()
    expected = losses(values).reshape(4, 2 * BOXES)
    means = np.nanmean(expected, 1)
    assert abs(means.mean() - np.nanmean(expected)) > 1e-3
    for accumulate in (1, 2):
        value = step(values, box_groups=4, accumulate=accumulate)[0]
        assert value == pytest.approx(means.mean(), rel=1e-5)
    # The gradient is that of the mean of means as well.
    separate = [
        step({name: x[2 * i : 2 * i + 2] for name, x in values.items()}, flip=0.0)[1]
        for i in range(4)
    ]
    together = step(values, box_groups=4, flip=0.0)[1]
    np.testing.assert_allclose(together, np.mean(separate, 0), rtol=1e-5)


def test_boxes_are_flipped_with_their_clips():
    """A painted column is where the flipped box says."""
    clip = np.zeros((40, 1, 4, WIDTH, 3), np.float32)
    left = np.arange(40) % 10
    clip[np.arange(40), :, :, left] = 1
    boxes = np.stack([left, 0 * left, left, 0 * left + 3], -1)[:, None].astype(np.float32)
    key = jax.random.key(5)
    flipped = np.asarray(device_augment.flip(jnp.asarray(clip), key, 0.5))
    moved = np.asarray(device_augment.flip_boxes(jnp.asarray(boxes), key, 0.5, WIDTH))
    painted = flipped[:, 0, 0, :, 0].argmax(-1)
    np.testing.assert_array_equal(moved[:, 0, 0], painted)
    assert 5 < (painted != left).sum() < 35
