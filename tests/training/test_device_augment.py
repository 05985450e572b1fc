import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.common.errors import UserError
from mvit_jax.training import device_augment

CLIPS, CLASSES = 8, 8


@pytest.fixture(scope="module")
def batch():
    clip = jax.random.normal(jax.random.key(1), (CLIPS, 2, 12, 10, 3))
    return clip, jnp.eye(CLASSES)  # clip i has class i: targets identify mixed clips


def both(batch, seed, **changes):
    settings = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "group": 4} | changes
    return device_augment.mix(*batch, jax.random.key(seed), **settings)


def test_flip_mirrors_whole_clips_with_its_probability():
    clip = jax.random.normal(jax.random.key(0), (400, 2, 3, 4, 3))
    flipped = device_augment.flip(clip, jax.random.key(1), 0.3)
    same = (flipped == clip).all((1, 2, 3, 4))
    mirrored = (flipped == clip[:, :, :, ::-1]).all((1, 2, 3, 4))
    assert bool((same ^ mirrored).all())
    assert 0.2 < float(mirrored.mean()) < 0.4


HEIGHT, WIDTH = 40, 60


@pytest.fixture(scope="module")
def erased():
    """Mask of erased pixels in 3000 clips of two frames: [clips, frames, height, width]."""
    erase = jax.jit(device_augment.erase, static_argnums=(2, 3))
    clip = jnp.full((3000, 2, HEIGHT, WIDTH, 3), 7.0)
    done = np.asarray(erase(clip, jax.random.key(0), 1.0, "const"))
    assert set(np.unique(done)) == {0.0, 7.0}  # 0 is the mean colour
    return done[..., 0] != 7.0


def boxes(changed):
    """Returns top, left, height, width of every clip's box; asserts that there is one."""
    rows, columns = changed.any(2), changed.any(1)
    assert (changed == rows[:, :, None] & columns[:, None, :]).all()
    top, left = rows.argmax(1), columns.argmax(1)
    height, width = rows.sum(1), columns.sum(1)
    assert (rows[:, ::-1].argmax(1) == HEIGHT - top - height).all()
    assert (columns[:, ::-1].argmax(1) == WIDTH - left - width).all()
    return top, left, height, width


def timms_boxes(count, rng):
    """Returns boxes drawn as timm draws them.

    The area is uniform, the aspect ratio log-uniform. A box that is not strictly within the
    frame is drawn again, ten times at most.
    """
    drawn = []
    while len(drawn) < count:
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * HEIGHT * WIDTH
            aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if width < WIDTH and height < HEIGHT:
                corner = rng.integers(HEIGHT - height + 1), rng.integers(WIDTH - width + 1)
                drawn.append((*corner, height, width))
                break
    return np.array(drawn).T


def test_erased_boxes_are_equal_in_all_frames_and_distributed_as_in_timm(erased):
    assert (erased[:, :1] == erased).all()
    ours = boxes(erased[:, 0])
    for mine, theirs in zip(ours, timms_boxes(3000, np.random.default_rng(0)), strict=True):
        values = np.arange(61)
        shares = [np.searchsorted(np.sort(x), values, "right") / 3000 for x in (mine, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 0.05  # Kolmogorov-Smirnov at 0.1 %
    top, left, height, width = ours
    assert height.max() < HEIGHT and width.max() < WIDTH
    area = height * width / (HEIGHT * WIDTH)
    assert 0.015 < area.min() < 0.03 and 0.3 < area.max() < 0.35
    assert np.corrcoef(top / (HEIGHT - height), left / (WIDTH - width))[0, 1] < 0.06


def test_erasing_has_its_probability_and_changes_no_other_clip():
    clip = jax.random.normal(jax.random.key(1), (2000, 1, 12, 10, 3))
    for mode in ("pixel", "const"):
        done = device_augment.erase(clip, jax.random.key(2), 0.25, mode)
        changed = np.asarray((done != clip).any(-1))
        assert changed.any((1, 2, 3)).mean() == pytest.approx(0.25, abs=0.03)
        assert (changed == np.asarray((done != clip).all(-1))).all()
    assert device_augment.erase(clip, jax.random.key(2), 0.0, "pixel") is clip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_erased_pixels_are_independent_normal_noise(dtype):
    clip = jnp.full((32, 3, 32, 32, 3), 100.0, dtype)
    done = device_augment.erase(clip, jax.random.key(0), 1.0, "pixel")
    assert done.dtype == dtype
    values = np.asarray(done.astype(jnp.float32))
    noise = values[values != 100]
    assert noise.size > 30000
    assert noise.mean() == pytest.approx(0, abs=0.03) and noise.std() == pytest.approx(1, abs=0.02)
    assert np.mean(np.abs(noise) < 1) == pytest.approx(0.683, abs=0.02)
    assert np.abs(noise).max() > 3.5
    mask = values[0, 0, :, :, 0] != 100
    frames = values[0][:, mask]  # [frames, pixels, colours]
    for a, b in ((frames[0], frames[1]), (frames[..., 0], frames[..., 1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.3


def test_a_frame_too_small_for_a_box_is_unchanged():
    # A box has 2 % of the area or more and an aspect ratio of at most 10/3: two pixels of height.
    clip = jnp.ones((50, 2, 1, 400, 3))
    assert (device_augment.erase(clip, jax.random.key(0), 1.0, "const") == clip).all()


def test_erasing_does_not_depend_on_the_sharding_of_the_batch():
    clip = jax.random.normal(jax.random.key(1), (8, 2, 16, 16, 3))
    erase = jax.jit(device_augment.erase, static_argnums=(2, 3))
    whole = erase(clip, jax.random.key(5), 0.5, "pixel")
    mesh = jax.make_mesh((8,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    parts = erase(jax.device_put(clip, spread), jax.random.key(5), 0.5, "pixel")
    assert len(parts.sharding.device_set) == 8
    np.testing.assert_array_equal(whole, parts)
    assert (whole != clip).any() and (whole == clip).any()


def test_an_unknown_erasing_mode_raises():
    with pytest.raises(UserError, match="not 'rand'"):
        device_augment.erase(jnp.ones((1, 1, 8, 8, 3)), jax.random.key(0), 0.0, "rand")


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_clips_and_targets_by_the_same_weight(batch, seed):
    clip, targets = both(batch, seed, cutmix=0.0)
    weights = set()
    for group in (range(0, 4), range(4, 8)):
        for i in group:
            partner = group[0] + group[-1] - i  # first with last within the group
            weight = float(targets[i, i])
            assert float(targets[i, partner]) == pytest.approx(1 - weight, abs=1e-6)
            expected = weight * batch[0][i] + (1 - weight) * batch[0][partner]
            np.testing.assert_allclose(clip[i], expected, atol=1e-5)
            weights.add(round(weight, 6))
    assert len(weights) == 2  # one for each group


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_one_box_with_an_area_equal_to_the_weight(batch, seed):
    clip, targets = both(batch, seed, mixup=0.0)
    for i in range(CLIPS):
        partner = 4 * (i // 4) + 3 - i % 4
        pasted = np.asarray((clip[i] != batch[0][i]).any((0, 3)))
        everywhere = np.asarray((clip[i] != batch[0][i]).all((0, 3)))
        np.testing.assert_array_equal(pasted, everywhere)  # the same box in all frames
        np.testing.assert_array_equal(clip[i][:, pasted], batch[0][partner][:, pasted])
        assert float(targets[i, i]) == pytest.approx(1 - pasted.mean(), abs=1e-6)
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns)  # it is a box
        assert not len(rows) or np.ptp(rows) == len(rows) - 1


def test_mixup_weights_follow_a_beta_distribution():
    many = jnp.zeros((4096, 1, 1, 1, 3)), jnp.tile(jnp.eye(2), (2048, 1))
    _, targets = both(many, 3, cutmix=0.0, group=2)
    weights = targets[::2, 0]
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(weights.var()) == pytest.approx(1 / (4 * 2.6), rel=0.06)


def test_switch_is_the_probability_of_cutmix():
    clip = jnp.arange(600.0)[:, None, None, None, None] * jnp.ones((1, 1, 8, 8, 3))
    mixed, _ = both((clip, jnp.zeros((600, 2))), 0, mixup=1.0, switch=0.3, group=2)
    # Cutmix has values of the two clips alone, which are integers; mixup has others.
    whole = (mixed == jnp.round(mixed)).all((1, 2, 3, 4))
    assert 0.2 < float(whole.mean()) < 0.4


def test_zero_alphas_leave_the_batch_unchanged(batch):
    clip, targets = both(batch, 0, mixup=0.0, cutmix=0.0)
    assert clip is batch[0] and targets is batch[1]
