import contextlib
import functools
import json
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mvit_jax.common.errors import UserError
from mvit_jax.models.functional import functional
from mvit_jax.models.variants import variant
from mvit_jax.training import optimizer
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import workdir
from mvit_jax.training.run.checkpoints import Checkpoints, DamagedError, NotSavedError
from mvit_jax.training.state import init_state
from tests.support import group
from tests.support.tiny import MODEL


@functools.cache
def state_of(seed=0, ema=0.5, **changes):
    """A state of drawn numbers, counters at `seed`."""
    config = variant("mvit_b_16x4", num_classes=4, **(MODEL | changes))
    transform = optimizer.adamw(weight_decay=0.05)
    shapes = jax.eval_shape(
        lambda: init_state(functional(config).init(jax.random.key(0)), transform, ema)
    )
    random = np.random.default_rng(seed)
    draw = lambda x: random.normal(size=x.shape) if x.ndim else seed  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), shapes)


def assert_equal(a, b):
    jax.tree.map_with_path(lambda path, *x: np.testing.assert_array_equal(*x, str(path)), a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """States of steps 1 to 3, the last two of which are kept; the best is that of step 2."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, keep=2)
    for step, top1 in ((1, 50.0), (2, 70.0), (3, 60.0)):
        checkpoints.save(state_of(step), step)
        checkpoints.save_if_best(state_of(step), step, top1)
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_the_best_parameters_are_kept_beside_the_last(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.step("best") == 2
    assert_equal(checkpoints.restore_params(state_of(0).params, "best"), state_of(2).params)
    assert_equal(checkpoints.restore_params(state_of(0).ema, item="ema"), state_of(3).ema)


def test_a_state_comes_back_onto_another_mesh(folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    mesh = sharding.make_mesh(2, 4, jax.devices())
    like = jax.device_put(state_of(0), sharding.state_shardings(mesh, state_of(0)))
    restored = Checkpoints(folder).restore(like)
    assert_equal(restored, state_of(3))
    assert restored is not None
    kernel = restored.params["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_no_checkpoint_is_none_to_resume_and_an_error_to_test(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state_of()) is None
    with pytest.raises(UserError, match=r"no checkpoint in .*train first"):
        checkpoints.restore_params(state_of().params)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [({"width": 32}, "blocks/0/attn/pool_k/kernel"), ({"depths": (1, 2)}, "blocks/2/")],
)
def test_another_architecture_is_refused_by_name(folder, changes, tensor):
    with pytest.raises(UserError, match=f"of another architecture: {tensor}"):
        Checkpoints(folder).restore(state_of(**changes))


def test_another_optimiser_is_refused_by_name(folder):
    """And is no damage."""
    other = init_state(state_of().params, optimizer.sgd(weight_decay=0.05), 0.5)
    for strip in (False, True):
        if strip:
            without_digests(folder)
        with pytest.raises(UserError, match=r"of another optimiser: opt_state/.* missing in this"):
            Checkpoints(folder, keep=2).resume(other)
    assert Checkpoints(folder).step() == 3 and not (folder / "damaged").exists()


def without_digests(folder):
    """As checkpoints were before there were digests, and what was the best was Orbax's to tell."""
    for path in folder.glob("*/*/digests"):
        top1 = json.loads((path / "digests.json").read_text()).get("top1")
        if top1 is not None:
            (path.parent / "metrics").mkdir()
            (path.parent / "metrics" / "metrics").write_text(json.dumps({"top1": top1}))
        shutil.rmtree(path)
        contents = path.parent / "_CHECKPOINT_METADATA"
        told = json.loads(contents.read_text())
        del told["item_handlers"]["digests"]
        contents.write_text(json.dumps(told))


def test_checkpoints_of_older_code_have_no_digests_and_are_taken(folder):
    without_digests(folder)
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.resume(state_of(0)), state_of(3))
    assert_equal(checkpoints.restore_params(state_of(0).params, "best"), state_of(2).params)
    assert_equal(checkpoints.read_params(), state_of(3).params)
    assert checkpoints.has_training() and checkpoints.best_top1 == 70
    with pytest.raises(UserError, match="of another architecture: blocks/0/attn/pool_k/kernel"):
        checkpoints.resume(state_of(width=32))


@pytest.mark.parametrize("harm", ["", "{"])
def test_damage_to_the_best_does_no_harm_to_the_last(folder, harm):
    (folder / "best" / "2" / "digests" / "digests.json").write_text(harm)
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.resume(state_of(0)), state_of(3))
    assert_equal(checkpoints.read_params(), state_of(3).params)
    with pytest.raises(UserError, match="best/2 "):
        checkpoints.read_params("best")
    assert checkpoints.best_top1 is None


def test_a_folder_with_nothing_in_it_is_no_checkpoint(folder):
    (folder / "checkpoints" / "9").mkdir()
    said = []
    with pytest.raises(UserError, match="9 is no checkpoint: it has no params"):
        Checkpoints(folder).read_params()
    assert_equal(Checkpoints(folder, keep=2).resume(state_of(0), said.append), state_of(3))
    assert len(said) == 1 and "checkpoints/9 is no checkpoint" in said[0]


def values_of(folder, step, item="params", which="checkpoints"):
    """The largest of the files that hold the values of an item's tensors."""
    files = (folder / which / str(step) / item).rglob("d/*")
    return max(files, key=lambda file: file.stat().st_size)


def flip(file):
    """Some bits, all over a file: Orbax alone would not notice them among values."""
    content = bytearray(file.read_bytes())
    for place in range(1, 20):
        content[place * len(content) // 20] ^= 1 << 4
    file.write_bytes(content)


# Values lie beside TensorStore's index of them, which may be hit as well.
NOTICED = r"(is damaged: (params|ema|training)/.* is not as saved|cannot be read)"


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def cut(file):
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: flip(values_of(f, 3)), f"3 {NOTICED}"),
        (lambda f: flip(values_of(f, 3, "training")), f"3 {NOTICED}"),
        (lambda f: flip(values_of(f, 3, "ema")), f"3 {NOTICED}"),
        (lambda f: cut(values_of(f, 3)), "checkpoints/3 cannot be read"),
        (lambda f: flip(f / "checkpoints/3/params/_METADATA"), "checkpoints/3"),
        (lambda f: flip(f / "checkpoints/3/digests/digests.json"), "checkpoints/3"),
        (lambda f: shutil.rmtree(f / "checkpoints/3/digests"), "digests.json"),
        (lambda f: (f / "checkpoints/3/params/manifest.ocdbt").unlink(), "cannot be read"),
    ],
)
def test_damage_is_noticed_and_the_checkpoint_before_it_is_used(folder, spoil, why):
    spoil(folder)
    before = contents(folder / "checkpoints" / "3")
    with pytest.raises(DamagedError, match=why):
        Checkpoints(folder, keep=2).restore(state_of())
    said = []
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.resume(state_of(0), said.append), state_of(2))
    (sentence,) = said
    assert re.search(why, sentence) and f"moved to {folder}/damaged/3" in sentence
    assert checkpoints.step() == 2
    # Nothing is deleted.
    assert contents(folder / "damaged" / "3") == before
    # The step is saved anew, and may be damaged anew.
    checkpoints.save(state_of(3), 3)
    checkpoints.close()
    flip(values_of(folder, 3))
    assert_equal(Checkpoints(folder, keep=2).resume(state_of(0)), state_of(2))
    assert sorted(p.name for p in (folder / "damaged").iterdir()) == ["3", "3.1"]


def test_where_all_are_damaged_nothing_is_moved_and_nothing_starts_anew(folder):
    for step in (2, 3):
        flip(values_of(folder, step))
    with pytest.raises(UserError, match=r"no checkpoint is left .*checkpoints/3.*checkpoints/2"):
        Checkpoints(folder, keep=2).resume(state_of())
    assert not (folder / "damaged").exists()


def test_what_cannot_be_read_just_now_is_not_taken_for_damage(folder, monkeypatch):
    """A bucket that does not answer, say: to go on from an older state would cost work."""

    def restore(*args, **kwargs):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket")

    checkpoints = Checkpoints(folder, keep=2)
    monkeypatch.setattr(checkpoints.last, "restore", restore)
    with pytest.raises(UserError, match=r"3 cannot be read \(UNAVAILABLE") as error:
        checkpoints.resume(state_of())
    assert not isinstance(error.value, DamagedError)
    assert checkpoints.step() == 3


def test_damage_to_parameters_is_noticed_when_they_alone_are_read(folder):
    flip(values_of(folder, 2, which="best"))
    flip(values_of(folder, 3, "ema"))
    checkpoints = Checkpoints(folder)
    like = state_of().params
    for read in (checkpoints.read_params, lambda w: checkpoints.restore_params(like, w)):
        with pytest.raises(UserError, match=rf"best/2 {NOTICED}.*: move that folder away"):
            read("best")
    with pytest.raises(UserError, match=rf"checkpoints/3 {NOTICED}"):
        checkpoints.read_params(item="ema")
    assert_equal(checkpoints.read_params(), state_of(3).params)  # which are whole
    assert not (folder / "damaged").exists()


def test_a_save_that_fails_leaves_the_one_before_whole_and_is_made_good(tmp_path):
    """Files may not grow, as on a full disk: the operating system itself refuses."""
    said = []
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1), 1)
    checkpoints.wait()
    with files_of_at_most(3000):
        checkpoints.save(state_of(2), 2, log=said.append)
        with contextlib.suppress(NotSavedError):
            checkpoints.wait()
        assert checkpoints.step() == 1
        checkpoints.save(state_of(3), 3, log=said.append)
        checkpoints.settle(said.append)  # before files may grow again
    checkpoints.save(state_of(4), 4, log=said.append)
    checkpoints.close()
    assert len(said) == 1 and "checkpoints/3 could not be written (File too large" in said[0]
    assert "the checkpoint of step 1 is intact; training continues" in said[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert_equal(Checkpoints(tmp_path).restore(state_of()), state_of(4))


def test_saves_that_fail_again_and_again_end_the_run(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1), 1)
    checkpoints.wait()
    with files_of_at_most(3000):
        for step in (2, 3):
            checkpoints.save(state_of(step), step, log=said.append)
        with pytest.raises(NotSavedError, match="3 in a row"):
            for step in (4, 5):
                checkpoints.save(state_of(step), step, log=said.append)
    assert len(said) == 2
    assert_equal(Checkpoints(tmp_path).restore(state_of()), state_of(1))


def test_the_last_save_of_all_is_tried_twice_and_must_succeed(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path)
    with files_of_at_most(3000), pytest.raises(NotSavedError, match="no earlier checkpoint"):
        checkpoints.save(state_of(2), 2, end=True, log=said.append)
    assert len(said) == 1 and said[0].endswith("retrying once")
    checkpoints.save(state_of(2), 2, end=True)
    assert_equal(Checkpoints(tmp_path).restore(state_of()), state_of(2))


TWO = """
import jax
import numpy as np
from jax.experimental import multihost_utils
from pathlib import Path
from mvit_jax.training.distributed import sharding
from mvit_jax.training.run import checksums
from mvit_jax.training.run.checkpoints import Checkpoints
from tests.training.run.test_checkpoints import flip, state_of, values_of

sharding.SMALLEST_SHARDED = 64
mesh = sharding.make_mesh(2, 2)

def placed(seed):
    state = jax.tree.map(np.asarray, state_of(seed))
    where = sharding.state_shardings(mesh, state)
    return jax.tree.map(
        lambda x, at: jax.make_array_from_callback(x.shape, at, lambda part: x[part]), state, where
    )

assert checksums.digests(placed(3)) == checksums.digests(state_of(3))
folder = Path(argv[1])
checkpoints = Checkpoints(folder, keep=2, tidy=True)
for step in (2, 3):
    checkpoints.save(placed(step), step)
checkpoints.close()
if coordination.first():
    flip(values_of(folder, 3))
multihost_utils.sync_global_devices("damaged")
checkpoints = Checkpoints(folder, keep=2)
state = checkpoints.resume(placed(0))
assert checksums.digests(state) == checksums.digests(state_of(2))
checkpoints.save(placed(3), 3)
checkpoints.wait()
assert checkpoints.last.all_steps() == [2, 3]
"""


@pytest.mark.slow
def test_two_processes_verify_and_set_aside_together(tmp_path):
    for done in group.finish(group.start([*group.together(TWO), str(tmp_path)], 2, 2), 300):
        assert done.status == 0, done.err[-3000:]
        assert "checkpoints/3" in done.out and f"moved to {tmp_path}/damaged/3" in done.out
    checkpoints = Checkpoints(tmp_path)  # one process
    assert_equal(checkpoints.restore(state_of()), state_of(3))


@contextlib.contextmanager
def files_of_at_most(length):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_was_broken_off_is_ignored(folder):
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert_equal(Checkpoints(folder).restore(state_of()), state_of(3))
    # Who saves makes room.
    checkpoints = Checkpoints(folder, keep=2, tidy=True)
    checkpoints.save(state_of(10), 10)
    checkpoints.close()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "3"]


def test_saving_a_step_again_is_harmless(folder):
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(state_of(3), 3)
    checkpoints.save_if_best(state_of(2), 2, 70.0)
    checkpoints.close()
    assert_equal(Checkpoints(folder).restore(state_of()), state_of(3))


def test_a_checkpoint_in_a_bucket_counts_when_orbax_has_ended_it(tmp_path):
    """There it has its name from the beginning, and its last file tells that it is whole."""
    assert not workdir.has_checkpoint(tmp_path) and not workdir.has_checkpoint(epath.Path(tmp_path))
    step = tmp_path / "checkpoints" / "4"
    step.mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").touch()
    assert workdir.has_checkpoint(tmp_path) and not workdir.has_checkpoint(epath.Path(tmp_path))
    (step / "commit_success.txt").touch()
    assert workdir.has_checkpoint(epath.Path(tmp_path))
