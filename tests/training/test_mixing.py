import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvit_jax.training import mixing

CLIPS, CLASSES = 8, 8


@pytest.fixture(scope="module")
def batch():
    clip = jax.random.normal(jax.random.key(1), (CLIPS, 2, 12, 10, 3))
    return clip, jnp.eye(CLASSES)  # clip i has class i, so targets tell who was mixed


def both(batch, seed, **changes):
    settings = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "group": 4} | changes
    return mixing.mix(*batch, jax.random.key(seed), **settings)


def test_normalise_equals_its_formula():
    clip = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    mean, std = (0.45, 0.4, 0.5), (0.225, 0.2, 0.25)
    expected = (clip / 255 - np.array(mean)) / np.array(std)
    ours = mixing.normalise(jnp.asarray(clip), mean, std, jnp.float32)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_flip_mirrors_whole_clips_at_its_rate():
    clip = jax.random.normal(jax.random.key(0), (400, 2, 3, 4, 3))
    flipped = mixing.flip(clip, jax.random.key(1), 0.3)
    same = (flipped == clip).all((1, 2, 3, 4))
    mirrored = (flipped == clip[:, :, :, ::-1]).all((1, 2, 3, 4))
    assert bool((same ^ mirrored).all())
    assert 0.2 < float(mirrored.mean()) < 0.4


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_clips_as_their_targets_say(batch, seed):
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
def test_cutmix_pastes_one_box_whose_area_is_the_weight(batch, seed):
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


def test_weights_follow_their_beta_distributions():
    many = jnp.zeros((4096, 1, 1, 1, 3)), jnp.tile(jnp.eye(2), (2048, 1))
    _, targets = mixing.mix(*many, jax.random.key(3), mixup=0.8, cutmix=0.0, switch=0.5, group=2)
    weights = targets[::2, 0]
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(weights.var()) == pytest.approx(1 / (4 * 2.6), rel=0.06)


def test_switch_is_the_chance_of_cutmix():
    clip = jnp.arange(600.0)[:, None, None, None, None] * jnp.ones((1, 1, 8, 8, 3))
    targets = jnp.zeros((600, 2))
    mixed, _ = mixing.mix(
        clip, targets, jax.random.key(0), mixup=1.0, cutmix=1.0, switch=0.3, group=2
    )
    # Cutmix leaves only whole values of the two clips; mixup makes others.
    whole = (mixed == jnp.round(mixed)).all((1, 2, 3, 4))
    assert 0.2 < float(whole.mean()) < 0.4


def test_off_is_off(batch):
    clip, targets = both(batch, 0, mixup=0.0, cutmix=0.0)
    assert clip is batch[0] and targets is batch[1]
