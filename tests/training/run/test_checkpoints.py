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
from tests.support.marks import slow
from tests.support.tiny import MODEL


@functools.cache
def state_of(seed=0, ema=0.5, **changes):
    """Returns a state of random parameters, with counters at `seed`."""
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
    """Folder of a run that saved steps 1 to 3 and kept the last two; step 2 is the best."""
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


def test_the_best_checkpoint_is_saved_beside_the_last(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.step("best") == 2
    assert_equal(checkpoints.restore_params(state_of(0).params, "best"), state_of(2).params)
    assert_equal(checkpoints.restore_params(state_of(0).ema, item="ema"), state_of(3).ema)


def test_a_state_is_restored_onto_another_mesh(folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    mesh = sharding.make_mesh(2, 4, jax.devices())
    like = jax.device_put(state_of(0), sharding.state_shardings(mesh, state_of(0)))
    restored = Checkpoints(folder).restore(like)
    assert_equal(restored, state_of(3))
    assert restored is not None
    kernel = restored.params["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_restoring_without_a_checkpoint_returns_none_or_raises(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state_of()) is None
    with pytest.raises(UserError, match=r"no checkpoint in .*train first"):
        checkpoints.restore_params(state_of().params)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [({"width": 32}, "blocks/0/attn/pool_k/kernel"), ({"depths": (1, 2)}, "blocks/2/")],
)
def test_another_architecture_raises_with_the_name_of_a_tensor(folder, changes, tensor):
    with pytest.raises(UserError, match=f"for another architecture: {tensor}"):
        Checkpoints(folder).restore(state_of(**changes))


def test_another_optimiser_raises_with_the_name_of_a_tensor(folder):
    """The checkpoint is not set aside as damaged."""
    other = init_state(state_of().params, optimizer.sgd(weight_decay=0.05), 0.5)
    for strip in (False, True):
        if strip:
            without_digests(folder)
        with pytest.raises(UserError, match=r"for another optimiser: opt_state/.* is not expected"):
            Checkpoints(folder, keep=2).resume(other)
    assert Checkpoints(folder).step() == 3 and not (folder / "damaged").exists()


def without_digests(folder):
    """Turns checkpoints into those of older code: no digests, and top-1 in Orbax's metrics."""
    for path in folder.glob("*/*/digests"):
        top1 = json.loads((path / "digests.json").read_text()).get("top1")
        if top1 is not None:
            (path.parent / "metrics").mkdir()
            (path.parent / "metrics" / "metrics").write_text(json.dumps({"top1": top1}))
        shutil.rmtree(path)
        contents = path.parent / "_CHECKPOINT_METADATA"
        metadata = json.loads(contents.read_text())
        del metadata["item_handlers"]["digests"]
        contents.write_text(json.dumps(metadata))


def test_checkpoints_of_older_code_without_digests_are_restored(folder):
    without_digests(folder)
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.resume(state_of(0)), state_of(3))
    assert_equal(checkpoints.restore_params(state_of(0).params, "best"), state_of(2).params)
    assert_equal(checkpoints.read_params(), state_of(3).params)
    assert checkpoints.has_training() and checkpoints.best_top1 == 70
    with pytest.raises(UserError, match="for another architecture: blocks/0/attn/pool_k/kernel"):
        checkpoints.resume(state_of(width=32))


@pytest.mark.parametrize("harm", ["", "{"])
def test_a_damaged_best_checkpoint_does_not_affect_the_last(folder, harm):
    (folder / "best" / "2" / "digests" / "digests.json").write_text(harm)
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.resume(state_of(0)), state_of(3))
    assert_equal(checkpoints.read_params(), state_of(3).params)
    with pytest.raises(UserError, match="best/2 "):
        checkpoints.read_params("best")
    assert checkpoints.best_top1 is None


def test_an_empty_step_folder_is_no_checkpoint(folder):
    (folder / "checkpoints" / "9").mkdir()
    messages = []
    with pytest.raises(UserError, match="9 is incomplete: it has no params"):
        Checkpoints(folder).read_params()
    assert_equal(Checkpoints(folder, keep=2).resume(state_of(0), messages.append), state_of(3))
    assert len(messages) == 1 and "checkpoints/9 is incomplete" in messages[0]


def values_of(folder, step, item="params", which="checkpoints"):
    """Returns the largest file with values of an item's tensors."""
    files = (folder / which / str(step) / item).rglob("d/*")
    return max(files, key=lambda file: file.stat().st_size)


def flip(file):
    """Flips bits all over a file, which Orbax alone does not detect among values."""
    content = bytearray(file.read_bytes())
    for part in range(1, 20):
        content[part * len(content) // 20] ^= 1 << 4
    file.write_bytes(content)


# The file holds TensorStore's index too, which the flipped bits may hit.
DETECTED = r"(is damaged: (params|ema|training)/.* does not match its checksum|cannot be read)"


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def truncate(file):
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: flip(values_of(f, 3)), f"3 {DETECTED}"),
        (lambda f: flip(values_of(f, 3, "training")), f"3 {DETECTED}"),
        slow(lambda f: flip(values_of(f, 3, "ema")), f"3 {DETECTED}"),
        (lambda f: truncate(values_of(f, 3)), "checkpoints/3 cannot be read"),
        slow(lambda f: flip(f / "checkpoints/3/params/_METADATA"), "checkpoints/3"),
        slow(lambda f: flip(f / "checkpoints/3/digests/digests.json"), "checkpoints/3"),
        (lambda f: shutil.rmtree(f / "checkpoints/3/digests"), "digests.json"),
        slow(lambda f: (f / "checkpoints/3/params/manifest.ocdbt").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(folder, spoil, message):
    spoil(folder)
    before = contents(folder / "checkpoints" / "3")
    with pytest.raises(DamagedError, match=message):
        Checkpoints(folder, keep=2).restore(state_of())
    messages = []
    checkpoints = Checkpoints(folder, keep=2)
    assert_equal(checkpoints.resume(state_of(0), messages.append), state_of(2))
    (logged,) = messages
    assert re.search(message, logged) and f"moved to {folder}/damaged/3" in logged
    assert checkpoints.step() == 2
    # Nothing is deleted.
    assert contents(folder / "damaged" / "3") == before
    # The step is saved anew, and may be damaged anew.
    checkpoints.save(state_of(3), 3)
    checkpoints.close()
    flip(values_of(folder, 3))
    assert_equal(Checkpoints(folder, keep=2).resume(state_of(0)), state_of(2))
    assert sorted(p.name for p in (folder / "damaged").iterdir()) == ["3", "3.1"]


def test_resume_raises_and_moves_nothing_if_all_checkpoints_are_damaged(folder):
    for step in (2, 3):
        flip(values_of(folder, step))
    with pytest.raises(UserError, match=r"no checkpoint is left .*checkpoints/3.*checkpoints/2"):
        Checkpoints(folder, keep=2).resume(state_of())
    assert not (folder / "damaged").exists()


def test_an_unavailable_bucket_is_not_reported_as_damage(folder, monkeypatch):
    """Resuming from an older checkpoint would lose steps."""

    def restore(*args, **kwargs):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket")

    checkpoints = Checkpoints(folder, keep=2)
    monkeypatch.setattr(checkpoints.last, "restore", restore)
    with pytest.raises(UserError, match=r"3 cannot be read \(UNAVAILABLE") as error:
        checkpoints.resume(state_of())
    assert not isinstance(error.value, DamagedError)
    assert checkpoints.step() == 3


def test_reading_parameters_alone_detects_damage(folder):
    flip(values_of(folder, 2, which="best"))
    flip(values_of(folder, 3, "ema"))
    checkpoints = Checkpoints(folder)
    like = state_of().params
    for read in (checkpoints.read_params, lambda w: checkpoints.restore_params(like, w)):
        with pytest.raises(UserError, match=rf"best/2 {DETECTED}.*: move its folder away"):
            read("best")
    with pytest.raises(UserError, match=rf"checkpoints/3 {DETECTED}"):
        checkpoints.read_params(item="ema")
    assert_equal(checkpoints.read_params(), state_of(3).params)  # not damaged
    assert not (folder / "damaged").exists()


def test_a_failed_save_leaves_the_checkpoint_before_it_valid(tmp_path):
    """The operating system limits the size of files, with the same effect as a full disk."""
    messages = []
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1), 1)
    checkpoints.wait()
    with files_of_at_most(3000):
        checkpoints.save(state_of(2), 2, log=messages.append)
        with contextlib.suppress(NotSavedError):
            checkpoints.wait()
        assert checkpoints.step() == 1
        checkpoints.save(state_of(3), 3, log=messages.append)
        checkpoints.wait_and_log(messages.append)  # before files may grow again
    checkpoints.save(state_of(4), 4, log=messages.append)
    checkpoints.close()
    assert len(messages) == 1
    assert "checkpoints/3 could not be written (File too large" in messages[0]
    assert "the checkpoint of step 1 is intact; training continues" in messages[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert_equal(Checkpoints(tmp_path).restore(state_of()), state_of(4))


def test_repeated_failures_to_save_end_the_run(tmp_path):
    messages = []
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1), 1)
    checkpoints.wait()
    with files_of_at_most(3000):
        for step in (2, 3):
            checkpoints.save(state_of(step), step, log=messages.append)
        with pytest.raises(NotSavedError, match="3 saves in a row"):
            for step in (4, 5):
                checkpoints.save(state_of(step), step, log=messages.append)
    assert len(messages) == 2
    assert_equal(Checkpoints(tmp_path).restore(state_of()), state_of(1))


def test_the_final_save_is_retried_once_and_must_succeed(tmp_path):
    messages = []
    checkpoints = Checkpoints(tmp_path)
    with files_of_at_most(3000), pytest.raises(NotSavedError, match="no earlier checkpoint"):
        checkpoints.save(state_of(2), 2, end=True, log=messages.append)
    assert len(messages) == 1 and messages[0].endswith("retrying once")
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
    shardings = sharding.state_shardings(mesh, state)
    return jax.tree.map(
        lambda x, at: jax.make_array_from_callback(x.shape, at, lambda part: x[part]),
        state, shardings,
    )

assert checksums.digests(placed(3)) == checksums.digests(state_of(3))
folder = Path(argv[1])
checkpoints = Checkpoints(folder, keep=2, tidy=True)
for step in (2, 3):
    checkpoints.save(placed(step), step)
checkpoints.close()
if coordination.is_process_0():
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
def test_two_processes_set_a_damaged_checkpoint_aside_together(tmp_path):
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


def test_an_interrupted_save_is_ignored(folder):
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert_equal(Checkpoints(folder).restore(state_of()), state_of(3))
    # The process that saves deletes it.
    checkpoints = Checkpoints(folder, keep=2, tidy=True)
    checkpoints.save(state_of(10), 10)
    checkpoints.close()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "3"]


def test_saving_a_step_twice_leaves_the_checkpoint_unchanged(folder):
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(state_of(3), 3)
    checkpoints.save_if_best(state_of(2), 2, 70.0)
    checkpoints.close()
    assert_equal(Checkpoints(folder).restore(state_of()), state_of(3))


def test_a_checkpoint_in_a_bucket_requires_orbaxs_commit_file(tmp_path):
    """In a bucket its folder has the final name from the start; the last file marks it complete."""
    assert not workdir.has_checkpoint(tmp_path) and not workdir.has_checkpoint(epath.Path(tmp_path))
    step = tmp_path / "checkpoints" / "4"
    step.mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").touch()
    assert workdir.has_checkpoint(tmp_path) and not workdir.has_checkpoint(epath.Path(tmp_path))
    (step / "commit_success.txt").touch()
    assert workdir.has_checkpoint(epath.Path(tmp_path))
