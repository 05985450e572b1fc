import jax
import numpy as np
import pytest

from mvit_jax.errors import UserError
from mvit_jax.models import mvit
from mvit_jax.models.variants import variant
from mvit_jax.training import optimizer, sharding
from mvit_jax.training.checkpoints import Checkpoints
from mvit_jax.training.step import init_state
from tests.tiny import MODEL


def state_of(seed=0, ema=0.5, **changes):
    config = variant("mvit_b_16x4", num_classes=4, **(MODEL | changes))
    transform = optimizer.adamw(lambda _: 1e-3, weight_decay=0.05)
    state = init_state(mvit.init(config, jax.random.key(seed)), transform, ema)
    return jax.tree.map(lambda x: x + seed if x.ndim == 0 else x, state)


def assert_equal(a, b):
    leaves = [jax.tree_util.tree_leaves_with_path(x) for x in (a, b)]
    assert len(leaves[0]) == len(leaves[1])
    for (path, x), (_, y) in zip(*leaves, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.fixture
def folder(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state_of(step), step)
        checkpoints.save_if_best(state_of(step), step, {1: 50.0, 2: 70.0, 3: 60.0}[step])
    checkpoints.close()
    return tmp_path


def test_the_last_state_comes_back_bit_for_bit(folder):
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.restore(state_of(0)), state_of(3))
    assert sorted(checkpoints.last.all_steps()) == [2, 3]  # the last two are kept


def test_the_best_parameters_are_kept_beside_the_last(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.step("best") == 2
    assert_equal(checkpoints.restore_params(state_of(0).params, "best"), state_of(2).params)
    assert_equal(checkpoints.restore_params(state_of(0).ema, item="ema"), state_of(3).ema)


def test_a_state_comes_back_onto_another_mesh(folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    mesh = sharding.make_mesh(2, 4)
    like = jax.device_put(state_of(0), sharding.state_shardings(mesh, state_of(0)))
    restored = Checkpoints(folder).restore(like)
    assert_equal(restored, state_of(3))
    assert restored is not None
    kernel = restored.params["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert len(kernel.addressable_shards[0].data) * 4 == len(kernel) or (
        kernel.addressable_shards[0].data.shape[1] * 4 == kernel.shape[1]
    )


def test_no_checkpoint_is_none_to_resume_and_an_error_to_test(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state_of()) is None
    with pytest.raises(UserError, match=r"no checkpoint in .*train first"):
        checkpoints.restore_params(state_of().params)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [({"width": 32}, "blocks/0/attn/pool_k/kernel"), ({"depths": (1, 1)}, "blocks/2/")],
)
def test_another_architecture_is_refused_by_name(folder, changes, tensor):
    with pytest.raises(UserError, match=f"of another architecture: {tensor}"):
        Checkpoints(folder).restore(state_of(**changes))


def test_a_damaged_checkpoint_says_which_folder(folder):
    for file in (folder / "checkpoints" / "3" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"checkpoints/3 cannot be read"):
        Checkpoints(folder).restore(state_of())


def test_a_save_that_was_broken_off_is_ignored(folder):
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert_equal(Checkpoints(folder).restore(state_of()), state_of(3))


def test_saving_a_step_again_is_harmless(folder):
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(state_of(3), 3)
    checkpoints.save_if_best(state_of(2), 2, 70.0)
    checkpoints.close()
    assert_equal(Checkpoints(folder).restore(state_of()), state_of(3))
