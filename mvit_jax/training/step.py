"""The training step, the prediction step and the losses, as pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mvit_jax.models.inference import normalise
from mvit_jax.training import device_augment
from mvit_jax.training.optimizer import ema_step_size, merge, partition
from mvit_jax.training.state import Metrics, State


@dataclass(frozen=True)
class StepConfig:
    """Augmentation and loss settings of the training step; fields are named as the config keys."""

    seed: int
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    multi_label: bool
    flip: float
    random_erase_prob: float
    random_erase_mode: str
    mixup: float
    cutmix: float
    mixup_switch_prob: float
    mixup_group_size: int
    label_smoothing: float
    ema: float
    accumulate: int
    trained_blocks: int | None = None
    class_weights: tuple[float, ...] | None = None
    box_groups: int = 1  # of each group the loss is the mean over boxes; the batch has their mean
    dtype: Any = jnp.float32
    ema_warmup: bool = False


def train_step(
    state: State,
    batch: dict[str, Array],
    learning_rate: Array | float,
    *,
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    recipe: StepConfig,
) -> tuple[State, Metrics]:
    """Updates the state from one batch and returns it with the metrics of the step.

    All random draws are functions of the seed and the step; the state holds no PRNG key. If the
    loss or the gradient norm is not finite, only the step counters change (see
    `training.run.nan_policy` for the policies).

    Args:
      state: the training state.
      batch: "clip", uint8 [batch, T, H, W, 3]; "label", int32 [batch], or 0 and 1 as uint8
        [batch, num_classes] for multi-label data; "broken", int32 [batch], the index of the
        broken video that a clip replaces, or a negative number if it replaces none. For detection
        also "boxes" and "box_mask", and "label" of each box, see `data.detection`.
      learning_rate: learning rate of this step.
      apply: `Functional.apply` of a model that computes in `recipe.dtype`.
      optimizer: an optimiser from `training.optimizer`, made by `of_trained` if parameters are
        frozen (`recipe.trained_blocks`).
      recipe: augmentation and loss settings.

    Returns:
      The new state, and (sum, count) of "loss", "accuracy" (percent, on the augmented clips),
      "grad_norm" (of the trained parameters), "param_norm" (of all, after the update) and "broken".
    """
    # Named scopes appear in profiles (`train --profile`).
    key_batch, key_model = keys(recipe.seed, state.step)
    with jax.named_scope("augment"):
        clip, targets = augment(batch, key_batch, recipe)
        boxes = augment_boxes(batch, key_batch, recipe)

    # Frozen parameters are constants of the loss, so that no gradient of them is computed.
    trained, frozen = partition(state.params, recipe.trained_blocks)

    def loss(trained, clip, targets, labels, boxes, key):
        inputs = [clip] if boxes is None else [clip, boxes[0]]
        logits, _ = apply(merge(trained, frozen), *inputs, key=key)
        with jax.named_scope("loss"):
            if boxes is not None:
                # The weights sum to 1 over all micro-batches, of which the mean is taken.
                weights = boxes[1] * recipe.accumulate
                losses = binary_cross_entropy(logits, targets) * weights
                return jnp.sum(losses), _count_correct_boxes(logits, labels, weights)
            best = jnp.argmax(logits, -1)
            if recipe.multi_label:
                right = jnp.take_along_axis(labels, best[:, None], axis=1)
                correct = jnp.sum(right, dtype=jnp.int32)
                return jnp.mean(binary_cross_entropy(logits, targets)), correct
            losses = cross_entropy(logits, targets, recipe.class_weights)
            return jnp.mean(losses), jnp.sum(best == labels)

    (value, correct), grads = _accumulate_gradients(
        jax.value_and_grad(loss, has_aux=True),
        recipe.accumulate,
        trained,
        (clip, targets, batch["label"], boxes),
        key_model,
    )
    with jax.named_scope("optimizer"):
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, learning_rate=learning_rate
        )
        trained = optax.apply_updates(trained, updates)
        ema = state.ema
        if ema is not None:
            size = ema_step_size(state.step, recipe.ema, recipe.ema_warmup)
            averaged, constant = partition(ema, recipe.trained_blocks)
            ema = merge(optax.incremental_update(trained, averaged, size), constant)
        after = State(state.step + 1, merge(trained, frozen), opt_state, ema)
        norm = optax.tree.norm(grads)
        state = _select_finite(jnp.isfinite(value) & jnp.isfinite(norm), after, state)
    clips = jnp.asarray(batch["label"].shape[0])
    items = clips if boxes is None else jnp.sum(batch["box_mask"])
    metrics = {
        "loss": (value * items, items),
        "accuracy": (100 * correct, items),  # percent, on the augmented clips
        "grad_norm": (norm, jnp.asarray(1)),
        "param_norm": (optax.tree.norm(state.params), jnp.asarray(1)),  # after the update
        "broken": (jnp.sum(batch["broken"] >= 0), clips),
    }
    return state, metrics


def predict_step(
    params: Any, clip: Array, *, apply: Callable[..., Any], recipe: StepConfig
) -> Array:
    """Returns the class probabilities of each view.

    Args:
      params: the model's parameters.
      clip: uint8 views [batch, views, T, H, W, 3].
      apply: `Functional.apply`.
      recipe: mean, standard deviation and dtype of the input; `multi_label` selects sigmoids
        instead of a softmax.

    Returns:
      Probabilities [batch, views, num_classes].
    """
    batch, views = clip.shape[:2]
    flat = clip.reshape(batch * views, *clip.shape[2:])
    flat = normalise(flat, recipe.mean, recipe.std, recipe.dtype)
    logits, _ = apply(params, flat)
    probabilities = jax.nn.sigmoid(logits) if recipe.multi_label else jax.nn.softmax(logits)
    return probabilities.reshape(batch, views, -1)


def detect_step(
    params: Any, clip: Array, boxes: Array, *, apply: Callable[..., Any], recipe: StepConfig
) -> Array:
    """Returns the probabilities of each class in each box; the classes are independent.

    Args:
      params: the model's parameters.
      clip: uint8 clips [batch, 1, T, H, W, 3].
      boxes: x1, y1, x2, y2 in pixels of the clips, [batch, boxes, 4].
      apply: `Functional.apply`.
      recipe: mean, standard deviation and dtype of the input.

    Returns:
      Probabilities [batch, boxes, num_classes].
    """
    logits, _ = apply(params, normalise(clip[:, 0], recipe.mean, recipe.std, recipe.dtype), boxes)
    return jax.nn.sigmoid(logits)


def keys(seed: int, step: Any) -> tuple[Array, Array]:
    """Returns the PRNG keys of a step, for the augmentation of the batch and for the model."""
    key_batch, key_model = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return key_batch, key_model


def augment(batch: dict[str, Array], key: Array, recipe: StepConfig) -> tuple[Array, Array]:
    """Normalises, flips, erases and mixes a batch on the device.

    Returns:
      Clips [batch, T, H, W, 3] in `recipe.dtype`, and targets [batch, num_classes], for detection
      [batch, boxes, num_classes].
    """
    key_flip, key_mix, key_erase = jax.random.split(key, 3)
    clip = normalise(batch["clip"], recipe.mean, recipe.std, recipe.dtype)
    if recipe.multi_label:
        targets = batch["label"].astype(jnp.float32)
    else:
        targets = soft_targets(batch["label"], recipe.num_classes, recipe.label_smoothing)
    if recipe.flip > 0:
        clip = device_augment.flip(clip, key_flip, recipe.flip)
    if recipe.random_erase_prob > 0:
        clip = device_augment.erase(
            clip, key_erase, recipe.random_erase_prob, recipe.random_erase_mode
        )
    return device_augment.mix(
        clip,
        targets,
        key_mix,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        switch=recipe.mixup_switch_prob,
        group=recipe.mixup_group_size,
    )


def augment_boxes(
    batch: dict[str, Array], key: Array, recipe: StepConfig
) -> tuple[Array, Array] | None:
    """Returns the boxes of flipped clips, and the weight of each box in the loss.

    The weights are 0 for missing boxes and sum to 1. They are equal for the boxes of a group of
    clips, and each group has the same sum.
    """
    if "boxes" not in batch:
        return None
    boxes, mask = batch["boxes"], batch["box_mask"]
    if recipe.flip > 0:
        key_flip = jax.random.split(key, 3)[0]
        width = batch["clip"].shape[3]
        boxes = device_augment.flip_boxes(boxes, key_flip, recipe.flip, width)
    groups = mask.reshape(recipe.box_groups, -1).astype(jnp.float32)
    counts = jnp.maximum(jnp.sum(groups, 1, keepdims=True), 1)
    return boxes, (groups / (counts * recipe.box_groups)).reshape(mask.shape)


def _count_correct_boxes(logits: Array, labels: Array, weights: Array) -> Array:
    """Returns the number of boxes whose most probable class is one of their classes."""
    best = jnp.argmax(logits, -1)
    right = jnp.take_along_axis(labels, best[..., None], axis=-1)[..., 0]
    return jnp.sum((right > 0) & (weights > 0), dtype=jnp.int32)


def _select_finite(finite: Array, after: State, before: State) -> State:
    """Selects the updated state if the update is `finite`, else the previous state.

    Integer leaves always advance: the step, and the optimiser's step counts, which follow it.
    """

    def select(new: Array, old: Array) -> Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return jax.tree.map(select, after, before)


def _accumulate_gradients(value_and_grad, parts: int, params, batch: tuple, key: Array):
    """Returns mean loss, number of correct clips and mean gradients over `parts` micro-batches.

    Micro-batch p consists of rows p, p + parts, ..., so that no row moves to another device.
    """
    if parts == 1:
        return value_and_grad(params, *batch, key)
    micro_batches = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
    )

    def add(total, micro_batch):
        index, *rows = micro_batch
        out = value_and_grad(params, *rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, out), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(value_and_grad, params, *first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    ((value, correct), grads), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), *micro_batches))
    return (value / parts, correct), jax.tree.map(lambda g: g / parts, grads)


def soft_targets(
    labels: Int[Array, " batch"], num_classes: int, smoothing: float
) -> Float[Array, "batch num_classes"]:
    """Returns one-hot targets with label smoothing: `smoothing` is spread over all classes."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def cross_entropy(
    logits: Float[Array, "batch num_classes"],
    targets: Float[Array, "batch num_classes"],
    weights: Sequence[float] | None = None,
) -> Float[Array, " batch"]:
    """Returns each clip's soft-target cross-entropy, in nats; targets are not renormalised.

    `weights` multiply the terms of the classes, as in PyTorch's CrossEntropyLoss with soft targets.
    The loss of a mixed clip is then the mix of its two clips' weighted losses.
    """
    if weights is not None:
        targets = targets * jnp.asarray(weights, targets.dtype)[None]
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "batch *boxes num_classes"],
    targets: Float[Array, "batch *boxes num_classes"],
) -> Float[Array, "batch *boxes"]:
    """Returns the sigmoid cross-entropy of each clip or box, averaged over the classes, in nats.

    For multi-label data. The mean over clips equals PyTorch's BCEWithLogitsLoss.
    """
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.mean(targets * yes + (1 - targets) * no, axis=-1)
