"""Training of the last blocks alone (`optim.trained_blocks`), compared with full gradients."""

import contextlib
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mvit_jax import train
from mvit_jax.common.errors import UserError
from mvit_jax.config import check_start
from mvit_jax.models.cost import products
from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.training import build, optimizer
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import history
from mvit_jax.training.run.checkpoints import Checkpoints
from mvit_jax.training.state import init_state
from mvit_jax.training.step import StepConfig, train_step
from tests.support import tiny
from tests.support.marks import slow
from tests.training.test_step import RECIPE, batch

DEPTH = 4
CONFIG = variant(
    "mvit_b_16x4", num_classes=4, drop_path=0.0, dropout=0.0, **tiny.MODEL | {"depths": (1, 3)}
)
# Three equal blocks are a loop, which ends at the frozen blocks.
PREFIXES = {0: ("head/",), 2: ("head/", "norm/", "blocks/2/", "blocks/3/")}
OPTIMIZERS = {
    "adamw": optimizer.adamw(weight_decay=0.5, clip_norm=0.1, layer_decay=0.7),
    "sgd": optimizer.sgd(weight_decay=0.5, clip_norm=0.1, layer_decay=0.7),
}


def make(trained_blocks, scan, name="adamw"):
    recipe = StepConfig(**RECIPE | {"ema": 0.7, "trained_blocks": trained_blocks})
    transform = optimizer.of_trained(OPTIMIZERS[name], trained_blocks)
    frozen = 0 if trained_blocks is None else DEPTH - trained_blocks
    apply = functools.partial(functional(CONFIG).apply, scan=scan, frozen_blocks=frozen)
    step = functools.partial(train_step, apply=apply, optimizer=transform, recipe=recipe)
    params = functional(CONFIG).init(jax.random.key(0))
    return step, init_state(params, transform, recipe.ema)


def reference(trained_blocks, name):
    """Returns full gradients and an optimiser that masks the frozen parameters."""

    def labels(params):
        def label(path, _):
            name = "/".join(key.key for key in path) + "/"
            return "trained" if name.startswith(PREFIXES[trained_blocks]) else "frozen"

        return jax.tree_util.tree_map_with_path(label, params)

    transform = optax.multi_transform(
        {"trained": OPTIMIZERS[name], "frozen": optax.set_to_zero()}, labels
    )

    def loss(params, inputs):
        clip = (inputs["clip"].astype(jnp.float32) / 255 - 0.45) / 0.225
        targets = jax.nn.one_hot(inputs["label"], 4) * 0.9 + 0.1 / 4
        logits, _ = functional(CONFIG).apply(params, clip)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))

    def step(params, opt_state, inputs):
        grads = jax.grad(loss)(params, inputs)
        updates, opt_state = transform.update(grads, opt_state, params, learning_rate=0.1)
        return optax.apply_updates(params, updates), opt_state

    return transform.init, jax.jit(step)


@pytest.mark.parametrize(
    ("trained_blocks", "scan", "name"),
    [(2, True, "sgd"), slow(2, False, "sgd"), slow(0, True, "sgd"), slow(2, True, "adamw")],
)  # fmt: skip
def test_updates_are_those_of_masked_full_gradients(trained_blocks, scan, name):
    step, state = make(trained_blocks, scan, name)
    step = jax.jit(functools.partial(step, learning_rate=0.1))
    start = flatten_dict(state.params, sep="/")
    init, naive = reference(trained_blocks, name)
    params, opt_state = state.params, init(state.params)
    for seed in range(2):
        state, _ = step(state, batch(seed))
        params, opt_state = naive(params, opt_state, batch(seed))
    expected = flatten_dict(params, sep="/")
    averaged = flatten_dict(state.ema, sep="/")
    # AdamW amplifies the rounding errors of gradients that are zero, such as those of key biases.
    tolerance = 1e-5 if name == "sgd" else 2e-3
    for path, leaf in flatten_dict(state.params, sep="/").items():
        if path.startswith(PREFIXES[trained_blocks]):
            assert not np.array_equal(leaf, start[path]), path
            if name == "adamw" and path.endswith(("qkv/bias", "pool_k/norm/bias")):
                continue
            np.testing.assert_allclose(leaf, expected[path], atol=tolerance, err_msg=path)
        else:
            np.testing.assert_array_equal(leaf, start[path], err_msg=path)
            np.testing.assert_array_equal(averaged[path], start[path], err_msg=path)
    assert not np.array_equal(averaged["head/classifier/kernel"], start["head/classifier/kernel"])


@pytest.mark.parametrize("trained_blocks", [0, 2])
def test_frozen_parameters_have_no_moments(trained_blocks):
    _, state = make(trained_blocks, False)
    trained = [
        leaf.size
        for path, leaf in flatten_dict(state.params, sep="/").items()
        if path.startswith(PREFIXES[trained_blocks])
    ]
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(sizes) == sorted(trained * 2)  # means of gradients and of their squares


@pytest.mark.parametrize("scan", [slow(False), True])
def test_no_gradients_of_frozen_parameters_are_computed(scan):
    """The gradient of a product costs two products: of the weights and of the input."""

    def cost(trained_blocks):
        step, state = make(trained_blocks, scan)
        return products(jax.make_jaxpr(functools.partial(step, learning_rate=0.1))(state, batch()))

    clip = jax.ShapeDtypeStruct((8, 4, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(functional(CONFIG).init, jax.random.key(0))
    apply = functools.partial(functional(CONFIG).apply, scan=scan)
    forward = products(jax.make_jaxpr(lambda p, c: apply(p, c)[0])(params, clip))
    head = 8 * 4 * params["head"]["classifier"]["kernel"].shape[0]
    assert forward < cost(0) <= forward + 2 * head
    assert forward + 2 * head < cost(2) < cost(None)
    assert cost(None) > 2.5 * forward


@pytest.mark.slow
def test_frozen_parameters_stay_on_meshes_that_shard_weights():
    changes = {"data.stride": 1, "optim.trained_blocks": 1, "optim.ema": 0.5, "mesh.fsdp": 4}
    config = tiny.config("", **changes, **{"augment.mixup_group_size": 1})
    mesh = sharding.make_mesh(2, 4, jax.devices())
    settings = build.settings(config, 4)
    with jax.set_mesh(mesh):
        program = build.program(config, settings, mesh)
        state = program.initial_state()
        before = flatten_dict(jax.device_get(state.params), sep="/")
        rows = sharding.to_devices({k: np.asarray(v) for k, v in batch().items()}, mesh)
        for _ in range(2):
            state, _ = program.step(state, rows, np.float32(0.1))
    for path, leaf in flatten_dict(jax.device_get(state.params), sep="/").items():
        trained = path.startswith(("head/", "norm/", "blocks/1/"))
        assert np.array_equal(leaf, before[path]) != trained, path


@pytest.mark.slow
def test_a_linear_probe_resumes_with_the_weights_it_started_from(reference, digits, tmp_path):
    changes = {"optim.trained_blocks": 0, "init.checkpoint": str(reference), "epochs": 1.0}
    config = tiny.config(digits, **tiny.RECIPE | changes)

    def params(folder, item="params"):
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            return flatten_dict(checkpoints.read_params(item=item), sep="/")

    assert train.train(config, str(tmp_path)) == 0
    whole = {item: params(tmp_path, item) for item in ("params", "ema")}
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert train.train(config, str(tmp_path)) == 0  # from step 2
    features = params(reference, "ema")
    for item, leaves in whole.items():
        again = params(tmp_path, item)
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, again[path], err_msg=path)
            assert np.array_equal(leaf, features[path]) != path.startswith("head/"), path
    start = history.read(tmp_path).starts[0]
    assert start["trained_parameters"] == sum(
        leaf.size for path, leaf in features.items() if path.startswith("head/")
    )


def test_invalid_numbers_and_fresh_weights_raise():
    with pytest.raises(UserError, match=r"trained_blocks=3 exceeds the model's 2 blocks"):
        build.settings(tiny.config("", **{"optim.trained_blocks": 3}), 4)
    with pytest.raises(UserError, match=r"would freeze fresh weights: set --config.init.check"):
        check_start(tiny.config("", **{"optim.trained_blocks": 0}))
    check_start(tiny.config("", **{"optim.trained_blocks": 0, "init.checkpoint": "runs/mine"}))
